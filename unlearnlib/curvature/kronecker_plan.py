"""What a build of Kronecker factors takes of a device's memory, from shapes alone, and groups that fit.

The plan is the build itself, on tensors that have shapes and no numbers (PyTorch's fake tensors): whatever it
would allocate, on any architecture, is counted and not guessed.
"""

import bisect
import weakref
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from unlearnlib import distributed
from unlearnlib.curvature.kronecker import build_group
from unlearnlib.curvature.kronecker_blocks import Block, find_blocks
from unlearnlib.curvature.protocol import take
from unlearnlib.losses import batches, uncounted
from unlearnlib.weights import outline

Thing = TypeVar("Thing")

aten = torch.ops.aten
EIGH_WORKSPACE = 2
"""Matrices of its size that a decomposition works in, beside that of the eigenvectors (LAPACK's syevd)."""


class AllocatedBytes(TorchDispatchMode):
    """Counts, within the block, the bytes of tensors made there that are alive, and the most there were: ``peak``.

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
            if isinstance(x, Tensor) and x.device.type != "meta" and x.untyped_storage()._cdata not in given:
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

    ``peak_bytes`` is the most that the build of one takes of the device's memory, beside the model.
    """

    groups: list[list[tuple[str, ...]]]
    peak_bytes: int


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
    have a group's factors until they are added up. Raises MemoryError if one matrix alone is too much, ValueError
    if there are no sequences.
    """
    sequences = take(sequences, None)
    few = sequences[: 2 * len(batches(model, sequences)[0])]  # what one batch leaves is there for the next
    with distributed.alone(), uncounted(), FakeTensorMode(allow_non_fake_inputs=True):
        whole = getattr(model, "outline", lambda: model)()  # where weights are divided among processes
        fake = outline(whole, "cpu" if model.device.type == "meta" else model.device)
        blocks = [block for block in find_blocks(fake) if only is None or block.names in only]
        total = sum(block.factor_bytes for block in blocks)

        def planned(number: int) -> Plan:
            """With room for so great a part of all factors in a group."""
            groups = (
                neighbours(blocks, lambda block: block.factor_bytes, total // number)
                if number < len(blocks)
                else [[block] for block in blocks]
            )
            built = [_peak_bytes(fake, few, groups[i], corrected, budget_bytes is None) for i in _dear(groups)]
            return Plan([[block.names for block in group] for group in groups], max(built, default=0))

        one = planned(1)
        if budget_bytes is None or one.peak_bytes <= budget_bytes:
            return one
        smallest = planned(len(blocks))
        if smallest.peak_bytes > budget_bytes:
            raise MemoryError(
                f"a single matrix takes {smallest.peak_bytes:,} bytes while its factors are built, and the budget "
                f"is {budget_bytes:,}: give more, or take shorter sequences"
            )
        numbers = range(2, len(blocks))
        found = bisect.bisect_left(numbers, True, key=lambda n: planned(n).peak_bytes <= budget_bytes)
        return planned(numbers[found]) if found < len(numbers) else smallest


def _dear(groups: list[list[Block]]) -> set[int]:
    """The groups that can take most: the first, whose pass keeps most, and those with most or largest factors."""
    if not groups:
        return set()
    total = [sum(block.factor_bytes for block in group) for group in groups]
    largest = [max(block.factor_bytes for block in group) for group in groups]
    return {0, total.index(max(total)), largest.index(max(largest))}


def neighbours(things: Iterable[Thing], size: Callable[[Thing], float], room: float) -> list[list[Thing]]:
    """Groups of things in their order, of as many as together have no more than ``room``, or of one."""
    groups: list[list[Thing]] = []
    left = 0.0
    for thing in things:
        if not groups or size(thing) > left:
            groups.append([])
            left = room
        groups[-1].append(thing)
        left -= size(thing)
    return groups


def _peak_bytes(fake: PreTrainedModel, sequences: Tensor, group: list[Block], corrected: bool, stays: bool) -> int:
    """The peak of a group's build, whose blocks, unless they stay, are put elsewhere when they are built."""
    with AllocatedBytes() as memory:
        build_group(fake, sequences, group, 0, corrected, lambda block: block if stays else block.to("meta"))
    return memory.peak
