"""A pass over sequences with labels that the model draws, and both sides of every layer's terms on the way.

The gradient of a matrix of weights is a sum of terms l rᵀ, one a position: output gradient and input. Statistics
of the two sides, or of their sums, make the true Fisher's Kronecker factors, eigenvalues and diagonal.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from unlearnlib import distributed
from unlearnlib.curvature.capture import Layer, capture, find_layers
from unlearnlib.curvature.kronecker_blocks import Block
from unlearnlib.losses import logits, shared_batches

PIECE = 2**22
"""How many numbers of the logits' shape are made at a time, where not all are needed at once."""


def receive_terms(
    model: PreTrainedModel,
    sequences: Tensor,
    blocks: list[Block],
    seed: int,
    receive: Callable[[Block, Layer, Tensor, Tensor], None],
) -> None:
    """Forward and backward over the sequences [m, tokens], in batches, with labels drawn from the model.

    Of several processes each does it for its share of the sequences.

    ``receive`` gets both sides of each layer's terms, [n, terms, rows] and [n, terms, columns]. The left side of
    an embedding is one-hot, and given by its row numbers, int64 [n, terms]. That of a head is p − e_y, and of it
    the *expected squares* over the labels y are given, p (1 − p): what is known needs no sampling. It matters for
    rare words, which are hardly ever drawn, and would seem to have no curvature at all. The terms of a head come
    in pieces, n = 1, with no regard to which sequence they are of.

    Of the logits' size there is one tensor during the backward pass, p − e_y, and for a moment before it one more.
    A progress bar shows once it takes long.

    Raises FloatingPointError naming a sequence that makes something not finite, NotImplementedError for a head
    whose output is not the logits.
    """
    head = model.get_output_embeddings()
    block_of = {name: block for block in blocks for name in block.layers}
    layers = [layer for layer in find_layers(model) if layer.name in block_of]

    def hand_on(layer: Layer, inputs: Tensor, gradient: Tensor) -> None:
        if not counted:
            return
        broken[f"the gradients at {layer.name!r}"] = not_finite(gradient)
        block = block_of[layer.name]
        if layer.module is not head:
            receive(block, layer, *sides(block, layer, inputs, gradient.to(block.eigenvalues.dtype)))
            return
        if start == mine.start and not torch.equal(gradient[0], residual[0].to(gradient)):
            raise NotImplementedError(f"the output of {layer.name!r} is not the logits: freeze its weights")
        _, right = sides(block, layer, inputs, residual.to(block.eigenvalues.dtype))
        for some in pieces(residual):
            p, y, p_y, r = (x.flatten(0, 1)[some] for x in (residual, labels, drawn, right))
            p = p.scatter(1, y, p_y)
            receive(block, layer, p.addcmul_(p, p, value=-1).to(r)[None], r[None])

    # One number a token, drawn on the CPU: the same labels on every device and in batches of any size.
    uniform = torch.rand(sequences[:, 1:].shape, generator=torch.Generator().manual_seed(seed))
    mine = distributed.share(len(sequences))
    start, divided = mine.start, distributed.are_divided(model.parameters())
    bar = tqdm(
        total=mine.stop - mine.start,
        desc="curvature",
        unit="sequence",
        leave=False,
        delay=5.0,
        mininterval=1.0,
        disable=distributed.rank() > 0,
    )
    with bar, distributed.together(met_within=divided), capture(model, layers, hand_on):
        for batch, counted in shared_batches(model, sequences):
            if not counted:
                logits(model, batch).sum().backward()
                continue
            outputs, p = predictions(model, batch, start)
            broken = {}  # looked at once a batch: an accelerator would have to wait every time
            labels = draw_labels(p, uniform[start : start + len(batch), :, None].to(p))
            drawn = p.gather(2, labels)
            residual = p.scatter_add_(2, labels, -torch.ones_like(drawn))
            torch.autograd.backward(outputs, residual)
            check_finite(broken, start)
            outputs = p = residual = None  # with them goes what the layers read, before the next batch
            start += len(batch)
            bar.update(len(batch))


def predictions(model: PreTrainedModel, batch: Tensor, start: int) -> tuple[GradientEdge, Tensor]:
    """Where a backward pass from the logits starts, and their softmax in at least float32, but not they."""
    z = logits(model, batch)
    check_finite({"the predictions": not_finite(z)}, start)
    return get_gradient_edge(z), z.detach().softmax(dim=2, dtype=torch.promote_types(z.dtype, torch.float32))


def draw_labels(p: Tensor, uniform: Tensor) -> Tensor:
    """Labels [n, tokens, 1] with the probabilities ``p`` [n, tokens, vocabulary], from numbers in [0, 1)."""
    labels = torch.empty_like(uniform, dtype=torch.int64)
    for some in pieces(p):
        cumulative = p.flatten(0, 1)[some].cumsum(dim=1)
        drawn = (1 - uniform.flatten(0, 1)[some]) * cumulative[:, -1:]
        labels.flatten(0, 1)[some] = torch.searchsorted(cumulative, drawn)
    return labels


def pieces(x: Tensor) -> Iterator[slice]:
    """Which of all tokens of ``x`` [n, tokens, vocabulary] are taken at a time."""
    tokens, vocabulary = x.shape[:2].numel(), x.shape[2]
    step = max(1, PIECE // vocabulary)
    return (slice(i, i + step) for i in range(0, tokens, step))


def not_finite(x: Tensor) -> Tensor:
    """Which sequences of ``x`` [n, tokens, width] have something that is not finite, shape [n]."""
    return ~x.detach().sum(dim=(1, 2), dtype=torch.float32).isfinite()


def check_finite(broken: dict[str, Tensor], start: int) -> None:
    """Raise FloatingPointError naming what is ``broken`` first, and its sequence, numbered from ``start`` on."""
    if broken and torch.stack(list(broken.values())).any():
        what, sequences = next((what, sequences) for what, sequences in broken.items() if sequences.any())
        sequence = start + int(sequences.nonzero()[0])
        raise FloatingPointError(f"{what} are not finite for sequence {sequence}: are the weights damaged?")


def sides(block: Block, layer: Layer, inputs: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Both sides of the terms of a layer's gradient; of a norm the one term is the whole sequence's gradient."""
    if layer.kind == "embedding":
        left, right = inputs, gradient
    elif layer.kind == "norm":
        parts = [gradient * inputs.to(gradient)] if layer.weight else []
        parts += [gradient] if layer.bias else []
        right = torch.cat(parts, dim=2).sum(dim=1, keepdim=True)
        left = torch.ones_like(right[..., :1])
    else:
        left, right = gradient, inputs.to(gradient) if layer.weight else inputs[..., :0].to(gradient)
        right = F.pad(right, (0, 1), value=1.0) if layer.bias else right
    missing = block.eigenvalues.shape[1] - right.shape[2]  # a tied table has no bias where its head has one
    return left, F.pad(right, (0, missing)) if missing else right
