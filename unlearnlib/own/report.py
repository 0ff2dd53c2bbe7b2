"""The report on an unlearned model: what is measured, and how it is shown.

A report is plain JSON values. It holds numbers about the user's texts and none of the texts themselves.
"""

import math
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from unlearnlib.measures import exposure, extraction, relearning
from unlearnlib.measures.evaluation import auc_error, membership, membership_auc, read
from unlearnlib.measures.power import rank_test
from unlearnlib.own.targets import beyond_difficulty
from unlearnlib.own.texts import Material

PROBE_STEPS = 30
PROBED = 64
"""Extraction and the relearning probe use so many forget sequences at most."""
CANDIDATES = 511
"""Random texts of a secret's format among which it is ranked: with itself 512, nine bits at most."""

NAMES = {"damping": "λ", "retain_weight": "retain weight", "learning_rate": "learning rate", "alpha": "α"}
"""The knobs, as the report calls them."""

HEADINGS = {
    "forget_loss": "loss on forget (nats)",
    "validation_loss": "loss on retain, validation part (nats)",
    "holdout_loss": "loss on holdout (nats)",
    "validation_accuracy": "next-token accuracy on retain, validation part",
    "holdout_accuracy": "next-token accuracy on holdout",
    "membership_auc": "membership, AUC of loss",
    "membership_auc_min_k": "membership, AUC of Min-K%",
    "membership_auc_paired": "membership, AUC of loss for its text",
    "memorisation_accuracy": "memorisation accuracy on forget",
    "extraction_el10": "extraction likelihood EL₁₀ of forget",
    "relearned_fall": "fall when relearning (nats)",
}


def measure(model: PreTrainedModel, material: Material, learning_rate: float) -> dict[str, Any]:
    """All that the report says of one model: metric to value, None where the evidence for it is missing.

    Losses in nats a token. With it come the lists ``forget_losses`` and ``holdout_losses`` (by sequence),
    ``exposure_bits`` (by secret) and ``relearning`` (the curve of the probe, None if there is but one sequence to
    forget, or if it diverges).

    Raises FloatingPointError if a loss is not finite.
    """
    missing = ("membership_auc_error", "membership_p_paired", "holdout_losses")
    values: dict[str, Any] = dict.fromkeys([*HEADINGS, *missing])
    sequences = {"forget": material.forget, "validation": material.validation, "holdout": material.holdout}
    readings = {split: read(model, rows) for split, rows in sequences.items() if rows is not None}
    for split, reading in readings.items():
        accuracy = "memorisation_accuracy" if split == "forget" else f"{split}_accuracy"
        values |= {f"{split}_loss": reading.loss, accuracy: reading.accuracy}
        if not math.isfinite(reading.loss):
            raise FloatingPointError(
                f"the {HEADINGS[f'{split}_loss']} is not finite: the weights are damaged, or too large for their "
                "format"
            )
    forget, few = readings["forget"], material.forget[:PROBED]
    if "holdout" in readings:
        values |= membership(forget, readings["holdout"])
        number, others = len(forget.losses), len(readings["holdout"].losses)
        values["membership_auc_error"] = auc_error(values["membership_auc"], number, others)
        values["holdout_losses"] = readings["holdout"].losses.double().mean(dim=1).tolist()
    if few.shape[1] >= 18:
        values["extraction_el10"] = extraction.extraction_likelihood(model, few)
    halves = few[::2], few[1::2]
    curve = relearning.relearning_curve(model, *halves, PROBE_STEPS, learning_rate) if len(few) > 1 else [math.nan]
    values["relearning"] = curve if all(map(math.isfinite, curve)) else None
    if values["relearning"]:
        values["relearned_fall"] = relearning.fall(curve)
    values["forget_losses"] = forget.losses.double().mean(dim=1).tolist()
    values["exposure_bits"] = [_exposure(model, material, *secret) for secret in material.secrets]
    return values


