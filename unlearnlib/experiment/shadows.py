"""Shadow models, from which an attacker learns what a text's score is with it in the training set, and without."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from unlearnlib.experiment.case import Case
from unlearnlib.models.training import Run, load_trained, train_missing

SHADOW_SEED = 10_000
"""Added to a case's seed for its first shadow model, and one more for each further one."""


@dataclass(frozen=True)
class Shadows:
    """An even number of shadow models of a case, each trained on its retain set and on one half of a pool.

    The pool is the forget and the holdout sequences together, in this order; ``inside`` [models, pool] tells which
    are in which model's training set. Models come in pairs that share the pool between them, so that every
    sequence is inside of exactly half of the models. Raises ValueError for an odd number, or fewer than four.
    """

    case: Case
    number: int

    def __post_init__(self) -> None:
        if self.number < 4 or self.number % 2:
            raise ValueError(f"take an even number of shadow models, 4 or more, not {self.number}")

    @property
    def pool(self) -> Tensor:
        """The sequences [pool, tokens] in question: first those to forget, then those never trained on."""
        return torch.cat([self.case.splits.forget, self.case.splits.holdout])

    @property
    def inside(self) -> Tensor:
        """Whether a model is trained on a sequence of the pool, [models, pool]."""
        size = len(self.pool)
        generator, rows = torch.Generator().manual_seed(SHADOW_SEED + self.case.seed), []
        for _ in range(self.number // 2):
            one = torch.zeros(size, dtype=torch.bool)
            one[torch.randperm(size, generator=generator)[: size // 2]] = True
            rows += [one, ~one]
        return torch.stack(rows)

    def runs(self) -> list[Run]:
        """The training runs of all shadow models."""
        retrained, retain, pool = self.case.runs()["retrained"], self.case.splits.retain, self.pool
        return [
            replace(retrained, sequences=torch.cat([retain, pool[mine]]), seed=self.case.seed + SHADOW_SEED + i)
            for i, mine in enumerate(self.inside)
        ]

    def scores(self, score: Callable[[PreTrainedModel, Tensor], Tensor]) -> Tensor:
        """``score(model, pool)`` by each of the models, [models, ...]; those not in the cache are trained now."""
        runs = self.runs()
        train_missing(runs)
        return torch.stack([score(load_trained(run), self.pool) for run in runs])
