"""What is done to a model to make it forget, and how every method is brought to the same forget loss."""

from unlearnlib.methods.first_order import (
    activation_loss,
    ascent_direction,
    ascent_loss,
    kl_loss,
    npo_loss,
    retain_loss,
    rmu_loss,
    simnpo_loss,
    with_retain,
)
from unlearnlib.methods.fisher_updates import (
    RemovalInSteps,
    forgetting_noise,
    held_direction,
    noise_kl,
    removal_direction,
)
from unlearnlib.methods.matching import (
    TOLERANCE,
    Line,
    Match,
    Path,
    Walk,
    match_strength,
    sweep,
)
from unlearnlib.methods.newton_descent import newton_loss
from unlearnlib.methods.newton_removal import NaturalPath, Subspace, krylov_subspace
from unlearnlib.methods.sophia import Sophia, bartlett_diagonal, sophia_walk
from unlearnlib.methods.targets import (
    Target,
    calibrated_damping,
    fitted_target,
    gap_target,
    holdout_target,
    left_out_loss,
)
from unlearnlib.methods.tuning import Choice, choose
from unlearnlib.methods.walks import RepairedAscent, adam_walk, descend, sgd_walk

__all__ = [
    "TOLERANCE",
    "Choice",
    "Line",
    "Match",
    "NaturalPath",
    "Path",
    "RemovalInSteps",
    "RepairedAscent",
    "Sophia",
    "Subspace",
    "Target",
    "Walk",
    "activation_loss",
    "adam_walk",
    "ascent_direction",
    "ascent_loss",
    "bartlett_diagonal",
    "calibrated_damping",
    "choose",
    "descend",
    "fitted_target",
    "forgetting_noise",
    "gap_target",
    "held_direction",
    "holdout_target",
    "kl_loss",
    "krylov_subspace",
    "left_out_loss",
    "match_strength",
    "newton_loss",
    "noise_kl",
    "npo_loss",
    "removal_direction",
    "retain_loss",
    "rmu_loss",
    "sgd_walk",
    "simnpo_loss",
    "sophia_walk",
    "sweep",
    "with_retain",
]
