"""GGᵀ and Gv as sums over the columns of G [m, d], a few columns at a time."""

import torch
from torch import Tensor

from unlearnlib.curvature.tiles import Tiles
from unlearnlib.weights import Vector


class ColumnSums(Tiles):
    """``gram`` = GGᵀ [m, m], of which the lower triangle is filled, and ``products`` = Gv [m], both in float64.

    A chunk of columns is made in ``buffer``, which has ``numbers`` numbers of the format ``dtype``, and added.
    """

    def __init__(self, m: int, numbers: int, dtype: torch.dtype, device: torch.device, v: Vector | None) -> None:
        super().__init__(numbers, dtype, device)
        self.v = v
        self.gram = torch.zeros(m, m, dtype=torch.float64, device=device)
        self.products = torch.zeros(m, dtype=torch.float64, device=device)

    def add(
        self, part: Tensor, name: str | None, rows: slice | Tensor = slice(None), transposed: bool = False
    ) -> None:
        """Add to the sums the columns of G for some ``rows`` of a parameter, ``part`` [m, rows, ...]."""
        if name is None:  # frozen, or not there
            return
        columns, step = part.flatten(start_dim=1), 2**14  # float32 has too few digits for longer sums
        if self.v is not None:
            v = self.v[name].mT if transposed else self.v[name]
            v = v[rows].flatten().to(columns.dtype)
        for start in range(0, columns.shape[1], step):
            some = columns[:, start : start + step]
            for i in range(0, len(some), 64):  # what is above the diagonal follows by symmetry
                self.gram[i:, i : i + 64] += some[i:] @ some[i : i + 64].T
            if self.v is not None:
                self.products += some @ v[start : start + step]
