"""The diagonal of the Fisher matrix F = (1/m) Σ gᵢ gᵢᵀ of m sequences: d numbers, and as quick to invert."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from unlearnlib import distributed
from unlearnlib.curvature.per_sequence_gradients import SequenceLoss, each_gradient, gradient_batches
from unlearnlib.curvature.protocol import check_damping, take
from unlearnlib.losses import sequence_losses
from unlearnlib.weights import Vector, parameters


class FisherDiagonal:
    """The diagonal of F: d numbers, added up batch by batch and layer by layer, without ever holding G.

    Sequences and ``loss`` as for :func:`unlearnlib.curvature.per_sequence_gradients.sequence_gradients`, which
    also says what is raised. Several processes take a share of the sequences each.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sequences: Tensor,
        number: int | None = None,
        loss: SequenceLoss = sequence_losses,
    ) -> None:
        chosen = take(sequences, number)
        self.diagonal = {name: torch.zeros_like(p) for name, p in parameters(model).items()}

        def receive(name: str, gradients: Tensor) -> None:
            for g in gradients:
                self.diagonal[name].addcmul_(g, g, value=1 / len(chosen))

        mine = distributed.share(len(chosen))
        start = mine.start
        with distributed.together():
            for batch in gradient_batches(model, chosen[mine]):
                each_gradient(model, batch, loss, receive, start)
                start += len(batch)
        distributed.sum_over(self.diagonal.values())

    def matvec(self, v: Vector) -> Vector:
        """diag(F) v."""
        return {name: self.diagonal[name] * x for name, x in v.items()}

    def solve(self, v: Vector, damping: float) -> Vector:
        """(diag(F) + λI)⁻¹ v."""
        return self.power(v, -1.0, damping)

    def power(self, v: Vector, exponent: float, damping: float) -> Vector:
        """(diag(F) + λI)^p v."""
        check_damping(damping)
        return {name: (self.diagonal[name] + damping).pow(exponent) * x for name, x in v.items()}
