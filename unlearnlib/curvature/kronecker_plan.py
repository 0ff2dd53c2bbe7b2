"""What a build of Kronecker factors takes of a device's memory, from shapes alone, and groups that fit.

The plan is the build itself, on tensors that have shapes and no numbers (PyTorch's fake tensors): whatever it would
allocate, on any architecture, is counted and not guessed.
"""

import copy
import weakref
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch import Tensor, nn
from transformers import PreTrainedModel

from unlearnlib import distributed
from unlearnlib.curvature.kronecker import build_group
from unlearnlib.curvature.kronecker_blocks import Block, find_blocks
from unlearnlib.losses import batches

aten = torch.ops.aten
EIGH_WORKSPACE = 2
"""Matrices of its size that a decomposition works in, beside the one that becomes the eigenvectors (LAPACK's syevd)."""


class AllocatedBytes(TorchDispatchMode):
    """Counts, within the block, the bytes of the tensors made there that are alive, and the most there were, ``peak``.

    Of what an operation allocates for itself and frees again only a decomposition's workspace is known. Tensors
    without numbers are taken to be in order: where a program asks, ``all`` is true of them and ``any`` is not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current = self.peak = 0
        self._faults: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return args[0].untyped_storage() not in self._faults
        if function in (aten.equal.default, aten.allclose.default) and isinstance(args[0], FakeTensor):
            return True
        found = function(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(found):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in given:
                self._add(x.untyped_storage())
        if function.overloadpacket is aten.any:
            self._faults.add(found.untyped_storage())
        if function is aten._linalg_eigh.default:
            self.peak = max(self.peak, self.current + EIGH_WORKSPACE * args[0].numel() * args[0].element_size())
        return found

    def _add(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self.current += size
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.current -= size


@dataclass(frozen=True)
class Plan:
    """``groups`` of matrices, by the names of their parameters, to be built one after the other.

    ``peak_bytes`` is the most that the build of one takes of the device's memory, beside the model, and
    ``kept_bytes`` what is kept of all of them in the end, on the host if there are several.
    """

    groups: list[list[tuple[str, ...]]]
    peak_bytes: int
    kept_bytes: int


def plan(
    model: PreTrainedModel,
    sequences: Tensor,
    budget_bytes: int | None = None,
    corrected: bool = False,
    only: Collection[tuple[str, ...]] | None = None,
) -> Plan:
    """Few groups of neighbouring matrices, so that the build of none takes more than ``budget_bytes``.

    Of K-FAC from ``sequences`` [m, tokens], or if it is ``corrected`` of EK-FAC; of the matrices ``only``, by
    their parameters' names, where they are given. ``model`` may be an outline on the ``meta`` device, which is
    taken to be for a CPU. Without a budget there is one group. The plan holds for each of several processes: all
    have a group's factors until they are added up. Raises MemoryError naming a matrix that alone is too much.
    """
    batch = batches(model, sequences)[0]
    with distributed.alone(), FakeTensorMode(allow_non_fake_inputs=True):
        fake = _outline(model)
        blocks = [block for block in find_blocks(fake) if only is None or block.names in only]
        groups, room = [blocks] if blocks else [], None
        while True:
            uses = [_bytes_of_build(fake, batch, group, corrected, budget_bytes is None) for group in groups]
            peak, kept = max((p for p, _ in uses), default=0), sum(k for _, k in uses)
            if budget_bytes is None or peak <= budget_bytes:
                return Plan([[block.names for block in group] for group in groups], peak, kept)
            group = groups[[p for p, _ in uses].index(peak)]
            if len(group) == 1:
                raise MemoryError(
                    f"the factors of {group[0].names[0]!r} alone take {peak:,} bytes while they are built, and the "
                    f"budget is {budget_bytes:,}: give more, or take shorter sequences"
                )
            # What is not the factors' own does not shrink with the group: what it leaves is the room for factors.
            most = max(sum(map(_factor_bytes, group)) for group in groups)
            room = min(most - 1, most - (peak - budget_bytes))
            groups = _fill(blocks, room)


def _fill(blocks: list[Block], room: int) -> list[list[Block]]:
    """Neighbours together as long as their factors take no more than ``room`` bytes."""
    groups, left = [], 0
    for block in blocks:
        if _factor_bytes(block) > left or not groups:
            groups.append([])
            left = room
        groups[-1].append(block)
        left -= _factor_bytes(block)
    return groups


def _factor_bytes(block: Block) -> int:
    """Bytes of a matrix's factors as if both were whole, for each of its uses."""
    return len(block.layers) * sum(side**2 for side in block.eigenvalues.shape) * block.eigenvalues.element_size()


def _bytes_of_build(
    fake: PreTrainedModel, batch: Tensor, group: list[Block], corrected: bool, stays: bool
) -> tuple[int, int]:
    """The peak of a group's build, and what its blocks take afterwards, which unless it ``stays`` is elsewhere."""
    with AllocatedBytes() as memory:
        away = build_group(fake, batch, group, 0, corrected, lambda block: block if stays else block.to("meta"))
    parts = [x for block in away for x in (block.eigenvalues, block.left, block.right) if x is not None]
    return memory.peak, sum(x.numel() * x.element_size() for x in parts)


def _outline(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the model that has the shapes of its tensors and no numbers."""
    device = "cpu" if model.device.type == "meta" else model.device
    memo: dict[int, Any] = {id(b): torch.empty_like(b, device=device) for b in model.buffers()}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device=device), requires_grad=p.requires_grad)
    return copy.deepcopy(model, memo)
