"""What every curvature can do: three methods, so that an unlearning method is a few lines over any of them."""

import functools
import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from unlearnlib.weights import Vector


class Curvature(Protocol):
    """A symmetric positive semi-definite matrix C over weight space, known only through what it does to vectors.

    It is built from a model and sequences, and holds for the weights the model had then. Damping λ > 0 is an
    argument and not part of C, so that one build serves every λ. All three return new vectors.
    """

    def matvec(self, v: Vector) -> Vector:
        """The product C v."""

    def solve(self, v: Vector, damping: float) -> Vector:
        """The solution x of (C + λI) x = v."""

    def power(self, v: Vector, exponent: float, damping: float) -> Vector:
        """(C + λI)^p v for any real exponent p; p = -1 is :meth:`solve`, p = -1/2 or -1/4 shapes noise."""


def in_full_precision(method: Callable[..., Vector]) -> Callable[..., Vector]:
    """Make a method of a curvature, whose first argument is a vector, multiply in the formats of its tensors.

    Also where :func:`torch.autocast` would round: what is divided by a small λ must not have been rounded before.
    """

    @functools.wraps(method)
    def precise(self: Curvature, v: Vector, *settings: Any, **named: Any) -> Vector:
        device = next(iter(v.values())).device.type
        if not torch.amp.is_autocast_available(device):  # where nothing rounds
            return method(self, v, *settings, **named)
        with torch.autocast(device, enabled=False):
            return method(self, v, *settings, **named)

    return precise


def check_damping(damping: float) -> None:
    """Raise ValueError unless ``damping`` is a positive, finite number."""
    if not (damping > 0 and math.isfinite(damping)):
        raise ValueError(
            f"the damping must be positive and finite, not {damping}: without it the inverse is unbounded along "
            "directions in which the curvature vanishes"
        )


def take(sequences: Tensor, number: int | None) -> Tensor:
    """The first ``number`` sequences [n, tokens], on which a curvature is to be estimated, or all.

    Raises ValueError if there are not so many, or none.
    """
    number = len(sequences) if number is None else number
    if not 1 <= number <= len(sequences):
        raise ValueError(
            f"cannot take m = {number} of {len(sequences)} sequences: choose m from 1 to {len(sequences)}"
        )
    return sequences[:number]
