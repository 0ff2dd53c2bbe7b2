"""A model whose weights are divided among the processes, for those that no single device can hold.

Each process keeps its rows of every matrix (FSDP2, ``fully_shard``; Zhao et al. 2023). A block's matrices are
gathered when a pass comes to it and let go when it has passed, so that of whole matrices one block's are in memory
at a time, or two. Passes, vectors in weight space and Kronecker factors work as with a whole model; a vector's
entries are DTensors, divided as the weights are.
"""

from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from unlearnlib import distributed
from unlearnlib.models.loading import architecture, default_device, load_model, transformer_blocks
from unlearnlib.weights import check_whole, outline


def shard(model: PreTrainedModel, device: torch.device | str | None = None) -> PreTrainedModel:
    """Divide the weights of ``model`` among all processes, in place; every process must have the same ones.

    They go to ``device`` block by block, so that the whole model is never there. What is trained
    (``requires_grad``) and the number format are chosen before. One process alone keeps all.

    Of sharded weights these raise NotImplementedError: Newton's products (GaussNewton, Hessian), gradients
    sequence by sequence (FisherDiagonal, recursion, dual, DP-SGD), Sophia, relearning and rounding. Whoever reads
    a vector's entries one by one takes :func:`unlearnlib.distributed.whole` of them first.
    """
    if distributed.size() == 1:
        return model.to(device or default_device())
    shapes = outline(model, "meta")
    model.outline = lambda: shapes  # by which the memory that curvatures take is planned
    mesh = init_device_mesh(torch.device(device or default_device()).type, (distributed.size(),))
    # The outermost module, too, lets go of its weights after a pass: what is read between two passes are parts.
    for module in (*transformer_blocks(model), model):  # the rest, tied embeddings among it, is the last group
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    model.__deepcopy__ = lambda _copied: check_whole(model, "what takes a copy of the model")
    return model


def load_sharded(
    source: str | Path | dict[str, Any],
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> PreTrainedModel:
    """As :func:`unlearnlib.models.load_model`, divided among all processes: the first reads, and hands out.

    It has the whole model in host memory meanwhile; no device and no other process has. Raises as ``load_model``.
    """
    if distributed.size() == 1:
        return load_model(source, seed=seed, dtype=dtype, device=device)
    first = distributed.rank() == 0
    with distributed.together():
        whole = load_model(source, seed=seed, dtype=dtype, device="cpu") if first else None
    device = torch.device(device or default_device())
    model = shard(architecture(source, dtype), device).to_empty(device=device)
    weights = whole.state_dict() if first else {}
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    for name, buffer in model.named_buffers():  # such as rotary angles, which are no part of a model's state
        if first:
            buffer.copy_(whole.get_buffer(name))
        distributed.copy_from(buffer, 0)
    return model


def save_model(model: PreTrainedModel, folder: str | Path) -> None:
    """``save_pretrained`` by the first process, of a model that may be sharded; to be called by all processes.

    The weights are gathered in its host memory, matrix by matrix, and the files are those of a whole model.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options) if distributed.size() > 1 else model.state_dict()
    with distributed.together():
        if distributed.rank() == 0:  # the others have no state
            once = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}  # each tied weight
            model.save_pretrained(folder, state_dict={name: x for name, x in state.items() if name in once})
