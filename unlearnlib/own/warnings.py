"""Where the evidence in a report is thin, or bad: a table of rules, each of which may have something to say."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from unlearnlib.measures.evaluation import auc_error
from unlearnlib.methods.matching import TOLERANCE

FEW_STEPS = 5
"""With fewer steps of a descent than this the report warns."""
LEAK = math.log2(20)
"""Bits of exposure that a secret which was never seen has once in twenty times."""
FEW = 32
"""With fewer forget sequences than this the report warns."""
NOTICEABLE = 0.1
"""Nats of damage, or of relearning, from which on the report warns."""
DOUBT = 1.96
"""Standard errors within which chance may explain a difference."""
LEVEL = 0.05
"""Below this probability the report does not take the attack text by text for chance."""
NOTICED = 0.6
"""The AUC of a membership attack that should be noticed."""


@dataclass(frozen=True)
class Evidence:
    """The parts of a report that the rules look at; losses are in nats. A rule takes it and yields sentences."""

    method: str
    sequences: dict[str, int]
    sets: list[dict[str, Any]]
    result: dict[str, Any]
    before: dict[str, Any]
    after: dict[str, Any]
    reference: dict[str, Any] | None

    @property
    def at_target(self) -> bool:
        """Whether the method was not needed to reach the target."""
        result = self.result
        return result["strength"] == 0 and result["loss_before_rounding"] >= result["target_loss"] - TOLERANCE

    @property
    def falls(self) -> list[float | None]:
        """The falls when relearning, after and of the reference, if there is one."""
        return [values["relearned_fall"] for values in (self.after, self.reference) if values]


def evidence_of(report: dict[str, Any]) -> Evidence:
    """What a report holds for the rules."""
    asked, measured = report["request"], report["measures"]
    models = (measured.get(name) for name in ("before", "after", "reference"))
    return Evidence(asked["method"], asked["sequences"], report["sets"], report["result"], *models)


def warnings_of(report: dict[str, Any]) -> list[str]:
    """What the rules have to say of a report, in their order: a sentence each."""
    evidence = evidence_of(report)
    return [sentence for rule in RULES for sentence in rule(evidence)]


def nothing_but_noise(e: Evidence) -> Iterator[str]:
    """Fisher Forgetting's noise alone reached the target."""
    if e.at_target and e.method == "fisher_forgetting":
        yield (
            "nothing was done but to add noise: with it the loss on the texts to be forgotten, "
            f"{e.result['loss_before_rounding']:.2f} nats, is at the target or above it already"
        )


def nothing_changed(e: Evidence) -> Iterator[str]:
    """The model was at the target before anything was done."""
    if e.at_target and e.method != "fisher_forgetting":
        yield (
            "nothing was changed: the model's loss on the texts to be forgotten, "
            f"{e.before['forget_loss']:.2f} nats, is at the target or above it already"
        )


def target_not_reached(e: Evidence) -> Iterator[str]:
    """The search for the strength ended short of the target."""
    if not (e.result["reached"] or e.at_target):
        theory = ""
        if e.method == "newton":
            theory = f"; with theory's strength α = {e.result['setting']['alpha']:.3g} it may lead no further"
        yield (
            f"the target loss of {e.result['target_loss']:.2f} nats was not reached: the method ended at "
            f"{e.result['loss_before_rounding']:.2f}{theory}. Try another method, or ask for less"
        )


def hasty_descent(e: Evidence) -> Iterator[str]:
    """Newton's descent took so few steps that the texts to keep had no say in where it went."""
    if e.method == "newton" and 0 < e.result["strength"] < FEW_STEPS:
        yield (
            f"newton took {e.result['strength']:.2g} steps, and the first steps of Adam hardly know of the texts "
            f"to keep: give a learning rate well below {e.result['setting']['learning_rate']:.2g}"
        )


def little_is_kept(e: Evidence) -> Iterator[str]:
    """Newton takes the texts to keep for all that the model was trained on besides, and they are few."""
    if e.method == "newton" and e.result["setting"]["alpha"] >= 1:
        yield (
            f"there is as much to forget as to keep, or more (α = {e.result['setting']['alpha']:.2g}): newton "
            "takes the texts to keep for all that the model was trained on besides. Give all of them"
        )


