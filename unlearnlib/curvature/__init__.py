"""The matrix C of second-order methods, by every route that does not form it; all share one protocol."""

from unlearnlib.curvature.block_gauss_newton import BlockGaussNewton
from unlearnlib.curvature.column_pass import ColumnPass
from unlearnlib.curvature.column_sums import ColumnSums
from unlearnlib.curvature.fisher_diagonal import FisherDiagonal
from unlearnlib.curvature.fisher_dual import FisherDual, effective_rank, gram, power_gain
from unlearnlib.curvature.fisher_dual_streaming import StreamingFisher
from unlearnlib.curvature.fisher_recursion import (
    FisherRecursion,
    blocks_at_once,
    sherman_morrison,
    unrolled_recursion,
)
from unlearnlib.curvature.kronecker import (
    Kronecker,
    diagonal_fisher,
    ekfac,
    from_factors,
    kfac,
    layer_factors,
    second_moments,
)
from unlearnlib.curvature.kronecker_blocks import Block, assign_owners
from unlearnlib.curvature.kronecker_groups import kfac_in_groups
from unlearnlib.curvature.kronecker_plan import plan
from unlearnlib.curvature.krylov import (
    Lanczos,
    NegativeCurvature,
    NotConverged,
    conjugate_gradients,
    lanczos,
    smallest_eigenvalue,
)
from unlearnlib.curvature.newton import GaussNewton, Hessian, Outputs, cost_in_gradients
from unlearnlib.curvature.output_layer import OutputLayer
from unlearnlib.curvature.per_sequence_gradients import sampled_losses, sequence_gradients
from unlearnlib.curvature.protocol import Curvature

__all__ = [
    "Block",
    "BlockGaussNewton",
    "ColumnPass",
    "ColumnSums",
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
    "OutputLayer",
    "Outputs",
    "StreamingFisher",
    "assign_owners",
    "blocks_at_once",
    "conjugate_gradients",
    "cost_in_gradients",
    "diagonal_fisher",
    "effective_rank",
    "ekfac",
    "from_factors",
    "gram",
    "kfac",
    "kfac_in_groups",
    "lanczos",
    "layer_factors",
    "plan",
    "power_gain",
    "sampled_losses",
    "second_moments",
    "sequence_gradients",
    "sherman_morrison",
    "smallest_eigenvalue",
    "unrolled_recursion",
]
