"""Several processes that share the work, over :mod:`torch.distributed`; one alone is the case of ``size() == 1``.

All run the same program. A pass over sequences takes each process's :func:`share` of them, and what they have
found meets in a collective operation: then all know the same. Where there is one process, none of this does
anything.
"""

import contextlib
import itertools
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

PATIENCE = timedelta(minutes=30)
"""How long a process waits for the others, which may have a larger matrix to decompose."""

_alone = False
_counts: list[Counter[str]] = []


@contextlib.contextmanager
def started(device: torch.device | str) -> Iterator[None]:
    """Within the block, be one of the processes that torchrun or accelerate has started, if one of them has.

    Tensors on CUDA are exchanged by NCCL, and this process gets a GPU of its own; those on a CPU by gloo. Where
    several processes have been joined already, or there is one only, nothing happens. What ends the block early
    ends the process, and then its launcher ends the others.
    """
    if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    on_cuda = torch.device(device).type == "cuda"
    if on_cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo", timeout=PATIENCE)
    yield  # after an error nothing is tidied up: that would wait for processes which wait for us
    dist.destroy_process_group()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Within the block, every process does all of the work itself, as if there were no other."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() and not _alone else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if size() > 1 else 0


def shares(number: int) -> list[slice]:
    """Which of ``number`` things are whose: neighbours, as many for each process as for any other, or one more."""
    each, more = divmod(number, size())
    ends = [i * each + min(i, more) for i in range(size() + 1)]
    return [slice(start, end) for start, end in itertools.pairwise(ends)]


def share(number: int) -> slice:
    """Which of ``number`` things are this process's."""
    return shares(number)[rank()]


class ErrorElsewhere(RuntimeError):
    """What ended another process, said by that one."""


@contextlib.contextmanager
def together(met_within: bool = False) -> Iterator[None]:
    """An error within the block is raised by all processes after it, and names the one that had it.

    To be put around what each does for itself, before the others are met: none of them waits for ever. There must
    be no collective operation within. Raises ErrorElsewhere where the error was another's.

    Where they are ``met_within``, as in every pass of a model whose weights are divided among them, there is no
    waiting for the end: an error ends its process, and then the launcher ends the others.
    """
    if met_within:
        yield
        return
    error = None
    try:
        yield
    except Exception as own:
        error = own
    if size() > 1:
        said = b"" if error is None else f"process {rank()}: {error}".encode()[:1000]
        note = torch.zeros(size(), 1001, dtype=torch.uint8)
        note[rank(), : len(said)] = torch.tensor(list(said), dtype=torch.uint8)
        dist.all_reduce(note)  # gloo, whatever the device: an error is no matter for NCCL
        broken = note[:, 0].nonzero().flatten().tolist()
        if broken and error is None:
            raise ErrorElsewhere(bytes(note[broken[0]].tolist()).rstrip(b"\0").decode(errors="replace"))
    if error is not None:
        raise error


def are_divided(tensors: Iterable[Tensor]) -> bool:
    """Whether any of the tensors is divided among the processes, as sharded weights are."""
    return any(isinstance(tensor, DTensor) for tensor in tensors)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be divided among the processes, which then must all call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def divided_like(tensor: Tensor, like: Tensor) -> Tensor:
    """The inverse of :func:`whole`: divided as ``like`` is, if it is. Every process has all of ``tensor``."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)  # nothing is sent


def sum_over(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by the sum of all processes' tensors in its place."""
    if size() > 1:
        for tensor in tensors:
            _count("all_reduce", tensor)
            dist.all_reduce(tensor)


def sum_to(tensor: Tensor, owner: int) -> None:
    """Add all processes' tensors up in that of ``owner``; what the others have then means nothing."""
    if size() > 1:
        _count("reduce", tensor)
        dist.reduce(tensor, owner)


def copy_from(tensor: Tensor, owner: int) -> None:
    """Replace what is in the tensor by what ``owner`` has in its own."""
    if size() > 1:
        _count("broadcast", tensor)
        dist.broadcast(tensor, owner)


def joined(part: Tensor, number: int) -> Tensor:
    """All ``number`` rows, of which each process has its :func:`share`, [share, ...]: every process gets all."""
    if size() == 1:
        return part
    if part.dtype == torch.bool:  # which gloo does not carry
        return joined(part.byte(), number).bool()
    counts = [some.stop - some.start for some in shares(number)]
    padded = part.new_zeros(max(counts), *part.shape[1:])
    padded[: len(part)] = part
    everyone = [torch.empty_like(padded) for _ in counts]
    _count("all_gather", padded, size())
    dist.all_gather(everyone, padded)
    return torch.cat([rows[:count] for rows, count in zip(everyone, counts, strict=True)])


def rows_to_columns(rows: Tensor, columns: list[slice]) -> Tensor:
    """From all columns of some rows, one process's after the other's, all rows of this process's ``columns``.

    ``rows`` is [ours, all columns] and the result [all rows, ours]; ``columns`` are those of each process.
    """
    if size() == 1:
        return rows
    counts = torch.zeros(size(), dtype=torch.int64)
    counts[rank()] = len(rows)
    dist.all_reduce(counts)
    widths = [some.stop - some.start for some in columns]
    found = rows.new_empty(counts.sum().item() * widths[rank()])
    sent = torch.cat([rows[:, some].flatten() for some in columns])
    _count("all_to_all", sent)
    taken = [count * widths[rank()] for count in counts.tolist()]
    dist.all_to_all_single(found, sent, taken, [len(rows) * width for width in widths])
    return found.view(-1, widths[rank()])


@contextlib.contextmanager
def counted_bytes() -> Iterator[Counter[str]]:
    """Count, within the block, the bytes that are handed to collective operations, by the operation's name.

    Of ``all_gather`` those of all processes, of the others this process's own. How many go over the wire depends
    on the operation.
    """
    counts: Counter[str] = Counter()
    _counts.append(counts)
    try:
        yield counts
    finally:
        _counts[:] = [other for other in _counts if other is not counts]


def _count(operation: str, tensor: Tensor, times: int = 1) -> None:
    for counts in _counts:
        counts[operation] += times * tensor.numel() * tensor.element_size()
