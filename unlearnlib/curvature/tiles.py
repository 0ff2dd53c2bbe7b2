"""Large matrices made a tile at a time, all in the same memory."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor


class Tiles:
    """Room for ``numbers`` numbers of the format ``dtype``, the ``buffer``, got once and used for every tile."""

    def __init__(self, numbers: int, dtype: torch.dtype, device: torch.device) -> None:
        self.buffer = torch.empty(numbers, dtype=dtype, device=device)

    def slices(self, total: int, numbers: int) -> Iterator[slice]:
        """Cut ``total`` rows, which take ``numbers`` numbers each, into parts that fit the buffer."""
        step = len(self.buffer) // numbers
        return (slice(i, min(i + step, total)) for i in range(0, total, step))

    def space(self, start: int, *shape: int) -> Tensor:
        """A tensor of that shape within the buffer."""
        return self.buffer[start : start + math.prod(shape)].view(shape)
