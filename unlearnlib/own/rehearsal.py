"""A rehearsal: what a request will do to its models is done once, on two sequences, before anything takes long.

No list says which architectures a method can work on. It is tried, and where it fails the others are tried too.
"""

import copy
import dataclasses
import gc
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from unlearnlib.curvature import kronecker
from unlearnlib.curvature.kronecker_blocks import find_blocks
from unlearnlib.curvature.kronecker_store import FactorStore, settings_of
from unlearnlib.losses import logits
from unlearnlib.measures.relearning import relearning_curve
from unlearnlib.methods.first_order import ascent_direction
from unlearnlib.methods.newton_descent import newton_loss
from unlearnlib.models.loading import load_model
from unlearnlib.own.methods import build_curvature
from unlearnlib.own.request import STRENGTHS, Request
from unlearnlib.own.texts import Material

logger = logging.getLogger(__name__)

TOLERANCE = 1e-4
"""By so much of the largest logit a prediction may depend on rounding."""


def rehearse(request: Request, material: Material, device: torch.device) -> None:
    """Load the models, measure two sequences with each, and try the request's method on them; nothing is written.

    Raises what loading raises, ValueError for a model that cannot be measured on sequences of this length or whose
    predictions see the tokens that they predict, FloatingPointError for damaged weights, and NotImplementedError,
    with the methods that do work, for a method that cannot work on this model.
    """
    two = torch.cat([material.forget[:1], material.retain[:1]])
    for source in filter(None, (request.reference, request.model)):  # the model last: its method is tried, too
        logger.info("rehearsing with %s on two sequences", source)
        model = load_model(source, device=device)
        check_measuring(model, two, source)
        if source == request.model:
            check_method(model, two, request)
            check_factors(model, material.estimation, request)
        del model  # before the next is loaded


def check_measuring(model: PreTrainedModel, two: Tensor, source: str) -> None:
    """Measure and differentiate the model called ``source`` on two sequences [2, tokens]; raises as said above."""
    damaged = [name for name, p in model.named_parameters() if not p.isfinite().all()]
    if damaged:  # a row for a token that no text has would be noticed at the very end only
        raise FloatingPointError(
            f"the weights of {source} are damaged: {damaged[0]} has values that are not finite. If those are of "
            "tokens that are never used, set them to 0"
        )

    def trains(rows: Tensor) -> str:
        """A step of the probe does all that comes: it copies the model, trains the copy and measures that."""
        return _failure(lambda: relearning_curve(model, rows[:1], rows[1:], 1, 0.0))

    failure = trains(two)
    if failure:
        shorter = two[:, : max(2, two.shape[1] // 2)]
        advice = "no other length helps, the architecture cannot be used"
        if shorter.shape[1] < two.shape[1] and not trains(shorter):
            advice = "take a smaller length"
        raise ValueError(f"{source} cannot read sequences of {two.shape[1]} tokens ({failure}): {advice}")
    with torch.no_grad():
        z = logits(model, two)
        if not z.isfinite().all():
            raise FloatingPointError(f"the predictions of {source} are not finite: its weights are damaged")
        changed = two.clone()
        changed[:, -2] = (two[:, -2] + 1) % z.shape[2]  # the last token that is read
        difference = (logits(model, changed) - z)[:, :-1].abs()
    if difference.numel() and difference.max() > TOLERANCE * z.abs().max():
        raise ValueError(
            f"{source} predicts tokens from those that come after them: it is no causal language model, or its "
            "configuration lacks is_decoder"
        )


def check_method(model: PreTrainedModel, two: Tensor, request: Request) -> None:
    """Try the request's method on two sequences; NotImplementedError names those that work where it does not."""
    failure = _failure(lambda: _try(model, two, request, request.method))
    if failure is None:
        return
    others = [name for name in STRENGTHS if name != request.method]
    working = [name for name in others if _failure(lambda name=name: _try(model, two, request, name)) is None]
    advice = f"choose {' or '.join(working)}" if working else "nor can any other method"
    raise NotImplementedError(f"{request.method} cannot work on {request.model} ({failure}): {advice}")


def check_factors(model: PreTrainedModel, sequences: Tensor, request: Request) -> None:
    """Raise ValueError if the request's folder of factors has something else, or OSError if it cannot be used.

    So it is if a file of factors there is damaged, or if no file can be made there.
    """
    if request.factors is None:
        return
    folder = Path(request.factors)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"no factors can be kept at {folder} ({error}): name another folder") from error
    if any(folder.iterdir()):
        store = FactorStore(folder, settings_of(model, sequences, request.seed, request.method == "ekfac"))
        blocks = find_blocks(model)
        for block, there in zip(blocks, store.there(blocks), strict=True):
            if there:
                store.get(block)


def _try(model: PreTrainedModel, two: Tensor, request: Request, method: str) -> None:
    """What a method does to a model, without what takes long, eigendecompositions, and without any change."""
    if method == "gradient_difference":
        return  # nothing but what measuring does, too
    delta = ascent_direction(model, two)
    if method in ("fisher_diagonal", "fisher_dual"):
        build_curvature(model, two, dataclasses.replace(request, method=method, factors=None), delta).solve(
            delta, 1.0
        )
    elif method == "newton":
        newton_loss(copy.deepcopy(model), delta, 1.0)(model, two, two)
    elif method != "gradient_ascent":
        kronecker.layer_factors(model, two)
        if method == "ekfac":
            kronecker.diagonal_fisher(model, two)


def _failure(attempt: Callable[[], None]) -> str | None:
    """Why an attempt fails, in a line, or None if it does not."""
    try:
        attempt()
    except Exception as error:  # an architecture that does not fit can raise anything
        reason = (str(error).strip() or type(error).__name__).split("\n")[0][:300]
        if isinstance(error, NotImplementedError):  # the library's own, with advice for those who write programs
            reason = reason.partition(": ")[0]
    else:
        return None
    gc.collect()  # the memory of the attempt
    return reason
