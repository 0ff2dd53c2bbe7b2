"""The dual form of the Fisher matrix for models whose gradients, sequence by sequence, do not fit in memory.

Of G [m, d], row i the gradient of sequence i's mean token loss, ``FisherDual`` needs only
GGᵀ [m, m], Gv [m] and Gᵀw [d]. The first two are sums over the columns of G and can be added up a few columns at
a time, formed during one backward pass over all m sequences and dropped at once. Gᵀw is the gradient of Σ wᵢ ℓᵢ,
which takes an ordinary pass. Nothing is approximated, beyond rounding.
"""

import contextlib
import copy
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from unlearnlib.curvature.capture import Layer, capture, find_layers, layer_gradients
from unlearnlib.curvature.fisher import power_gain
from unlearnlib.curvature.protocol import check_damping
from unlearnlib.losses import batches, check_length, sequence_losses
from unlearnlib.weights import Vector, mean_gradient


class StreamingFisher:
    """All of F = GᵀG/m of ``sequences`` [m, tokens], as ``FisherDual`` has it, without ever holding G.

    It keeps a copy of the model. ``budget_bytes`` is what the build may hold of G and of the logits at a time;
    once that exceeds the processor's cache, more makes nothing faster. The least that can be held, whatever the
    budget, is one row of one layer's gradients of all sequences: no more than what one layer reads. Needed in
    addition, for all m sequences, are the hidden states between the transformer blocks and what one block
    computes on the way.

    Gᵀw takes a pass over the sequences, in batches, and so does Gv, except that the products with a ``v`` that is
    known beforehand come with the build. ``eigenvalues`` of F [m], ascending; all others are 0.

    Raises ValueError without sequences, NotImplementedError for a layer of no known kind or an output layer with
    something behind it, FloatingPointError naming the sequence whose gradient is not finite.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sequences: Tensor,
        budget_bytes: int = 2**25,
        v: Vector | None = None,
    ) -> None:
        self.model, self.sequences = copy.deepcopy(model), sequences
        build = _Build(self.model, sequences, budget_bytes, v)
        build.run()
        s, self.vectors = torch.linalg.eigh(build.gram)
        self.eigenvalues = s.clamp(min=0) / len(sequences)
        self.known = None if v is None else ({name: x.clone() for name, x in v.items()}, build.products)

    def matvec(self, v: Vector) -> Vector:
        """F v."""
        return self._combination(self._products(v))

    def solve(self, v: Vector, damping: float) -> Vector:
        """(F + λI)⁻¹ v."""
        return self.power(v, -1.0, damping)

    def power(self, v: Vector, exponent: float, damping: float) -> Vector:
        """(F + λI)^p v, by the formula of ``FisherDual``."""
        check_damping(damping)
        gain = power_gain(self.eigenvalues, exponent, damping)
        change = self._combination(self.vectors @ (gain * (self.vectors.mT @ self._products(v))))
        return {name: damping**exponent * (x + change[name]) for name, x in v.items()}

    def _products(self, v: Vector) -> Tensor:
        """Gv in float64, shape [m]: layer by layer the inner product of δ with what v would make of the input."""
        if self.known is not None and all(torch.equal(x, v[name]) for name, x in self.known[0].items()):
            return self.known[1]
        parts = []

        def receive(layer: Layer, inputs: Tensor, gradient: Tensor) -> None:
            parts[-1] += (_apply(layer, v, inputs) * gradient).sum(dim=(1, 2))

        with capture(self.model, find_layers(self.model), receive):
            for batch in batches(self.model, self.sequences):
                parts.append(self.eigenvalues.new_zeros(len(batch)))
                sequence_losses(self.model, batch).sum().backward()
        return torch.cat(parts)

    def _combination(self, w: Tensor) -> Vector:
        """Gᵀw/m: the gradient of the mean of wᵢ ℓᵢ."""
        return mean_gradient(self.model, self.sequences, sequence_losses, w)


def _apply(layer: Layer, v: Vector, inputs: Tensor) -> Tensor:
    """What the layer would give for its inputs if its parameters were ``v``."""
    out = 0
    if layer.weight is not None:
        weight = v[layer.weight]
        if layer.kind == "linear":
            out = inputs @ (weight if layer.transposed else weight.mT)
        else:
            out = weight[inputs] if layer.kind == "embedding" else weight * inputs
    return out if layer.bias is None else out + v[layer.bias]


class _Build:
    """One pass over all sequences as a single batch, and the sums of the columns of G that come out of it.

    A chunk of columns is made in ``buffer`` and added to ``gram`` [m, m], of which the lower triangle is filled,
    and to ``products`` [m] with ``v``, both in float64. The output layer is not captured, for its logits would not
    fit: its columns are formed from the last hidden states [m, T, width], T predicted tokens a sequence.
    """

    def __init__(self, model: PreTrainedModel, sequences: Tensor, budget_bytes: int, v: Vector | None) -> None:
        if len(sequences) == 0:
            raise ValueError("curvature needs at least one sequence, and there are none")
        check_length(model, sequences.shape[1])
        self.model, self.v = model, v
        self.inputs, self.targets = sequences[:, :-1].to(model.device), sequences[:, 1:].to(model.device)
        self.head = _output_layer(model, self.inputs[:1, :4])
        layers = find_layers(model)
        self.layers = [layer for layer in layers if layer.module is not self.head]
        self.head_layer = next((layer for layer in layers if layer.module is self.head), None)
        tables = {layer.weight for layer in self.layers if layer.kind == "embedding"}
        self.tied = self.head_layer is not None and self.head_layer.weight in tables

        dtype = torch.promote_types(model.dtype, torch.float32)
        least = least_numbers(model, self.layers, *self.targets.shape)
        self.buffer = torch.empty(max(budget_bytes // dtype.itemsize, least), dtype=dtype, device=model.device)
        m = len(sequences)
        self.gram = torch.zeros(m, m, dtype=torch.float64, device=model.device)
        self.products = torch.zeros(m, dtype=torch.float64, device=model.device)

    def run(self) -> None:
        """Make the pass. Raises FloatingPointError naming the sequence whose gradient is not finite."""
        with capture(self.model, self.layers, self._receive), _checkpointed(self.model):
            hidden = self.model.base_model(input_ids=self.inputs, use_cache=False).last_hidden_state
            self.hidden = hidden.detach().to(self.buffer.dtype)
            gradient = self._loss_gradient()
            if self.head_layer is not None and not self.tied:
                self._add_table(self.head_layer.weight, head=True)
            hidden.backward(gradient.to(hidden.dtype))
        finite = self.gram.diagonal().isfinite()
        if not finite.all():
            bad = int((~finite).nonzero()[0])
            raise FloatingPointError(f"the gradient of sequence {bad} is not finite: are the weights damaged?")

    def _receive(self, layer: Layer, inputs: Tensor, gradient: Tensor) -> None:
        gradient = gradient.to(self.buffer.dtype)
        if layer.kind == "embedding":
            head = self.tied and layer.weight == self.head_layer.weight
            self._add_table(layer.weight, head, inputs, gradient)
            return
        inputs = inputs.to(self.buffer.dtype)
        small = layer if layer.kind == "norm" else replace(layer, weight=None)
        for name, part in layer_gradients(small, inputs, gradient).items():
            self._add(part, name)
        if layer.kind == "linear" and layer.weight is not None:
            (m, _, width), outputs = inputs.shape, gradient.shape[2]
            for rows in self._slices(outputs, m * width):
                part = self._space(0, m, rows.stop - rows.start, width)
                torch.bmm(gradient[:, :, rows].mT, inputs, out=part)
                self._add(part, layer.weight, rows, layer.transposed)

    def _add_table(
        self, name: str, head: bool, inputs: Tensor | None = None, gradient: Tensor | None = None
    ) -> None:
        """Add a table [vocabulary, width]: what it gets as output layer, as embedding, or, if tied, as both."""
        (m, tokens), width = self.targets.shape, (self.hidden if head else gradient).shape[2]
        if head:
            entries = torch.arange(self.head.out_features, device=self.hidden.device)
        else:  # an entry that no sequence reads has no gradient
            entries, inputs = inputs.unique(return_inverse=True)
        for rows in self._slices(len(entries), m * (tokens + width)):
            part = self._space(m * tokens * (rows.stop - rows.start), m, rows.stop - rows.start, width)
            if head:
                residuals = self._residuals(rows)
                torch.bmm(residuals.mT, self.hidden, out=part)
                self._add(residuals.sum(dim=1), self.head_layer.bias, rows)
            else:
                part.zero_()
            if inputs is not None:
                sequence, position = ((inputs >= rows.start) & (inputs < rows.stop)).nonzero(as_tuple=True)
                place = (sequence, inputs[sequence, position] - rows.start)
                part.index_put_(place, gradient[sequence, position], accumulate=True)
            self._add(part, name, entries[rows])

    def _loss_gradient(self) -> Tensor:
        """Gradient of Σ ℓᵢ by the last hidden states, Wᵀ(p − e_y)/T of each token.

        Tiles of some tokens and some rows of the vocabulary fit the buffer, however large the vocabulary is: what
        has been summed relative to the largest logit so far is scaled down where a larger one comes (the online
        softmax of Milakov & Gimelshein 2018).
        """
        hidden, labels = self.hidden.flatten(end_dim=1), self.targets.flatten()
        gradient, total = torch.zeros_like(hidden), hidden.new_zeros(len(hidden), 1)
        top = torch.full_like(total, -math.inf)
        vocabulary, room = self.head.out_features, len(self.buffer)
        height = max(min(vocabulary, math.isqrt(room)), room // len(hidden))
        for some in self._slices(len(hidden), height):
            for rows in self._slices(vocabulary, room // height):
                z, weight = self._logits(hidden[some], rows)
                largest = torch.maximum(top[some], z.amax(dim=1, keepdim=True))
                z, shrink = _exp(z.sub_(largest)), (top[some] - largest).exp_()
                top[some] = largest
                total[some] = shrink * total[some] + z.sum(dim=1, keepdim=True)
                gradient[some].mul_(shrink).addmm_(z, weight)
            gradient[some] /= total[some]
            gradient[some] -= self.head.weight[labels[some]]
        m, tokens = self.targets.shape
        self.normalisers = (top + total.log() + math.log(tokens)).view(m, tokens, 1)
        return gradient.div_(tokens).view_as(self.hidden)

    def _residuals(self, rows: slice) -> Tensor:
        """(p − e_y)/T of each token of all sequences for some rows of the vocabulary, [m, T, rows]."""
        labels = self.targets
        z = self._logits(self.hidden.flatten(end_dim=1), rows)[0].view(*labels.shape, -1)
        z = _exp(z.sub_(self.normalisers))
        sequence, position = ((labels >= rows.start) & (labels < rows.stop)).nonzero(as_tuple=True)
        z[sequence, position, labels[sequence, position] - rows.start] -= 1 / labels.shape[1]
        return z

    def _logits(self, hidden: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Logits of tokens for some rows of the vocabulary, at the buffer's start, and the rows' weights."""
        weight = self.head.weight[rows].to(hidden.dtype)
        z = torch.mm(hidden, weight.mT, out=self._space(0, len(hidden), len(weight)))
        if self.head.bias is not None:
            z += self.head.bias[rows]
        return z, weight

    def _add(
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

    def _slices(self, total: int, numbers: int) -> Iterator[slice]:
        """Cut ``total`` rows, which take ``numbers`` numbers each, into parts that fit the buffer."""
        step = len(self.buffer) // numbers
        return (slice(i, min(i + step, total)) for i in range(0, total, step))

    def _space(self, start: int, *shape: int) -> Tensor:
        """A tensor of that shape within the buffer."""
        return self.buffer[start : start + math.prod(shape)].view(shape)


def least_numbers(model: PreTrainedModel, layers: list[Layer], sequences: int, tokens: int) -> int:
    """The least that a build has to hold of G: of ``sequences``, a row of each of ``layers`` and of the table.

    A row of the output layer comes with the residuals of all ``tokens`` that each sequence predicts.
    """
    widths = [layer.module.weight.shape[0 if layer.transposed else -1] for layer in layers]
    return sequences * max([tokens + model.get_output_embeddings().weight.shape[1], *widths])


def _exp(z: Tensor) -> Tensor:
    """Replace z by exp z: below ε² a probability counts for nothing, and products that underflow would be slow."""
    return torch.threshold_(z.exp_(), torch.finfo(z.dtype).eps ** 2, 0)


def _output_layer(model: PreTrainedModel, tokens: Tensor) -> nn.Linear:
    """The linear layer that makes logits of the last hidden states, as is tried on ``tokens`` [n, T]."""
    head = model.get_output_embeddings()
    with torch.no_grad():
        plain = isinstance(head, nn.Linear) and torch.allclose(
            head(model.base_model(input_ids=tokens, use_cache=False).last_hidden_state),
            model(input_ids=tokens, use_cache=False).logits,
            rtol=1e-5,
            equal_nan=True,
        )
    if not plain:
        raise NotImplementedError(
            f"the logits of {type(model).__name__} are more than a linear layer of its last hidden states: they "
            "are scaled or capped (use FisherDual, with fewer sequences), or dropout is on (call model.eval())"
        )
    return head


@contextlib.contextmanager
def _checkpointed(model: PreTrainedModel) -> Iterator[None]:
    """Within the block, each transformer block keeps its inputs only and runs again in the backward pass.

    The switch that transformers has for this works in training mode only, where dropout is on as well.
    """
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for block in blocks:
        block.forward = functools.partial(_rerun, block.forward)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _rerun(forward: Callable[..., Any], hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
    # The reentrant kind of checkpoint frees the activations of the second run as soon as it is done with a block,
    # but sees no need for that run unless a gradient is wanted for an input: true if all before it is frozen.
    return checkpoint(functools.partial(forward, **kwargs), hidden.requires_grad_(True), *args, use_reentrant=True)
