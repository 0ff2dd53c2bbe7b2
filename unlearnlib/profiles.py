"""Three sizes of the same experiments: ``quick`` for newcomers, ``cpu`` for reference, ``gpu`` for hub models."""

import dataclasses
from typing import Any

from unlearnlib.data import CORPORA
from unlearnlib.models import small_opt
from unlearnlib.training import Training


@dataclasses.dataclass(frozen=True)
class Profile:
    """How large the experiments are: the data, the model and the number of repetitions.

    ``forget``, ``retain`` and ``holdout`` count sequences of ``length`` tokens. ``model`` is a configuration to
    train from scratch, with a tokenizer of ``vocabulary`` entries trained on the corpus, or the name of a
    pretrained model, fine-tuned with its own tokenizer (``vocabulary`` is None).
    The relearning probe takes ``relearning_steps`` steps at ``relearning_rate``.
    Each of ``seeds`` draws its own splits, initial weights and batch order.
    """

    name: str
    corpus: str
    model: str | dict[str, Any]
    vocabulary: int | None
    length: int
    forget: int
    retain: int
    holdout: int
    training: Training
    seeds: tuple[int, ...]
    relearning_steps: int = 30
    relearning_rate: float = 1e-4


PROFILES = {
    "quick": Profile(
        name="quick",
        corpus="reuters",
        model=small_opt(1024, hidden_size=64),
        vocabulary=1024,
        length=64,
        forget=64,
        retain=960,
        holdout=256,
        training=Training(epochs=15, learning_rate=3e-3),
        seeds=(0, 1, 2),
    ),
    "cpu": Profile(
        name="cpu",
        corpus="reuters",
        model=small_opt(2048),
        vocabulary=2048,
        length=64,
        forget=64,
        retain=1984,
        holdout=512,
        training=Training(epochs=15, learning_rate=1e-3),
        seeds=(0, 1, 2, 3, 4),
    ),
    "gpu": Profile(
        name="gpu",
        corpus="reuters",
        model="facebook/opt-125m@27dcfa74d334bc871f3234de431e71c6eeba5dd6",
        vocabulary=None,
        length=128,
        forget=64,
        retain=1984,
        holdout=512,
        training=Training(epochs=4, learning_rate=1e-4),
        seeds=(0, 1, 2, 3, 4),
    ),
}


def get_profile(name: str, corpus: str | None = None, seeds: int | None = None) -> Profile:
    """The profile called ``name``, on another corpus or with another number of seeds where these are given.

    Raises ValueError for an unknown profile or corpus, or less than one seed.
    """
    if name not in PROFILES:
        raise ValueError(f"unknown profile {name!r}: choose one of {', '.join(PROFILES)}")
    profile = PROFILES[name]
    if corpus is not None:
        if corpus not in CORPORA:
            raise ValueError(f"unknown corpus {corpus!r}: choose one of {', '.join(CORPORA)}")
        profile = dataclasses.replace(profile, corpus=corpus)
    if seeds is not None:
        if seeds < 1:
            raise ValueError(f"need at least one seed, not {seeds}")
        profile = dataclasses.replace(profile, seeds=tuple(range(seeds)))
    return profile


def on_second_corpus(settings: Profile, seeds: int) -> Profile:
    """The same experiment on another corpus: socialiqa, or reuters where socialiqa is the first.

    Socialiqa is small, so that no more than 960 sequences are retained and 256 held out.
    """
    return dataclasses.replace(
        settings,
        corpus="reuters" if settings.corpus == "socialiqa" else "socialiqa",
        retain=min(settings.retain, 960),
        holdout=min(settings.holdout, 256),
        seeds=tuple(range(seeds)),
    )
