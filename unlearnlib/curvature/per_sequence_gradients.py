"""The gradient of every single sequence's loss, of a batch from one backward pass.

What went through a layer gives that layer's part (:mod:`unlearnlib.curvature.capture`). A loss has one value a
sequence: the mean cross-entropy of its tokens for the empirical Fisher (``sequence_losses``), the loss of labels
that the model has drawn for the true one (:func:`sampled_losses`).
"""

import math
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from unlearnlib import distributed
from unlearnlib.curvature.capture import Layer, capture, find_layers
from unlearnlib.curvature.protocol import take
from unlearnlib.losses import batches, log_probabilities, sequence_losses
from unlearnlib.weights import Vector, check_whole, parameters

GRADIENT_BYTES = 2**30
"""How much the gradients of single sequences may take that are held at a time, where all may not be needed."""

SequenceLoss = Callable[[PreTrainedModel, Tensor], Tensor]
"""One loss a sequence of a batch: from the model and sequences [n, tokens] to [n]."""


def layer_gradients(layer: Layer, inputs: Tensor, gradient: Tensor) -> Vector:
    """Gradients of the layer's own parameters, sequence by sequence: name to [n, *shape of the parameter].

    For a tied weight this is the part of one of its two layers.
    """
    parts = {}
    if layer.weight is not None:
        if layer.kind == "linear":
            left, right = (inputs, gradient) if layer.transposed else (gradient, inputs)
            parts[layer.weight] = torch.einsum("nti,ntj->nij", left, right)
        elif layer.kind == "norm":
            parts[layer.weight] = (gradient * inputs).sum(dim=1)
        else:
            table = gradient.new_zeros(len(gradient), *layer.module.weight.shape)
            sequence = torch.arange(len(gradient), device=gradient.device)[:, None]
            table.index_put_((sequence, inputs), gradient, accumulate=True)
            parts[layer.weight] = table
    if layer.bias is not None:
        parts[layer.bias] = gradient.sum(dim=1)
    return parts


def gradients_by_name(model: PreTrainedModel, batch: Tensor, loss: SequenceLoss = sequence_losses) -> Vector:
    """Every sequence's own gradient of ``loss``, from one backward pass: name to [n, *shape of the parameter].

    ``batch`` [n, tokens] is one of :func:`gradient_batches`. Raises as :func:`each_gradient`.
    """
    gradients: Vector = {}
    each_gradient(model, batch, loss, gradients.__setitem__)
    return {name: gradients[name] for name in parameters(model)}


def each_gradient(
    model: PreTrainedModel,
    batch: Tensor,
    loss: SequenceLoss,
    receive: Callable[[str, Tensor], None],
    first: int = 0,
) -> None:
    """Call ``receive`` with each parameter's name and gradients [n, *shape], as soon as a backward pass has them.

    That is when all its uses are added up, which for a tied weight may be at the end. ``loss`` passes the batch
    [n, tokens] through the model once; its first sequence has the number ``first`` in what is raised, after the
    pass: FloatingPointError naming the sequence whose gradient is not finite. Otherwise NotImplementedError for
    sharded weights and as :func:`find_layers` and :func:`capture`, RuntimeError naming a parameter that takes no
    part in the loss.
    """
    check_whole(model, "each sequence's own gradient")
    layers = find_layers(model)
    missing = Counter(name for layer in layers for name in (layer.weight, layer.bias) if name)
    waiting: Vector = {}
    finite = []  # one row [n] a parameter, looked at once: an accelerator would have to wait every time

    def add(layer: Layer, inputs: Tensor, gradient: Tensor) -> None:
        for name, part in layer_gradients(layer, inputs, gradient).items():
            missing[name] -= 1
            total = waiting.pop(name).add_(part) if name in waiting else part
            if missing[name]:
                waiting[name] = total
                continue
            precise = torch.promote_types(total.dtype, torch.float32)
            finite.append(total.flatten(start_dim=1).sum(dim=1, dtype=precise).isfinite())
            receive(name, total)

    with capture(model, layers, add):
        loss(model, batch).sum().backward()
    unused = [name for name, uses in missing.items() if uses]
    if unused:
        raise RuntimeError(f"{unused[0]!r} takes no part in the loss: freeze it with requires_grad_(False)")
    whole = torch.stack(finite).all(dim=0)
    if not whole.all():
        bad = first + int((~whole).nonzero()[0])
        raise FloatingPointError(f"the gradient of sequence {bad} is not finite: are the weights damaged?")


def gradient_batches(model: PreTrainedModel, sequences: Tensor, whole: bool = False) -> tuple[Tensor, ...]:
    """The sequences [n, tokens] cut into batches whose gradients take no more than :data:`GRADIENT_BYTES`.

    Counted are ``whole`` gradients, or of a parameter at a time those of its two uses. A batch has at least one
    sequence, and no more than one of :func:`unlearnlib.losses.batches`.
    """
    if len(sequences) == 0:
        return ()
    sizes = [p.numel() * p.element_size() for p in parameters(model).values()]
    number = GRADIENT_BYTES // (sum(sizes) if whole else 2 * max(sizes))
    return sequences.split(max(1, min(number, len(batches(model, sequences)[0]))))


def sequence_gradients(
    model: PreTrainedModel, sequences: Tensor, number: int | None = None, loss: SequenceLoss = sequence_losses
) -> Tensor:
    """G: the gradient of each of the first ``number`` sequences [n, tokens], or of all, a row each, [m, d].

    Of several processes each gets the rows of its share of the sequences; what is made of G puts them together.
    Raises ValueError if there are fewer than ``number`` sequences, and as :func:`each_gradient`: among others
    FloatingPointError naming the sequence whose gradient is not finite.
    """
    chosen = take(sequences, number)
    mine = distributed.share(len(chosen))
    sizes = {name: p.numel() for name, p in parameters(model).items()}
    rows = next(model.parameters()).new_empty(mine.stop - mine.start, sum(sizes.values()))
    columns = dict(zip(sizes, rows.split(list(sizes.values()), dim=1), strict=True))

    def receive(name: str, gradients: Tensor) -> None:
        columns[name][start : start + len(gradients)] = gradients.flatten(start_dim=1)

    start = 0
    with distributed.together():
        for batch in gradient_batches(model, chosen[mine]):
            each_gradient(model, batch, loss, receive, mine.start + start)
            start += len(batch)
    return rows


def sampled_losses(generator: torch.Generator) -> SequenceLoss:
    """The loss whose per-sequence gradients give the true Fisher, in expectation over the labels it draws.

    Each label is drawn from the model's own prediction, on the CPU and sequence by sequence, so that
    ``generator`` gives the same labels on every device and in batches of any size. A sequence's loss is the sum
    over its T predicted tokens, divided by √T: the tokens' cross terms vanish in expectation, so that E[g gᵀ] =
    (1/T) Σ_t J_tᵀ (diag p_t − p_t p_tᵀ) J_t, which is the Gauss–Newton matrix of the sequence's mean loss.
    """

    def loss(model: PreTrainedModel, sequences: Tensor) -> Tensor:
        log_p = log_probabilities(model, sequences)
        p = log_p.detach().exp().cpu()
        labels = torch.stack([torch.multinomial(one, 1, generator=generator) for one in p]).to(log_p.device)
        return -log_p.gather(2, labels).sum(dim=(1, 2)) / math.sqrt(log_p.shape[1])

    return loss
