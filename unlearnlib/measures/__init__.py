"""What is measured on a model: losses, divergence, membership, extraction, exposure, relearning, rounding."""

from unlearnlib.losses import (
    batched,
    counted_passes,
    log_probabilities,
    logits,
    mean_loss,
    sequence_losses,
    token_losses,
)
from unlearnlib.measures.attacks import (
    calibrated,
    lira,
    normal_auc,
    normal_rate,
    rate_chance,
    rate_interval,
    true_positive_rate,
)
from unlearnlib.measures.evaluation import (
    Reading,
    auc_error,
    loss_correlation,
    mean_kl,
    membership,
    membership_auc,
    min_k_scores,
    read,
)
from unlearnlib.measures.exposure import (
    candidates,
    expected_exposure,
    exposure_bits,
    largest_exposure,
    text_losses,
)
from unlearnlib.measures.extraction import continuations, extraction_likelihood, verbatim_length
from unlearnlib.measures.power import attack_power, detectable_auc, rank_test
from unlearnlib.measures.prompts import second_half_losses, tampered
from unlearnlib.measures.relearning import fall, net_fall, probe, relearning_curve
from unlearnlib.measures.rounding import rounded

__all__ = [
    "Reading",
    "attack_power",
    "auc_error",
    "batched",
    "calibrated",
    "candidates",
    "continuations",
    "counted_passes",
    "detectable_auc",
    "expected_exposure",
    "exposure_bits",
    "extraction_likelihood",
    "fall",
    "largest_exposure",
    "lira",
    "log_probabilities",
    "logits",
    "loss_correlation",
    "mean_kl",
    "mean_loss",
    "membership",
    "membership_auc",
    "min_k_scores",
    "net_fall",
    "normal_auc",
    "normal_rate",
    "probe",
    "rank_test",
    "rate_chance",
    "rate_interval",
    "read",
    "relearning_curve",
    "rounded",
    "second_half_losses",
    "sequence_losses",
    "tampered",
    "text_losses",
    "token_losses",
    "true_positive_rate",
    "verbatim_length",
]
