"""The dual form of the Fisher matrix for models whose gradients, sequence by sequence, do not fit in memory.

Of G [m, d], row i the gradient of sequence i's mean token loss, ``FisherDual`` needs only
GGᵀ [m, m], Gv [m] and Gᵀw [d]. The first two are sums over the columns of G and can be added up a few columns at
a time, formed during one backward pass over all m sequences and dropped at once. Gᵀw is the gradient of Σ wᵢ ℓᵢ,
which takes an ordinary pass. Nothing is approximated, beyond rounding.
"""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from unlearnlib import distributed
from unlearnlib.curvature.capture import Layer, capture
from unlearnlib.curvature.column_pass import ColumnPass
from unlearnlib.curvature.fisher_dual import power_gain
from unlearnlib.curvature.output_layer import OutputLayer
from unlearnlib.curvature.protocol import check_damping, in_full_precision
from unlearnlib.curvature.tiles import Tiles
from unlearnlib.losses import batches, note_pass
from unlearnlib.weights import Vector, parameters


class StreamingFisher:
    """All of F = GᵀG/m of ``sequences`` [m, tokens], as ``FisherDual`` has it, without ever holding G.

    It keeps a copy of the model. ``budget_bytes`` is what is held of G and of the logits at a time;
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
        self.model, self.sequences, self.budget_bytes = copy.deepcopy(model), sequences, budget_bytes
        build = ColumnPass(self.model, sequences, budget_bytes, v)
        self.head, self.layers, last = build.head, build.layers, build.head_layer
        self.head_names = (None, None) if last is None else (last.weight, last.bias)
        sums = build.run()
        s, self.vectors = torch.linalg.eigh(sums.gram)
        self.eigenvalues = s.clamp(min=0) / len(sequences)
        self.known = None if v is None else ({name: x.clone() for name, x in v.items()}, sums.products)

    def matvec(self, v: Vector) -> Vector:
        """F v."""
        return self.combination(self.products(v))

    def solve(self, v: Vector, damping: float) -> Vector:
        """(F + λI)⁻¹ v."""
        return self.power(v, -1.0, damping)

    @in_full_precision
    def power(self, v: Vector, exponent: float, damping: float) -> Vector:
        """(F + λI)^p v, by the formula of ``FisherDual``."""
        check_damping(damping)
        gain = power_gain(self.eigenvalues, exponent, damping)
        change = self.combination(self.vectors @ (gain * (self.vectors.mT @ self.products(v))))
        return {name: damping**exponent * (x + change[name]) for name, x in v.items()}

    def products(self, v: Vector) -> Tensor:
        """Gv in float64, shape [m]: layer by layer the inner product of δ with what v would make of the input."""
        if self.known is not None and all(torch.equal(x, v[name]) for name, x in self.known[0].items()):
            return self.known[1]
        products = torch.zeros_like(self.eigenvalues)

        def receive(layer: Layer, inputs: Tensor, gradient: Tensor) -> None:
            products[some] += (layer_outputs(layer, v, inputs) * gradient).sum(dim=(1, 2))

        with distributed.together(), capture(self.model, self.layers, receive):
            for some, hidden, output in self._passes():
                gradient = output.loss_gradient()
                products[some] += output.products(v, *self.head_names)
                if hidden.requires_grad:  # unless all that is trained is the output layer
                    hidden.backward(gradient.to(hidden.dtype))
                del hidden, output, gradient  # before the next batch
        distributed.sum_over([products])
        return products

    def combination(self, w: Tensor) -> Vector:
        """Gᵀw/m: the gradient of the mean of wᵢ ℓᵢ."""
        live, factors = parameters(self.model), w / len(self.sequences)
        total = {name: torch.zeros_like(p) for name, p in live.items()}
        with distributed.together():
            for some, hidden, output in self._passes():
                gradient = output.loss_gradient().mul_(factors[some, None, None])
                output.add_gradient(factors[some], *(total.get(name) for name in self.head_names))
                if hidden.requires_grad:
                    found = torch.autograd.grad(
                        hidden, live.values(), gradient.to(hidden.dtype), allow_unused=True
                    )
                    for part, x in zip(total.values(), found, strict=True):
                        if x is not None:
                            part += x
                    del found
                del hidden, output, gradient
        distributed.sum_over(total.values())
        return total

    def _passes(self) -> Iterator[tuple[slice, Tensor, OutputLayer]]:
        """Batches of this process's sequences: which they are, their last hidden states, and the output layer."""
        mine, device = distributed.share(len(self.sequences)), self.model.device
        parts, start = batches(self.model, self.sequences[mine]), mine.start
        dtype = torch.promote_types(self.model.dtype, torch.float32)
        least = max((2 * part[:, 1:].numel() for part in parts), default=0)  # for a row of the vocabulary, and
        most = least * self.head.out_features  # for all of it
        tiles = Tiles(max(least, min(self.budget_bytes // dtype.itemsize, most)), dtype, device)
        for part in parts:
            note_pass(len(part))
            hidden = self.model.base_model(input_ids=part[:, :-1].to(device), use_cache=False).last_hidden_state
            yield (
                slice(start, start + len(part)),
                hidden,
                OutputLayer(self.head, hidden, part[:, 1:].to(device), tiles),
            )
            start += len(part)
            del hidden


def layer_outputs(layer: Layer, v: Vector, inputs: Tensor) -> Tensor:
    """What the layer would give for its inputs if its parameters were ``v``."""
    out = 0
    if layer.weight is not None:
        weight = v[layer.weight]
        if layer.kind == "linear":
            out = inputs @ (weight if layer.transposed else weight.mT)
        else:
            out = weight[inputs] if layer.kind == "embedding" else weight * inputs
    return out if layer.bias is None else out + v[layer.bias]
