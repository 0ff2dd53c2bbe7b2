"""Which forget loss to aim at when nobody has retrained: estimates of the retrained model's, with their errors.

All are of L(θ*; D⁻), the mean loss in nats that a model trained on D⁺ alone has on the forget sequences. What they
have in common is that a text which was left out looks like one that was never there: its loss is that of holdout
texts, but for a difference in difficulty. They differ in how they judge that difference.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Target:
    """The retrained model's forget loss or an estimate of it, and then its standard error, both in nats.

    The error is of sampling only: as if all sequences were independent. Of what a retraining from other initial
    weights would change, or of the data that the retrained model has less, it says nothing.
    """

    loss: float
    error: float | None = None


def holdout_target(holdout: Tensor, number: int) -> Target:
    """The mean of the model's ``holdout`` losses [m], for ``number`` forget sequences of the same difficulty.

    The error is that of the difference of two means, s √(1/n₋ + 1/m). Raises ValueError as :func:`fitted_target`.
    """
    flat = torch.zeros(number + len(holdout))
    return fitted_target(holdout, flat[:number], flat[number:])


def gap_target(forget: Tensor, retain: Tensor, holdout: Tensor) -> Target:
    """L(D⁻) + [L(holdout) − L(D⁺)], from the model's losses [n₋], [n₊] and [m]: what it knows by heart, added.

    It supposes that what a text gains from having been read is the same for all, and takes its difficulty from
    the loss that is left. The error is that of the gap, √(s_H²/m + s_R²/n₊): of n₋ it has no part, since how much
    the gain differs from text to text cannot be seen without a retrained model.
    Raises ValueError for no forget loss, or fewer than two retain or holdout losses.
    """
    if len(forget) < 1:
        raise ValueError("there are 0 forget losses: a gap is added to the mean of at least one")
    if min(len(retain), len(holdout)) < 2:
        raise ValueError("fewer than two losses have no spread: give more texts to keep and more unseen ones")
    variance = sum(losses.double().var() / len(losses) for losses in (retain, holdout))
    loss = sum(sign * losses.double().mean() for sign, losses in ((1, forget), (1, holdout), (-1, retain)))
    return Target(loss.item(), math.sqrt(variance))


def fitted_target(holdout: Tensor, forget_difficulty: Tensor, holdout_difficulty: Tensor) -> Target:
    """The line fitted to ``holdout`` losses [m] over their difficulty [m], at the mean ``forget_difficulty`` [n₋].

    The regression estimator of survey sampling (Cochran 1977, ch. 7). A difficulty is whatever says, without
    having read either set, how hard a text is: the loss of another model, in nats. It need not be a good model.
    If it says nothing, as where all difficulties are equal, this is the mean holdout loss. The error is that of
    the mean of n₋ new values on the line, s √(1/n₋ + 1/m + (x̄₋ − x̄)²/Σ(x − x̄)²), with s the spread around it.
    Raises ValueError for fewer than three holdout sequences, no forget sequence, or shapes that do not fit.
    """
    y, x, new = holdout.double(), holdout_difficulty.double(), forget_difficulty.double()
    if len(new) == 0 or len(y) < 3 or x.shape != y.shape:
        raise ValueError(
            f"{len(y)} holdout losses with {len(x)} difficulties, and {len(new)} difficulties of texts to forget: "
            "a line needs three of the first, as many of the second, and one of the third"
        )
    spread, away = (x - x.mean()).square().sum(), new.mean() - x.mean()
    varies = x.max() > x.min()  # a mean of equal values is rounded, and their spread need not be 0
    slope = ((x - x.mean()) * (y - y.mean())).sum() / spread if varies else torch.zeros(())
    left = y - y.mean() - slope * (x - x.mean())
    variance = left.square().sum() / (len(y) - (2 if varies else 1))
    factor = 1 / len(new) + 1 / len(y) + (away.square() / spread if varies else 0)
    return Target((y.mean() + slope * away).item(), math.sqrt(variance * factor))


def left_out_loss(loss: float, gain: float, share: float) -> float:
    """L(θ; D⁻) + share · Δᵀ(C + λI)⁻¹v, in nats: the loss after Newton's step, to first order.

    ``gain`` is the product and v the direction's gradient. For v = Δ the ``share`` is n₋/n₊, if θ is a minimum of
    the loss on all of D; for v = Δ − g, with g the gradient of what stays, it is n₋/n, and θ need not be one.
    This is an influence function (Koh & Liang 2017) with the curvature of what stays.
    """
    return loss + share * gain


def calibrated_damping(dampings: Tensor, predicted: Tensor, gap: float) -> float:
    """The λ at which the ``predicted`` rise [λs] of texts that stay, were they left out, is the observed ``gap``.

    ``dampings`` [λs] ascend, and between them log λ is linear in the log of the rise. λ stands for all that ends a
    training early; it is set where the answer is known: kept texts, left out, should look like holdout texts.
    Raises ValueError if the gap is not positive, or outside of what is predicted.
    """
    x, y = dampings.double().log(), predicted.double().log()
    if not (gap > 0 and y.min() <= math.log(gap) <= y.max()):
        raise ValueError(
            f"the predicted rises {[f'{value:.3g}' for value in predicted.tolist()]} do not span the gap of "
            f"{gap:.3g} nats between holdout and kept texts: widen the grid of λ"
        )
    i = int(((y[:-1] - math.log(gap)) * (y[1:] - math.log(gap)) <= 0).nonzero()[0])
    part = (math.log(gap) - y[i]) / (y[i + 1] - y[i]) if y[i + 1] != y[i] else torch.zeros(())
    return math.exp(x[i] + part * (x[i + 1] - x[i]))
