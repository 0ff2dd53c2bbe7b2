"""The report on an unlearned model: what is measured, and where that is too little to rely on.

A report is plain JSON values. It holds numbers about the user's texts and none of the texts themselves.
"""

import math
import threading
import time
from typing import Any

import psutil
import torch
from transformers import PreTrainedModel

from unlearnlib import exposure, extraction, measures, relearning
from unlearnlib.matching import TOLERANCE
from unlearnlib.own_texts import Material

PROBE_STEPS = 30
PROBED = 64
"""Extraction and the relearning probe use so many forget sequences at most."""
CANDIDATES = 511
"""Random texts of a secret's format among which it is ranked: with itself 512, nine bits at most."""
LEAK = math.log2(20)
"""Bits of exposure that a secret which was never seen has once in twenty times."""
FEW = 32
"""With fewer forget sequences than this the report warns."""
NOTICEABLE = 0.1
"""Nats of damage, or of relearning, from which on the report warns."""

HEADINGS = {
    "forget_loss": "loss on forget (nats)",
    "retain_loss": "loss on retain (nats)",
    "holdout_loss": "loss on holdout (nats)",
    "retain_accuracy": "next-token accuracy on retain",
    "holdout_accuracy": "next-token accuracy on holdout",
    "membership_auc": "membership, AUC of loss",
    "membership_auc_min_k": "membership, AUC of Min-K%",
    "memorisation_accuracy": "memorisation accuracy on forget",
    "extraction_el10": "extraction likelihood EL₁₀ of forget",
    "relearned_fall": "fall when relearning (nats)",
}


def measure(model: PreTrainedModel, material: Material, learning_rate: float) -> dict[str, Any]:
    """All that the report says of one model: metric to value, None where the evidence for it is missing.

    Losses in nats a token. What is called retain are the validation sequences. With it come the lists
    ``forget_losses`` (by sequence), ``exposure_bits`` (by secret) and ``relearning`` (the curve of the probe).
    """
    forget = measures.batched(measures.token_losses, model, material.forget)
    few, holdout = material.forget[:PROBED], material.holdout
    values: dict[str, Any] = {
        "forget_loss": forget.double().mean().item(),
        "retain_loss": measures.mean_loss(model, material.validation),
        "holdout_loss": None,
        "retain_accuracy": measures.token_accuracy(model, material.validation),
        "holdout_accuracy": None,
        "membership_auc": None,
        "membership_auc_error": None,
        "membership_auc_min_k": None,
        "memorisation_accuracy": measures.token_accuracy(model, material.forget),
        "extraction_el10": extraction.extraction_likelihood(model, few) if few.shape[1] >= 18 else None,
        "relearned_fall": None,
    }
    if holdout is not None:
        losses = measures.batched(measures.token_losses, model, holdout)
        auc = measures.membership_auc(-forget.mean(dim=1), -losses.mean(dim=1))
        scores = measures.min_k_scores(forget), measures.min_k_scores(losses)
        values |= {
            "holdout_loss": losses.double().mean().item(),
            "holdout_accuracy": measures.token_accuracy(model, holdout),
            "membership_auc": auc,
            "membership_auc_error": auc_error(auc, len(forget), len(losses)),
            "membership_auc_min_k": measures.membership_auc(*scores),
        }
    values["relearning"] = None
    if len(few) > 1:
        values["relearning"] = relearning.relearning_curve(model, few, PROBE_STEPS, learning_rate)
        values["relearned_fall"] = relearning.fall(values["relearning"])
    values["forget_losses"] = forget.double().mean(dim=1).tolist()
    values["exposure_bits"] = [_exposure(model, material, *secret) for secret in material.secrets]
    return values


def auc_error(auc: float, members: int, others: int) -> float:
    """Standard error of an area under the ROC curve for independent scores (Hanley & McNeil 1982)."""
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = auc * (1 - auc) + (members - 1) * (q1 - auc**2) + (others - 1) * (q2 - auc**2)
    return math.sqrt(max(variance, 0.0) / (members * others))