def pair(values: dict[str, Any], difficulty: dict[str, Tensor], reference: dict[str, Any] | None) -> None:
    """Add to the ``values`` of a model the attack that compares every text with what is to be expected of it.

    That is the reference's loss, or without one what the text's difficulty says: the attack of those who want to
    know about a few texts. Scores of few sequences differ less by chance when what makes texts differ is taken
    off. ``membership_p_paired`` is the probability of such an area by chance.
    """
    losses = {name: torch.tensor(values[f"{name}_losses"]) for name in ("forget", "holdout")}
    if reference is None:
        excess = beyond_difficulty(losses, difficulty)
    else:
        excess = {name: losses[name] - torch.tensor(reference[f"{name}_losses"]) for name in losses}
    values["membership_auc_paired"] = membership_auc(-excess["forget"], -excess["holdout"])
    values["membership_p_paired"] = rank_test(-excess["forget"], -excess["holdout"])


def _exposure(model: PreTrainedModel, material: Material, before: str, stuck: str, secret: str) -> float | None:
    try:
        others = [stuck + text for text in exposure.candidates(secret, CANDIDATES, seed=0)]
        return exposure.exposure(model, material.tokenizer, before, stuck + secret, others)
    except (
        ValueError
    ):  # too few texts of its format, too long for the context, or one token with what is before it
        return None


def as_markdown(report: dict[str, Any]) -> str:
    """The report for people."""
    asked, result, cost = report["request"], report["result"], report["cost"]
    names = list(report["measures"])
    lines = ["# Unlearning report", "", f"Model: {asked['model']}. Method: {asked['method']}.", ""]
    lines += ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for metric, heading in HEADINGS.items():
        cells = [number_text(report["measures"][name][metric]) for name in names]
        lines.append(f"| {heading} | " + " | ".join(cells) + " |")
    for i in range(len(report["measures"]["after"]["exposure_bits"])):
        cells = [number_text(report["measures"][name]["exposure_bits"][i]) for name in names]
        lines.append(f"| exposure of secret {i + 1} (bits) | " + " | ".join(cells) + " |")
    target = "none" if result["target_loss"] is None else f"{result['target_loss']:.3f} nats"
    if result["target_error"] is not None:
        target += f" ± {result['target_error']:.3f}"
    if result["target_from"] is not None:
        target += f" ({result['target_from']})"
    setting = "".join(f", {NAMES[name]} = {value:g}" for name, value in result["setting"].items())
    peak, estimate = cost["peak_bytes"] / 2**30, cost["estimated_bytes"] / 2**30
    processes = f", of the first of {cost['processes']} processes" if cost["processes"] > 1 else ""
    lines += [
        "",
        f"Strength: {result['strength']:g} ({result['unit']}){setting}. Target: {target}, "
        f"{'reached' if result['reached'] else 'not reached'}. Weights written in {result['dtype']}.",
        f"Divergence from the model before, on retained texts: {result['kl_validation']:.4f} nats a token.",
        f"Cost: {cost['seconds']:.1f} s, {cost['plain_passes']:.0f} plain passes, "
        f"{peak:.2f} GiB at the peak ({estimate:.2f} GiB estimated){processes}.",
        "",
        *_sets_text(report["sets"]),
        *_power_text(result),
        "## Warnings",
        "",
        *(f"- {warning}" for warning in report["warnings"] or ["none"]),
        "",
        "## Texts",
        "",
        *(f"- {note}" for note in report["notes"]),
        "",
        "These are estimates and no guarantee. They speak of this model folder only, and not of back-ups, caches, "
        "the training data or models made from this one.",
    ]
    return "\n".join(lines) + "\n"


def _sets_text(sets: list[dict[str, Any]]) -> list[str]:
    """A line for each set, where there are several."""
    if len(sets) < 2:
        return []
    lines = ["## Sets", "", "| file | sequences | before (nats) | after | target |", "|---|---|---|---|---|"]
    for one in sets:
        cells = [number_text(one[name]) for name in ("before", "after", "target")]
        lines.append(f"| {one['name']} | {one['sequences']} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _power_text(result: dict[str, Any]) -> list[str]:
    """What the attacks could have noticed."""
    if result["power"] is None:
        return []
    smallest = result["power"]["detectable_auc"]
    noticed = "no AUC is" if smallest is None else f"an AUC of {smallest:.2f} or more is"
    return [
        f"With so many sequences {noticed} noticed at least four times in five, and one of 0.70 with a "
        f"probability of {result['power']['power_at_0.7']:.2f}, at a level of 5 % and if they are independent.",
        "",
    ]


def number_text(value: float | None) -> str:
    """A measure to three digits, a dash where there is none."""
    return "–" if value is None else f"{value:.3f}"
