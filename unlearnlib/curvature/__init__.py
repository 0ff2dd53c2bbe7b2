"""The matrix C of second-order methods, by every route that does not form it; all share one protocol."""

from unlearnlib.curvature.blocks import Block
from unlearnlib.curvature.fisher import (
    FisherDiagonal,
    FisherDual,
    FisherRecursion,
    effective_rank,
    power_gain,
    sampled_losses,
    sequence_gradients,
    sherman_morrison,
    unrolled_recursion,
)
from unlearnlib.curvature.fisher_streaming import StreamingFisher
from unlearnlib.curvature.kronecker import (
    Kronecker,
    diagonal_fisher,
    ekfac,
    from_factors,
    kfac,
    layer_factors,
    second_moments,
)
from unlearnlib.curvature.krylov import (
    Lanczos,
    NegativeCurvature,
    NotConverged,
    conjugate_gradients,
    lanczos,
    smallest_eigenvalue,
)
from unlearnlib.curvature.newton import GaussNewton, Hessian, Outputs, cost_in_gradients
from unlearnlib.curvature.protocol import Curvature

__all__ = [
    "Block",
    "Curvature",
    "FisherDiagonal",
    "FisherDual",
    "FisherRecursion",
    "GaussNewton",
    "Hessian",
    "Kronecker",
    "Lanczos",
    "NegativeCurvature",
    "NotConverged",
    "Outputs",
    "StreamingFisher",
    "conjugate_gradients",
    "cost_in_gradients",
    "diagonal_fisher",
    "effective_rank",
    "ekfac",
    "from_factors",
    "kfac",
    "lanczos",
    "layer_factors",
    "power_gain",
    "sampled_losses",
    "second_moments",
    "sequence_gradients",
    "sherman_morrison",
    "smallest_eigenvalue",
    "unrolled_recursion",
]