def _exposure(model: PreTrainedModel, material: Material, before: str, stuck: str, secret: str) -> float | None:
    try:
        texts = [stuck + text for text in (secret, *exposure.candidates(secret, CANDIDATES, seed=0))]
        losses = exposure.text_losses(model, material.tokenizer, before, texts)
        return exposure.exposure_bits(losses[0].item(), losses[1:])
    except (
        ValueError
    ):  # too few texts of its format, too long for the context, or one token with what is before it
        return None


def warnings_of(report: dict[str, Any]) -> list[str]:
    """Where the evidence in a report is thin, or bad: a sentence each."""
    before, after = report["measures"]["before"], report["measures"]["after"]
    reference, result = report["measures"].get("reference"), report["result"]
    found = []
    if result["strength"] == 0:
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
        found += _membership_warnings(before, after, reference)
    damage = after["retain_loss"] - before["retain_loss"]
    if damage > NOTICEABLE:
        found.append(f"the loss on what should stay rose by {damage:.2f} nats")
    if after["relearned_fall"] is not None:
        amount = after["relearned_fall"] - (reference["relearned_fall"] if reference else 0.0)
        meaning = "without a reference it cannot be said how much of that was hidden and not erased"
        if reference:
            meaning = "more than in the reference: part of the texts was hidden and not erased"
        if amount > NOTICEABLE:
            found.append(
                "after training on half of the texts the loss on the other half falls by "
                f"{amount:.2f} nats, {meaning}"
            )
    for i, bits in enumerate(after["exposure_bits"], 1):
        was, never = before["exposure_bits"][i - 1], reference and reference["exposure_bits"][i - 1]
        if bits is None:
            found.append(
                f"the exposure of secret {i} could not be measured: too short, too long, or within a word"
            )
        elif was < LEAK:
            found.append(f"secret {i} did not stand out before ({was:.1f} bits): its exposure shows no forgetting")
        elif bits >= LEAK and (never is None or bits > never):
            found.append(f"secret {i} still stands out, with {bits:.1f} bits of exposure")
    return found


def _membership_warnings(
    before: dict[str, Any], after: dict[str, Any], reference: dict[str, Any] | None
) -> list[str]:
    found, margin = [], 1.96 * after["membership_auc_error"]
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
        if auc > goal + margin:
            found.append(f"a membership attack by {attack} still finds the texts: {values}")
        if auc < goal - margin:
            found.append(
                f"the texts are too unlikely now, which gives them away to an attack by {attack}: {values}"
            )
    return found


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
    damping = "" if result["damping"] is None else f", λ = {result['damping']:g}"
    peak, estimate = cost["peak_bytes"] / 2**30, cost["estimated_bytes"] / 2**30
    lines += [
        "",
        f"Strength: {result['strength']:g} ({result['unit']}){damping}. Target: {target}, "
        f"{'reached' if result['reached'] else 'not reached'}. Weights written in {result['dtype']}.",
        f"Divergence from the model before, on retained texts: {result['kl_retain']:.4f} nats a token.",
        f"Cost: {cost['seconds']:.1f} s, {peak:.2f} GiB at the peak ({estimate:.2f} GiB estimated).",
        "",
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


def number_text(value: float | None) -> str:
    """A measure to three digits, a dash where there is none."""
    return "–" if value is None else f"{value:.3f}"


class Meter:
    """Within the block, time in ``seconds`` and the most memory above that at the start, ``peak_bytes``.

    On CUDA that of PyTorch's tensors, else that of the process, looked at twenty times a second.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds, self.peak_bytes = device, 0.0, 0

    def __enter__(self) -> "Meter":
        self._started, self._base = time.perf_counter(), self._used()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._watcher.join()
        self.seconds = time.perf_counter() - self._started
        if self.device.type == "cuda":
            self.peak_bytes = torch.cuda.max_memory_allocated(self.device) - self._base

    def _used(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return psutil.Process().memory_info().rss

    def _watch(self) -> None:
        while True:
            self.peak_bytes = max(self.peak_bytes, self._used() - self._base)
            if self._ended.wait(0.05):
                return
