"""Matched forgetting: bring every method to the same forget loss, and only then compare what it broke."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

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


class LeadsNowhere(ValueError):
    """A direction that is zero or not finite, as of a λ too small for the precision of the numbers."""


class Path(Protocol):
    """The way that a method takes ``model`` as it grows stronger, along which the forget loss rises.

    Bringing a model to a loss is all that the methods have in common. What takes one step is a :class:`Line`, what
    takes many is a :class:`Walk`.
    """

    model: PreTrainedModel
    start: Vector

    def to(self, target: float) -> Match:
        """Bring ``model`` to the forget loss ``target`` in nats, or as close as the path leads, and tell where."""


class Line:
    """The path ``start + α direction`` of a method that takes one step; its strength is α.

    It starts from the weights that ``model`` has now, unless others are given. ``forget`` [n, tokens] are the
    sequences whose loss is looked at. Raises LeadsNowhere, a ValueError, if the direction is zero or not finite.
    """

    def __init__(
        self, model: PreTrainedModel, direction: Vector, forget: Tensor, start: Vector | None = None
    ) -> None:
        self.model, self.direction, self.forget = model, direction, forget
        self.start = snapshot(model) if start is None else start
        self.length = norm(direction)
        if not (self.length > 0 and math.isfinite(self.length)):
            raise LeadsNowhere(f"the direction has length {self.length}: it leads nowhere")

    def to(self, target: float) -> Match:
        """Put the model where its loss is ``target`` nats; the first α moves the weights by 1 % of their norm."""
        match = match_strength(self._loss_at, target, start=0.01 * norm(self.start) / self.length)
        self.go(match.strength)
        return match

    def go(self, strength: float) -> None:
        """Put the model at the place of a given strength."""
        set_weights(self.model, self.start, self.direction, strength)

    def _loss_at(self, strength: float) -> float:
        self.go(strength)
        return mean_loss(self.model, self.forget)


class Walk:
    """The path of a method in steps, along which the loss on ``forget`` meets one target after another.

    Each item drawn from ``steps`` is one update of the model in place. The path is the broken line through the
    weights after 0, 1, 2, ... updates, and a strength is a place on it: the number of updates since the start,
    with a fraction where the last one is taken in part. What is left of such an update is gone first when the
    walk goes on, before another is drawn. So strength and model at a target do not depend on the targets before
    it. At most ``max_steps`` updates are drawn, over all targets together. A walk that is ``falling`` starts above
    its targets and meets them on its way down; all else is alike.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        steps: Iterable[object],
        forget: Tensor,
        max_steps: int = 1000,
        falling: bool = False,
    ) -> None:
        self.model, self.steps, self.forget, self.max_steps = model, iter(steps), forget, max_steps
        self.sign = -1.0 if falling else 1.0  # to fall to a target is to rise to it with all signs turned
        self.start = snapshot(model)
        self.drawn, self.strength, self.evaluations = 0, 0.0, 1
        self.loss = self._forget_loss()
        self.ahead: tuple[Vector, float] | None = None  # the end of an update taken in part, and the loss there

    def to(self, target: float, tolerance: float = TOLERANCE) -> Match:
        """Go on until the forget loss crosses ``target`` nats, and stop there; the model is left at that place.

        If the update that crosses overshoots by more than the tolerance, only the part of it that lands on the
        target is taken, found by bisection along the update. A method that runs out of steps, or whose loss stops
        being finite, is left where it was last finite, with ``reached`` false. The numbers of the match are
        totals since the start of the walk.
        """
        target *= self.sign
        while self.loss < target - tolerance:
            begin, low = snapshot(self.model), self.strength
            if not self._advance():
                break
            if not self.loss <= target + tolerance:
                self._back(begin, low, target, tolerance)
                break
        reached = _distance(self.loss, target) <= tolerance
        return Match(self.strength, self.sign * self.loss, reached, self.evaluations)

    def _forget_loss(self) -> float:
        return self.sign * mean_loss(self.model, self.forget)

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
            self.loss = self._forget_loss()
            self.evaluations += 1
        self.strength = float(self.drawn)
        return True

    def _back(self, begin: Vector, low: float, target: float, tolerance: float) -> None:
        """From the end of an update go back towards ``begin``, at strength ``low``, to where the target is."""
        self.ahead = snapshot(self.model), self.loss
        update = difference(self.ahead[0], begin)

        def part(share: float) -> float:
            set_weights(self.model, begin, update, share)
            return self._forget_loss()

        last = match_strength(part, target, 1.0, tolerance)
        set_weights(self.model, begin, update, last.strength)
        self.strength, self.loss = low + last.strength * (self.drawn - low), last.loss
        self.evaluations += last.evaluations


def sweep(settings: Iterable[Any], path: Callable[[Any], Path], validation: Tensor, target: float) -> pd.DataFrame:
    """Match forgetting with each of ``settings`` in turn, and see what it costs on the validation sequences.

    ``path(setting)`` is the path of the method with that setting, such as a λ or a learning rate. A model that
    it shares with others stands where it started when it is called. Returns a row a setting: ``setting``,
    ``validation_loss`` in nats at the forget loss ``target``, ``strength`` and ``reached``.
    """
    rows = []
    for setting in tqdm(settings, "settings", leave=False, mininterval=1.0):
        way = path(setting)
        match = way.to(target)
        rows.append([setting, mean_loss(way.model, validation), match.strength, match.reached])
        set_weights(way.model, way.start)
    return pd.DataFrame(rows, columns=["setting", "validation_loss", "strength", "reached"])


def _distance(loss: float, target: float) -> float:
    return abs(loss - target) if math.isfinite(loss) else math.inf
