"""The report on an unlearned model: what is measured, and how it is shown.

A report is plain JSON values. It holds numbers about the user's texts and none of the texts themselves.
"""

import math
import threading
import time
from typing import Any

import psutil
import torch
from transformers import PreTrainedModel

from unlearnlib.losses import batched, mean_loss, token_losses
from unlearnlib.measures import exposure, extraction, relearning
from unlearnlib.measures.evaluation import membership_auc, min_k_scores, token_accuracy
from unlearnlib.own.texts import Material

PROBE_STEPS = 30
PROBED = 64
"""Extraction and the relearning probe use so many forget sequences at most."""
CANDIDATES = 511
"""Random texts of a secret's format among which it is ranked: with itself 512, nine bits at most."""

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
    ``forget_losses`` (by sequence), ``exposure_bits`` (by secret) and ``relearning`` (the curve of the probe, None
    if there is but one sequence to forget, or if the probe diverges).

    Raises FloatingPointError if a loss is not finite.
    """
    forget = batched(token_losses, model, material.forget)
    few, holdout = material.forget[:PROBED], material.holdout
    values: dict[str, Any] = {
        "forget_loss": forget.double().mean().item(),
        "retain_loss": mean_loss(model, material.validation),
        "holdout_loss": None,
        "retain_accuracy": token_accuracy(model, material.validation),
        "holdout_accuracy": None,
        "membership_auc": None,
        "membership_auc_error": None,
        "membership_auc_min_k": None,
        "memorisation_accuracy": token_accuracy(model, material.forget),
        "extraction_el10": extraction.extraction_likelihood(model, few) if few.shape[1] >= 18 else None,
        "relearned_fall": None,
    }
    if holdout is not None:
        losses = batched(token_losses, model, holdout)
        auc = membership_auc(-forget.mean(dim=1), -losses.mean(dim=1))
        scores = min_k_scores(forget), min_k_scores(losses)
        values |= {
            "holdout_loss": losses.double().mean().item(),
            "holdout_accuracy": token_accuracy(model, holdout),
            "membership_auc": auc,
            "membership_auc_error": auc_error(auc, len(forget), len(losses)),
            "membership_auc_min_k": membership_auc(*scores),
        }
    for name in ("forget_loss", "retain_loss", "holdout_loss"):
        if values[name] is not None and not math.isfinite(values[name]):
            raise FloatingPointError(
                f"the {HEADINGS[name]} is not finite: the weights are damaged, or too large for their format"
            )
    curve = relearning.relearning_curve(model, few, PROBE_STEPS, learning_rate) if len(few) > 1 else [math.nan]
    values["relearning"] = curve if all(map(math.isfinite, curve)) else None
    if values["relearning"]:
        values["relearned_fall"] = relearning.fall(curve)
    values["forget_losses"] = forget.double().mean(dim=1).tolist()
    values["exposure_bits"] = [_exposure(model, material, *secret) for secret in material.secrets]
    return values


def auc_error(auc: float, members: int, others: int) -> float:
    """Standard error of an area under the ROC curve for independent scores (Hanley & McNeil 1982).

    Their formula is 0 where all pairs of a member and another are ranked alike, however few there are. The area
    goes into it as if there had been one more pair, ranked by a coin.
    """
    auc = (auc * members * others + 0.5) / (members * others + 1)
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
