"""A chapter's settings at a profile, with the corpus, seeds or model that its reader gave in place of its own."""

import dataclasses
import itertools
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from unlearnlib.experiment.profiles import PROFILES, Profile, get_profile
from unlearnlib.experiment.sizes import CHAPTERS

# Chapters that take no pretrained model in place of their own, and why.
OWN_MODELS_ONLY = {
    "newton": "its models are logistic regressions",
    "by_heart": "it trains a new model until that knows its few texts by heart",
    "dp_sgd": "it trains privately, by Opacus, which cannot train every architecture",
    "three_axes": "it plants secrets in a new model and times the recursion at sizes of its own",
    "cost": "its weights are random, and their number is what it varies",
    "many_gpus": "its weights are random, and their number is what it varies",
}
# What is other where a chapter of new models is given a pretrained one.
FINE_TUNING = ("vocabulary", "training", "last_blocks", "relearning_steps", "relearning_rate")
HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?(@.+)?")


def chapter(
    name: str, profile: str, corpus: str | None = None, seeds: int | None = None, **changes: Any
) -> tuple[Profile, SimpleNamespace]:
    """The profile as the chapter called ``name`` uses it, and the chapter's own settings.

    ``corpus``, ``seeds`` and other fields of the profile, ``changes``, take the place of the profile's and the
    chapter's where they are given and not None. A pretrained ``model`` in place of new ones is fine-tuned with its
    own tokenizer, as that of chapter 10 is at this profile.
    Raises as :func:`unlearnlib.experiment.profiles.get_profile`, and ValueError for an unknown chapter, a change
    that is no field of a profile, or a pretrained model where the chapter takes none (:data:`OWN_MODELS_ONLY`);
    FileNotFoundError for a path of no model.
    """
    if name not in CHAPTERS:
        raise ValueError(f"unknown chapter {name!r}: choose one of {', '.join(CHAPTERS)}")
    settings = get_profile(profile, corpus, seeds)
    entries = dict(CHAPTERS[name][profile])
    number = seeds or entries.get("seeds", len(PROFILES[profile].seeds))
    left_out = entries.pop("left_out_seeds", {}).get(settings.corpus, ())
    entries["seeds"] = tuple(itertools.islice((s for s in itertools.count() if s not in left_out), number))
    fields = {field.name for field in dataclasses.fields(Profile)}
    unknown = changes.keys() - fields
    if unknown:
        raise ValueError(f"a profile has no {', '.join(sorted(unknown))}: choose from {', '.join(sorted(fields))}")
    changes["corpus"] = None if corpus is None else settings.corpus
    given = {key: value for key, value in changes.items() if value is not None}
    before = vars(PROFILES[profile]) | entries
    if isinstance(given.get("model"), str):
        if name in OWN_MODELS_ONLY:
            raise ValueError(f"the chapter {name!r} takes no other model: {OWN_MODELS_ONLY[name]}")
        if not Path(given["model"]).is_dir() and not HUB_ID.fullmatch(given["model"]):
            raise FileNotFoundError(f"there is no folder {given['model']}: give that of a model, or a hub id")
        if before["vocabulary"] is not None:
            tuned = CHAPTERS["real_model"][profile]
            given = {key: tuned[key] for key in FINE_TUNING if key in tuned} | given
    entries |= given
    changed = {key: value for key, value in entries.items() if key in fields}
    own = {key: value for key, value in entries.items() if key not in fields}
    return dataclasses.replace(settings, **changed), SimpleNamespace(**own)
