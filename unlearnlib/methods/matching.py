"""Matched forgetting: bring every method to the same forget loss, and only then compare what it broke."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pandas as pd
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from unlearnlib.losses import mean_loss
from unlearnlib.weights import Vector, difference, norm, set_weights, snapshot

TOLERANCE = 0.01
"""How far, in nats, a matched forget loss may be from its target."""


@dataclass(frozen=True)
class Match:
    """Where the search for the target forget loss ended.

    ``strength`` is in the method's own unit (a step length, or a number of steps, the last one fractional),
    ``loss`` the forget loss there in nats, ``reached`` whether it is within tolerance of the target, and
    ``evaluations`` how many times the forget loss was computed.
    """

    strength: float
    loss: float
    reached: bool
    evaluations: int


def match_strength(
    loss_at: Callable[[float], float],
    target: float,
    start: float,
    tolerance: float = TOLERANCE,
    max_evaluations: int = 60,
) -> Match:
    """Find a strength at which a one-shot method's forget loss equals ``target`` nats, by bisection.

    ``loss_at(strength)`` applies the method afresh at that strength and returns the forget loss; it must be
    continuous, need not be monotone, and may overflow: a loss that is not finite counts as above the target.
    The first bracket is found by doubling or halving ``start``, so where the loss is not monotone a smaller
    strength may do as well. If the target cannot be bracketed the result is the strength that came closest, with
    ``reached`` false. The last strength tried is not always the one returned, so apply the result once more before
    using the model.

    Raises ValueError if ``start`` is not positive or the target not finite.
    """
    if not start > 0 or not math.isfinite(target):
        raise ValueError(f"need a positive start and a finite target, not start={start}, target={target}")
    tried: dict[float, float] = {}
    evaluations = 0

    def below(strength: float) -> bool:
        nonlocal evaluations
        evaluations += 1
        tried[strength] = loss_at(strength)
        return tried[strength] < target

    def done() -> bool:  # where the loss jumps past the target, bisection comes to try the same number again
        return evaluations >= max_evaluations or any(abs(loss - target) <= tolerance for loss in tried.values())

    low, high = 0.0, start
    if below(low):
        if below(start):
            low, high = start, 2 * start
            while not done() and below(high):
                low, high = high, 2 * high
        else:
            while not done() and not below(high / 2):
                high /= 2
            low = high / 2
        while not done():
            middle = (low + high) / 2
            if below(middle):
                low = middle
            else:
                high = middle
    best = min(tried, key=lambda strength: (_distance(tried[strength], target), strength))
    return Match(best, tried[best], _distance(tried[best], target) <= tolerance, evaluations)


def match_direction(
    model: PreTrainedModel, start: Vector, direction: Vector, forget: Tensor, target: float
) -> Match:
    """Put ``model`` at ``start + α direction`` with the α at which its loss on ``forget`` is ``target`` nats.

    The first α tried moves the weights by one per cent of their length. Raises ValueError if the direction is
    zero or not finite.
    """
    length = norm(direction)
    if not (length > 0 and math.isfinite(length)):
        raise ValueError(f"the direction has length {length}: it leads nowhere")

    def loss_at(strength: float) -> float:
        set_weights(model, start, direction, strength)
        return mean_loss(model, forget)

    match = match_strength(loss_at, target, start=0.01 * norm(start) / length)
    set_weights(model, start, direction, match.strength)
    return match


def sweep_damping(
    model: PreTrainedModel,
    start: Vector,
    directions: Iterable[tuple[float, Vector]],
    forget: Tensor,
    validation: Tensor,
    target: float,
) -> pd.DataFrame:
    """Match forgetting along the direction of each λ, and see what it costs on the validation sequences.

    ``directions`` are pairs of λ and direction; ``forget`` is to have the loss ``target`` nats. Returns a row a λ:
    ``damping``, ``validation_loss`` in nats, ``strength`` and ``reached``. The model is left at ``start``.
    """
    rows = []
    for damping, direction in tqdm(directions, "values of λ", leave=False, mininterval=1.0):
        match = match_direction(model, start, direction, forget, target)
        rows.append([damping, mean_loss(model, validation), match.strength, match.reached])
        set_weights(model, start)
    return pd.DataFrame(rows, columns=["damping", "validation_loss", "strength", "reached"])


def best_damping(sweep: pd.DataFrame) -> float:
    """The λ of a :func:`sweep_damping` that reached the target at the smallest validation loss.

    Raises ValueError if none did.
    """
    reached = sweep[sweep["reached"]]
    if reached.empty:
        raise ValueError(f"no damping of {sweep['damping'].tolist()} reaches the target: widen the grid")
    return float(reached.loc[reached["validation_loss"].idxmin(), "damping"])


class Walk:
    """The path of an iterative method on ``model``, along which the forget loss meets one target after another.

    Each item drawn from ``steps`` is one update of the model in place. The path is the broken line through the
    weights after 0, 1, 2, ... updates, and a strength is a place on it: the number of updates since the start,
    with a fraction where the last one is taken in part. What is left of such an update is gone first when the
    walk goes on, before another is drawn. So strength and model at a target do not depend on the targets before
    it. At most ``max_steps`` updates are drawn, over all targets together.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        steps: Iterable[object],
        forget_loss: Callable[[], float],
        max_steps: int = 1000,
    ) -> None:
        self.model, self.steps, self.forget_loss, self.max_steps = model, iter(steps), forget_loss, max_steps
        self.drawn, self.strength, self.evaluations = 0, 0.0, 1
        self.loss = forget_loss()
        self.ahead: tuple[Vector, float] | None = None  # the end of an update taken in part, and the loss there

    def to(self, target: float, tolerance: float = TOLERANCE) -> Match:
        """Go on until the forget loss crosses ``target`` nats, and stop there; the model is left at that place.

        If the update that crosses overshoots by more than the tolerance, only the part of it that lands on the
        target is taken, found by bisection along the update. A method that runs out of steps, or whose loss stops
        being finite, is left where it was last finite, with ``reached`` false. The numbers of the match are
        totals since the start of the walk.
        """
        while self.loss < target - tolerance:
            begin, low = snapshot(self.model), self.strength
            if not self._advance():
                break
            if not self.loss <= target + tolerance:
                self._back(begin, low, target, tolerance)
                break
        return Match(self.strength, self.loss, _distance(self.loss, target) <= tolerance, self.evaluations)

    def _advance(self) -> bool:
        """Go to the end of the update under way, or of a new one; False if there is none."""
        if self.ahead is not None:
            end, self.loss = self.ahead
            set_weights(self.model, end)
            self.ahead = None
        else:
            if self.drawn == self.max_steps or next(self.steps, self) is self:
                return False
            self.drawn += 1
            self.loss = self.forget_loss()
            self.evaluations += 1
        self.strength = float(self.drawn)
        return True

    def _back(self, begin: Vector, low: float, target: float, tolerance: float) -> None:
        """From the end of an update go back towards ``begin``, at strength ``low``, to where the target is."""
        self.ahead = snapshot(self.model), self.loss
        update = difference(self.ahead[0], begin)

        def part(share: float) -> float:
            set_weights(self.model, begin, update, share)
            return self.forget_loss()

        last = match_strength(part, target, 1.0, tolerance)
        set_weights(self.model, begin, update, last.strength)
        self.strength, self.loss = low + last.strength * (self.drawn - low), last.loss
        self.evaluations += last.evaluations


def match_steps(
    model: PreTrainedModel,
    steps: Iterable[object],
    forget_loss: Callable[[], float],
    target: float,
    tolerance: float = TOLERANCE,
    max_steps: int = 1000,
) -> Match:
    """Run an iterative method on ``model`` until its forget loss crosses ``target`` nats: a :class:`Walk` to it.

    The model is left at the returned strength, a number of steps.
    """
    return Walk(model, steps, forget_loss, max_steps).to(target, tolerance)


def _distance(loss: float, target: float) -> float:
    return abs(loss - target) if math.isfinite(loss) else math.inf
