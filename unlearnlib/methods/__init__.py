"""What is done to a model to make it forget, and how every method is brought to the same forget loss."""

from unlearnlib.methods.first_order import (
    ascent_direction,
    ascent_loss,
    descend,
    gradient_difference_loss,
    kl_retain_loss,
    npo_loss,
    retain_loss,
)
from unlearnlib.methods.fisher_updates import (
    forgetting_noise,
    held_direction,
    noise_kl,
    removal_direction,
    remove_in_steps,
)
from unlearnlib.methods.matching import (
    TOLERANCE,
    Match,
    Walk,
    best_damping,
    match_direction,
    match_steps,
    match_strength,
    sweep_damping,
)

__all__ = [
    "TOLERANCE",
    "Match",
    "Walk",
    "ascent_direction",
    "ascent_loss",
    "best_damping",
    "descend",
    "forgetting_noise",
    "gradient_difference_loss",
    "held_direction",
    "kl_retain_loss",
    "match_direction",
    "match_steps",
    "match_strength",
    "noise_kl",
    "npo_loss",
    "removal_direction",
    "remove_in_steps",
    "retain_loss",
    "sweep_damping",
]
