"""What is done to a model to make it forget, and how every method is brought to the same forget loss."""

from unlearnlib.methods.first_order import (
    adam_walk,
    ascent_direction,
    ascent_loss,
    descend,
    gradient_difference_loss,
    kl_retain_loss,
    npo_loss,
    retain_loss,
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
    best_setting,
    match_strength,
    sweep,
)
from unlearnlib.methods.sophia import Sophia, bartlett_diagonal, sophia_walk
from unlearnlib.methods.tuning import Choice, choose

__all__ = [
    "TOLERANCE",
    "Choice",
    "Line",
    "Match",
    "Path",
    "RemovalInSteps",
    "Sophia",
    "Walk",
    "adam_walk",
    "ascent_direction",
    "ascent_loss",
    "bartlett_diagonal",
    "best_setting",
    "choose",
    "descend",
    "forgetting_noise",
    "gradient_difference_loss",
    "held_direction",
    "kl_retain_loss",
    "match_strength",
    "noise_kl",
    "npo_loss",
    "removal_direction",
    "retain_loss",
    "sophia_walk",
    "sweep",
]