def moved_by_rounding(e: Evidence) -> Iterator[str]:
    """The weights as written have another forget loss than those that were found."""
    if abs(e.after["forget_loss"] - e.result["loss_before_rounding"]) > TOLERANCE:
        yield (
            f"writing the weights in {e.result['dtype']} moved the forget loss from "
            f"{e.result['loss_before_rounding']:.2f} to {e.after['forget_loss']:.2f} nats"
        )


def setting_at_an_end(e: Evidence) -> Iterator[str]:
    """A better setting may lie beyond what was tried."""
    for name in e.result["at_edge"]:
        yield f"the best {name.replace('_', ' ')}, {e.result['setting'][name]:g}, is at an end of what was tried"


def target_estimated(e: Evidence) -> Iterator[str]:
    """The target is not known better than the way that is left to go."""
    error, way = e.result["target_error"], (e.result["target_loss"] or 0.0) - e.before["forget_loss"]
    if error is not None and not e.at_target and DOUBT * error > way / 2:
        yield (
            f"the target, {way:.2f} nats above where the model was, is an estimate with a standard error of "
            f"{error:.2f}: how much there was to forget is hardly known. Give more holdout texts, or a reference"
        )


def target_unlike_estimate(e: Evidence) -> Iterator[str]:
    """A target that was given, or is a reference's, is not what the holdout texts suggest."""
    estimate, target = e.result["estimated_target"], e.result["target_loss"]
    if estimate is None or target is None or e.result["target_from"] == "estimate":
        return
    off = target - estimate["loss"]
    if abs(off) > NOTICEABLE + DOUBT * estimate["error"]:
        yield (
            f"the target is {abs(off):.2f} nats {'above' if off > 0 else 'below'} what the holdout texts "
            f"suggest, {estimate['loss']:.2f} give or take {estimate['error']:.2f}: either they are of another "
            "kind, or the target is wrong"
        )


def set_apart(e: Evidence) -> Iterator[str]:
    """Of several sets together at their target, one is not at its own."""
    for one in e.sets if len(e.sets) > 1 else []:
        if one["target"] is None:
            continue
        off = one["after"] - one["target"]
        side = "above" if off > 0 else "below"
        if abs(off) > NOTICEABLE + DOUBT * (one["target_error"] or 0.0):
            yield (
                f"the texts of {one['name']} ended {abs(off):.2f} nats {side} their own target: the sets together "
                "are at theirs, this one is not"
            )


def not_at_a_minimum(e: Evidence) -> Iterator[str]:
    """To first order the step goes up the loss on what stays, which it would not from a minimum."""
    slope = e.result["slope"]
    if slope is not None and e.method != "kfac:difference" and slope > NOTICEABLE:
        yield (
            f"of the damage to what stays, {slope:.2f} nats are of first order: the model was not at a minimum of "
            "that loss. The method kfac:difference allows for it"
        )


def few_sequences(e: Evidence) -> Iterator[str]:
    """Little can be measured on few sequences."""
    number = len(e.before["forget_losses"])
    if number < FEW:
        yield f"only {number} sequences are to be forgotten: what is measured on them is uncertain"


def no_reference(e: Evidence) -> Iterator[str]:
    """Nothing says what forgetting would look like."""
    if e.reference is None:
        yield (
            "there is no retrained reference: how the model would treat these texts had it never seen them is not "
            "known, so neither too little nor too much forgetting can be ruled out"
        )


def reference_knows_the_texts(e: Evidence) -> Iterator[str]:
    """The reference does not look as if it had been trained without the texts."""
    if e.reference and e.reference["forget_loss"] <= e.before["forget_loss"] + TOLERANCE:
        yield "the reference knows the texts to be forgotten as well as the model: was it trained on them?"


def no_holdout(e: Evidence) -> Iterator[str]:
    """Nothing was given to compare the texts with."""
    if e.after["holdout_loss"] is None:
        yield "there is no holdout file: membership cannot be judged, nor damage to texts never seen"


def membership_uncertain(e: Evidence) -> Iterator[str]:
    """An attack that works could well have gone unnoticed."""
    power = e.result["power"]
    if power is None:
        return
    smallest = power["detectable_auc"]
    if smallest is None:
        yield "with so few sequences no membership attack could have been noticed: that none was says nothing"
    elif smallest > NOTICED:
        yield (
            f"with so few sequences a membership attack with an AUC below {smallest:.2f} is noticed less often "
            "than four times in five: that none was found says little"
        )


