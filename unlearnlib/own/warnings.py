"""Where the evidence in a report is thin, or bad: a sentence each."""

import math
from typing import Any

from unlearnlib.methods.matching import TOLERANCE
from unlearnlib.own.report import auc_error

LEAK = math.log2(20)
"""Bits of exposure that a secret which was never seen has once in twenty times."""
FEW = 32
"""With fewer forget sequences than this the report warns."""
NOTICEABLE = 0.1
"""Nats of damage, or of relearning, from which on the report warns."""


def warnings_of(report: dict[str, Any]) -> list[str]:
    """Where the evidence in a report is thin, or bad: a sentence each."""
    before, after = report["measures"]["before"], report["measures"]["after"]
    reference, result = report["measures"].get("reference"), report["result"]
    found = []
    reached_at_once = (
        result["strength"] == 0 and result["loss_before_rounding"] >= result["target_loss"] - TOLERANCE
    )
    if reached_at_once and report["request"]["method"] == "fisher_forgetting":
        found.append(
            "nothing was done but to add noise: with it the loss on the texts to be forgotten, "
            f"{result['loss_before_rounding']:.2f} nats, is at the target or above it already"
        )
    elif reached_at_once:
        found.append(
            "nothing was changed: the model's loss on the texts to be forgotten, "
            f"{before['forget_loss']:.2f} nats, is at the target or above it already"
        )
    elif not result["reached"]:
        found.append(
            f"the target loss of {result['target_loss']:.2f} nats was not reached: the method ended at "
            f"{result['loss_before_rounding']:.2f}. Try another method, or ask for less"
        )
    if abs(after["forget_loss"] - result["loss_before_rounding"]) > TOLERANCE:
        found.append(
            f"writing the weights in {result['dtype']} moved the forget loss from "
            f"{result['loss_before_rounding']:.2f} to {after['forget_loss']:.2f} nats"
        )
    sweep = result["validation_loss_by_damping"]
    if sweep and result["damping"] in (min(sweep), max(sweep)):
        found.append(f"the best λ, {result['damping']:g}, is at an end of the grid that was tried")
    number = len(before["forget_losses"])
    if number < FEW:
        found.append(f"only {number} sequences are to be forgotten: what is measured on them is uncertain")
    if reference is None:
        found.append(
            "there is no retrained reference: how the model would treat these texts had it never seen them is not "
            "known, so neither too little nor too much forgetting can be ruled out"
        )
    elif reference["forget_loss"] <= before["forget_loss"] + TOLERANCE:
        found.append("the reference knows the texts to be forgotten as well as the model: was it trained on them?")
    if after["holdout_loss"] is None:
        found.append("there is no holdout file: membership cannot be judged, nor damage to texts never seen")
    else:
        found += _membership_warnings(report["request"]["sequences"], before, after, reference)
    damage = after["retain_loss"] - before["retain_loss"]
    if damage > NOTICEABLE:
        found.append(f"the loss on what should stay rose by {damage:.2f} nats")
    falls = [values["relearned_fall"] for values in (after, reference) if values]
    if number > 1 and None in falls:
        found.append("the relearning probe diverged and says nothing: take a smaller learning_rate")
    if None not in falls:
        excess = falls[0] - sum(falls[1:])
        meaning = "without a reference it cannot be said how much of that was hidden and not erased"
        if reference:
            meaning = f"{excess:.2f} more than in the reference: part of the texts may be hidden and not erased"
        if excess > NOTICEABLE:
            found.append(
                "after training on half of the texts the loss on the other half falls by "
                f"{falls[0]:.2f} nats, {meaning}"
            )
    for i, bits in enumerate(after["exposure_bits"], 1):
        was, never = before["exposure_bits"][i - 1], reference and reference["exposure_bits"][i - 1]
        if bits is None:
            found.append(
                f"the exposure of secret {i} could not be measured: it is too long, or it begins within a word, "
                "or too few texts have its format, of which only digits and the letters a to z are exchanged"
            )
        elif was < LEAK:
            found.append(f"secret {i} did not stand out before ({was:.1f} bits): its exposure shows no forgetting")
        elif bits >= LEAK and (never is None or bits > never):
            found.append(f"secret {i} still stands out, with {bits:.1f} bits of exposure")
    return found


def _membership_warnings(
    sequences: dict[str, int], before: dict[str, Any], after: dict[str, Any], reference: dict[str, Any] | None
) -> list[str]:
    found, margin, counts = [], 1.96 * after["membership_auc_error"], (sequences["forget"], sequences["holdout"])
    if margin > 0.05:
        found.append(f"with so few sequences the membership AUC is known to ±{margin:.2f} only")
    if before["membership_auc"] - 1.96 * before["membership_auc_error"] <= 0.5:
        found.append(
            "even before, the texts to be forgotten were not told from texts never seen: either the model has "
            "hardly learnt them, or the holdout texts are of another kind"
        )
    for attack, metric in (("loss", "membership_auc"), ("Min-K%", "membership_auc_min_k")):
        auc, goal = after[metric], reference[metric] if reference else 0.5
        values = f"AUC {auc:.2f} and not {goal:.2f}"
        # A difference counts that chance hardly makes at either value: near 0 or 1 an area seems better known. An
        # area moves in steps of one pair, half of which is the correction for continuity.
        error = max(after["membership_auc_error"], auc_error(auc, *counts), auc_error(goal, *counts))
        allowed = 1.96 * error + 0.5 / math.prod(counts)
        if auc > goal + allowed:
            found.append(f"a membership attack by {attack} still finds the texts: {values}")
        if auc < goal - allowed:
            found.append(
                f"the texts are too unlikely now, which gives them away to an attack by {attack}: {values}"
            )
    return found
