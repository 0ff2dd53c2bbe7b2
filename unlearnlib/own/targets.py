"""Which forget loss a request aims at, and by what the texts are judged where there is no reference."""

import torch
from torch import Tensor

from unlearnlib.methods.targets import Target, fitted_target
from unlearnlib.own.texts import Material
from unlearnlib.texts.bigrams import Bigrams

FEWEST = 3
"""A line through holdout losses needs so many sequences."""


def difficulties(material: Material, vocabulary: int) -> dict[str, Tensor]:
    """How hard the forget and the holdout sequences are, by the bigrams of the texts that are kept, in nats."""
    bigrams = Bigrams(material.retain, vocabulary)
    rows = {"forget": material.forget, "holdout": material.holdout}
    return {name: bigrams.losses(values) for name, values in rows.items() if values is not None}


def estimate_targets(holdout: Tensor, difficulty: dict[str, Tensor], sets: dict[str, int]) -> dict[str, Target]:
    """The forget loss of a model that has not read the texts, estimated: of all (``all``), and of each set.

    ``holdout`` are the losses [m] of the model before; how hard the texts are is allowed for by
    :func:`unlearnlib.methods.targets.fitted_target`. Raises ValueError for fewer than three holdout sequences.
    """
    parts = dict(zip(sets, difficulty["forget"].split(list(sets.values())), strict=True))
    everything = {"all": difficulty["forget"]} | parts
    return {name: fitted_target(holdout, part, difficulty["holdout"]) for name, part in everything.items()}


def beyond_difficulty(losses: dict[str, Tensor], difficulty: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is left of a model's losses once how hard each text is has been taken off, in nats.

    The line is fitted to the holdout texts alone. Of both an attack may know as much as we do.
    """
    x, y = difficulty["holdout"].double(), losses["holdout"].double()
    spread = (x - x.mean()).square().sum()
    slope = ((x - x.mean()) * (y - y.mean())).sum() / spread if x.max() > x.min() else torch.zeros(())
    return {name: losses[name].double() - slope * difficulty[name].double() for name in losses}
