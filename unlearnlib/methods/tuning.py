"""Equal chances: one rule by which the settings of every method are chosen, first-order or second.

A *knob* is a setting such as a learning rate, a retain weight or a damping λ. What a setting is worth is the loss
on validation sequences once the method has reached its target.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from torch import Tensor
from tqdm.auto import tqdm

from unlearnlib.losses import counted_passes, mean_loss
from unlearnlib.methods.matching import LeadsNowhere, Path
from unlearnlib.weights import set_weights

MOST = 12
"""How many settings of a method are tried at the most."""

Knobs = Mapping[str, Sequence[float]]
"""By name of a knob, the values to begin with: positive, ascending, each the same multiple of the one before.

A single value is given, and no other is tried.
"""

Worth = tuple[bool, float]
"""What a setting is worth, the smaller the better: whether it misses the target, and a loss."""


@dataclass(frozen=True)
class Choice:
    """The setting that was chosen, and all that were tried.

    ``setting`` has a value for each knob. ``table`` has a row for each setting in the order of trial: a column a
    knob, then what the trial tells (:func:`choose`: ``validation_loss`` and ``forget_loss`` in nats, ``strength``
    and ``reached``), and the ``plain_passes`` that it took. ``at_edge`` are the knobs of which no larger, or no
    smaller, value was tried.
    """

    setting: dict[str, float]
    table: pd.DataFrame
    at_edge: tuple[str, ...]

    @property
    def tried(self) -> int:
        """How many settings were tried."""
        return len(self.table)

    @property
    def noted(self) -> dict[str, float]:
        """What results say of the choice: how many settings were tried, and how many knobs lie at an edge."""
        return {"settings_tried": self.tried, "knobs_at_edge": len(self.at_edge)}

    @property
    def plain_passes(self) -> float:
        """What all trials took, in plain passes; what they share, such as a curvature, is counted once."""
        return float(self.table["plain_passes"].sum())

    @property
    def reached(self) -> bool:
        """Whether the chosen setting reached the target; if not, none did."""
        return bool(self.table["reached"].any())


def choose(knobs: Knobs, path: Callable[..., Path], validation: Tensor, target: float, most: int = MOST) -> Choice:
    """Choose a method's setting by the loss on ``validation`` [n, tokens] at the forget loss ``target`` in nats.

    ``path(**setting)`` is the path of the method with a value for each knob; a model that it shares with others
    stands where it started when it is called. The search is :func:`search`. A setting that does not reach the
    target is worse than any that does; of two such, the one that comes closer is better. Worst is one at which
    numbers break down, such as a λ below what single precision can resolve.

    Raises ValueError as :func:`search`.
    """

    def trial(**setting: float) -> tuple[Worth, dict[str, Any]]:
        try:
            way = path(**setting)
            match = way.to(target)
        except (LeadsNowhere, FloatingPointError):
            told = dict.fromkeys(("validation_loss", "forget_loss", "strength"), math.nan)
            return (True, math.inf), told | {"reached": False}
        loss = mean_loss(way.model, validation)
        set_weights(way.model, way.start)
        row = {"validation_loss": loss, "forget_loss": match.loss, "strength": match.strength}
        reached = match.reached and math.isfinite(loss)
        off = loss if reached else abs(match.loss - target)
        return (not reached, off), row | {"reached": reached}

    return search(knobs, trial, most)


def search(knobs: Knobs, trial: Callable[..., tuple[Worth, dict[str, Any]]], most: int = MOST) -> Choice:
    """Find the setting that is worth the most in trials, of which each returns a worth and a row of the table.

    The search begins in the middle of every grid and goes along one knob after the other, each time to the best
    value. A grid whose best value lies at its edge is continued there by the same ratio. It ends when no knob
    moves, or when ``most`` settings have been tried. A method without knobs is tried once. To a row are added
    the setting in front and at the end the ``plain_passes`` that the trial took.

    Raises ValueError for a grid of several values that is no geometric sequence of three positive ones or more, or
    if ``most`` is too small for the grids.
    """
    ratios = {name: _ratio(name, grid) for name, grid in knobs.items() if len(grid) != 1}
    needed = 1 + sum(len(grid) - 1 for grid in knobs.values())
    if most < needed:
        raise ValueError(f"{most} settings are too few for these grids: allow {needed} or more")
    grids = {name: list(grid) for name, grid in knobs.items()}
    best = {name: grid[len(grid) // 2] for name, grid in grids.items()}
    tried: dict[tuple[float, ...], Worth] = {}
    rows = []

    def worth(setting: dict[str, float]) -> Worth:
        """The smaller the better; a setting is tried once."""
        key = tuple(setting.values())
        if key not in tried:
            with counted_passes() as passes:
                (missed, off), row = trial(**setting)
            tried[key] = missed, off if math.isfinite(off) else math.inf
            rows.append(setting | row | {"plain_passes": passes.plain})
            bar.update()
        return tried[key]

    def along(name: str) -> float:
        """The best value of one knob, the others being as they are."""
        grid = grids[name]
        while True:
            for value in grid:
                if len(tried) < most:
                    worth(best | {name: value})
            known = [value for value in grid if tuple((best | {name: value}).values()) in tried]
            # Among equals it stays where it is: settings that all lead nowhere must not draw the grid after them.
            value = min(known, key=lambda value: (worth(best | {name: value}), value != best[name]))
            if len(tried) >= most or name not in ratios or value not in (grid[0], grid[-1]):
                return value
            if value == grid[0]:
                grid.insert(0, value / ratios[name])
            else:
                grid.append(value * ratios[name])

    with tqdm(total=most, desc="settings", leave=False, mininterval=1.0) as bar:
        worth(best)
        moved = True
        while moved and knobs and len(tried) < most:
            moved = False
            for name in knobs:
                value = along(name)
                moved |= value != best[name]
                best = best | {name: value}
            moved &= len(knobs) > 1
    at_edge = tuple(
        name
        for name in ratios
        if any(
            tuple((best | {name: value}).values()) not in tried
            for value in _neighbours(grids[name], best[name], ratios[name])
        )
    )
    return Choice(best, pd.DataFrame(rows), at_edge)


def _neighbours(grid: Sequence[float], value: float, ratio: float) -> tuple[float, float]:
    i = grid.index(value)
    below = grid[i - 1] if i else value / ratio
    return below, grid[i + 1] if i + 1 < len(grid) else value * ratio


def _ratio(name: str, grid: Sequence[float]) -> float:
    """By what a grid goes on."""
    ratio = grid[1] / grid[0] if len(grid) > 2 and grid[0] > 0 else math.nan
    steps = [right / left for left, right in itertools.pairwise(grid)] if ratio > 1 else []
    if not (ratio > 1 and all(math.isclose(step, ratio, rel_tol=0.05) for step in steps)):
        raise ValueError(
            f"the grid {tuple(grid)} of {name} is no ascending geometric sequence of three positive values or more"
        )
    return ratio
