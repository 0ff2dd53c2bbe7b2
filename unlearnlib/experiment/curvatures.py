"""The curvatures that the chapters compare, by the names their methods have in the tables."""

from torch import Tensor
from transformers import PreTrainedModel

from unlearnlib.curvature.fisher_diagonal import FisherDiagonal
from unlearnlib.curvature.fisher_dual import FisherDual
from unlearnlib.curvature.fisher_recursion import FisherRecursion
from unlearnlib.curvature.kronecker import Kronecker, kfac
from unlearnlib.curvature.per_sequence_gradients import sequence_gradients
from unlearnlib.methods.fisher_updates import Build

AT_ONCE = 16
"""How many gradients a step of the recursion takes, which decides how long it takes and not what it gives."""


def curvature_builders(
    sequences: Tensor,
    seed: int = 0,
    m: int | None = None,
    m_recursion: int | None = None,
    block_size: int = 64,
    m_factors: int | None = None,
) -> dict[str, Build]:
    """By method, what builds its curvature of ``sequences`` [n, tokens] at the weights that a model has.

    Of the first so many sequences, or of all (None): ``m`` for the dual form and for the diagonal, whose memory
    or time grows with them; ``m_recursion`` for the recursion, in blocks of ``block_size`` sequences and weights;
    ``m_factors`` for K-FAC, whose labels are drawn with ``seed``. Nothing is built before it is asked for, and
    then it raises ValueError if there are not so many sequences.
    """

    def recursion(model: PreTrainedModel) -> FisherRecursion:
        return FisherRecursion(sequence_gradients(model, sequences, m_recursion), block_size, AT_ONCE)

    def dual(model: PreTrainedModel) -> FisherDual:
        return FisherDual(sequence_gradients(model, sequences, m))

    def diagonal(model: PreTrainedModel) -> FisherDiagonal:
        return FisherDiagonal(model, sequences, m)

    def factors(model: PreTrainedModel) -> Kronecker:
        return kfac(model, sequences, m_factors, seed)

    return {
        "fisher_recursion": recursion,
        "fisher_dual": dual,
        "fisher_diagonal": diagonal,
        "kfac": factors,
    }