def never_told_apart(e: Evidence) -> Iterator[str]:
    """There was no membership to be forgotten, as far as the holdout texts can tell."""
    auc, error = e.before["membership_auc"], e.before["membership_auc_error"]
    if e.after["holdout_loss"] is not None and auc - DOUBT * error <= 0.5:
        yield (
            "even before, the texts to be forgotten were not told from texts never seen: either the model has "
            "hardly learnt them, or the holdout texts are of another kind"
        )


def attack_tells_the_texts(e: Evidence) -> Iterator[str]:
    """An attack tells the texts by a loss that is too low or too high, and not by chance."""
    if e.after["holdout_loss"] is None:
        return
    counts = (e.sequences["forget"], e.sequences["holdout"])
    for attack, metric in (("loss", "membership_auc"), ("Min-K%", "membership_auc_min_k")):
        auc, goal = e.after[metric], e.reference[metric] if e.reference else 0.5
        values = f"AUC {auc:.2f} and not {goal:.2f}"
        # A difference counts that chance hardly makes at either value: near 0 or 1 an area seems better known. An
        # area moves in steps of one pair, half of which is the correction for continuity.
        error = max(e.after["membership_auc_error"], auc_error(auc, *counts), auc_error(goal, *counts))
        allowed = DOUBT * error + 0.5 / math.prod(counts)
        if auc > goal + allowed:
            yield f"a membership attack by {attack} still finds the texts: {values}"
        if auc < goal - allowed:
            yield f"the texts are too unlikely now, which gives them away to an attack by {attack}: {values}"
    paired = e.after["membership_auc_paired"]
    if paired is not None and e.after["membership_p_paired"] <= LEVEL:
        what = "the reference's loss" if e.reference else "what its difficulty lets one expect"
        side = "finds the texts" if paired > 0.5 else "finds the texts by too high losses"
        yield (
            f"an attack that compares each text's loss with {what} {side}: AUC {paired:.2f}, by chance "
            f"{e.after['membership_p_paired']:.1%}"
        )


def damage(e: Evidence) -> Iterator[str]:
    """What should stay was harmed."""
    rise = e.after["validation_loss"] - e.before["validation_loss"]
    if rise > NOTICEABLE:
        yield f"the loss on what should stay rose by {rise:.2f} nats"


def probe_diverged(e: Evidence) -> Iterator[str]:
    """The relearning probe has no value."""
    if len(e.before["forget_losses"]) > 1 and None in e.falls:  # with one sequence there is no probe
        yield "the relearning probe diverged and says nothing: take a smaller learning_rate"


def hidden(e: Evidence) -> Iterator[str]:
    """What was forgotten comes back with training on its neighbours."""
    if None in e.falls:
        return
    fall, excess = e.falls[0], e.falls[0] - sum(e.falls[1:])
    meaning = "without a reference it cannot be said how much of that was hidden and not erased"
    if e.reference:
        meaning = f"{excess:.2f} more than in the reference: part of the texts may be hidden and not erased"
    if excess > NOTICEABLE:
        yield (
            f"after training on half of the texts the loss on the other half falls by {fall:.2f} nats, {meaning}"
        )


def exposed(e: Evidence) -> Iterator[str]:
    """The exposure of a secret cannot be told, tells nothing, or tells that it is still there."""
    for i, bits in enumerate(e.after["exposure_bits"], 1):
        was, never = e.before["exposure_bits"][i - 1], e.reference and e.reference["exposure_bits"][i - 1]
        if bits is None:
            yield (
                f"the exposure of secret {i} could not be measured: it is too long, or it begins within a word, "
                "or too few texts have its format, of which only digits and the letters a to z are exchanged"
            )
        elif was < LEAK:
            yield f"secret {i} did not stand out before ({was:.1f} bits): its exposure shows no forgetting"
        elif bits >= LEAK and (never is None or bits > never):
            yield f"secret {i} still stands out, with {bits:.1f} bits of exposure"


RULES = (
    nothing_but_noise,
    nothing_changed,
    target_not_reached,
    hasty_descent,
    little_is_kept,
    moved_by_rounding,
    setting_at_an_end,
    target_estimated,
    target_unlike_estimate,
    set_apart,
    not_at_a_minimum,
    few_sequences,
    no_reference,
    reference_knows_the_texts,
    no_holdout,
    membership_uncertain,
    never_told_apart,
    attack_tells_the_texts,
    damage,
    probe_diverged,
    hidden,
    exposed,
)
