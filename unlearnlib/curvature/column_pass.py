"""One pass over all sequences as a single batch, in which every column of G is formed, added up and dropped."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from unlearnlib.curvature.capture import Layer, capture, find_layers
from unlearnlib.curvature.column_sums import ColumnSums
from unlearnlib.curvature.output_layer import OutputLayer, find_output_layer
from unlearnlib.curvature.per_sequence_gradients import layer_gradients
from unlearnlib.losses import check_length, note_pass
from unlearnlib.weights import Vector


class ColumnPass:
    """The pass over ``sequences`` [m, tokens]; with ``v`` it makes Gv as well as GGᵀ, in ``budget_bytes``.

    The output layer is not captured, for its logits would not fit: its columns are formed from the last hidden
    states [m, T, width], T predicted tokens a sequence.
    """

    def __init__(self, model: PreTrainedModel, sequences: Tensor, budget_bytes: int, v: Vector | None) -> None:
        if len(sequences) == 0:
            raise ValueError("curvature needs at least one sequence, and there are none")
        check_length(model, sequences.shape[1])
        self.model = model
        self.inputs, self.targets = sequences[:, :-1].to(model.device), sequences[:, 1:].to(model.device)
        self.head = find_output_layer(model, self.inputs[:1, :4])
        layers = find_layers(model)
        self.layers = [layer for layer in layers if layer.module is not self.head]
        self.head_layer = next((layer for layer in layers if layer.module is self.head), None)
        tables = {layer.weight for layer in self.layers if layer.kind == "embedding"}
        self.tied = self.head_layer is not None and self.head_layer.weight in tables
        dtype = torch.promote_types(model.dtype, torch.float32)
        least = least_numbers(model, self.layers, *self.targets.shape)
        self.sums = ColumnSums(len(sequences), max(budget_bytes // dtype.itemsize, least), dtype, model.device, v)

    def run(self) -> ColumnSums:
        """Make the pass. Raises FloatingPointError naming the sequence whose gradient is not finite."""
        note_pass(len(self.inputs))
        with capture(self.model, self.layers, self.receive), checkpointed(self.model):
            hidden = self.model.base_model(input_ids=self.inputs, use_cache=False).last_hidden_state
            self.output = OutputLayer(self.head, hidden, self.targets, self.sums)
            gradient = self.output.loss_gradient()
            if self.head_layer is not None and not self.tied:
                self.add_table(self.head_layer.weight, head=True)
            hidden.backward(gradient.to(hidden.dtype))
        finite = self.sums.gram.diagonal().isfinite()
        if not finite.all():
            bad = int((~finite).nonzero()[0])
            raise FloatingPointError(f"the gradient of sequence {bad} is not finite: are the weights damaged?")
        return self.sums

    def receive(self, layer: Layer, inputs: Tensor, gradient: Tensor) -> None:
        """Form a layer's columns from what it read and what came back, as many rows at a time as fit; add them."""
        gradient = gradient.to(self.sums.buffer.dtype)
        if layer.kind == "embedding":
            head = self.tied and layer.weight == self.head_layer.weight
            self.add_table(layer.weight, head, inputs, gradient)
            return
        inputs = inputs.to(self.sums.buffer.dtype)
        small = layer if layer.kind == "norm" else replace(layer, weight=None)
        for name, part in layer_gradients(small, inputs, gradient).items():
            self.sums.add(part, name)
        if layer.kind == "linear" and layer.weight is not None:
            (m, _, width), outputs = inputs.shape, gradient.shape[2]
            for rows in self.sums.slices(outputs, m * width):
                part = self.sums.space(0, m, rows.stop - rows.start, width)
                torch.bmm(gradient[:, :, rows].mT, inputs, out=part)
                self.sums.add(part, layer.weight, rows, layer.transposed)

    def add_table(
        self, name: str, head: bool, inputs: Tensor | None = None, gradient: Tensor | None = None
    ) -> None:
        """Add a table [vocabulary, width]: what it gets as output layer, as embedding, or, if tied, as both."""
        (m, tokens), width = self.targets.shape, (self.output.hidden if head else gradient).shape[2]
        if head:
            entries = torch.arange(self.head.out_features, device=self.output.hidden.device)
        else:  # an entry that no sequence reads has no gradient
            entries, inputs = inputs.unique(return_inverse=True)
        for rows in self.sums.slices(len(entries), m * (tokens + width)):
            part = self.sums.space(m * tokens * (rows.stop - rows.start), m, rows.stop - rows.start, width)
            if head:
                residuals = self.output.residuals(rows)
                torch.bmm(residuals.mT, self.output.hidden, out=part)
                self.sums.add(residuals.sum(dim=1), self.head_layer.bias, rows)
            else:
                part.zero_()
            if inputs is not None:
                sequence, position = ((inputs >= rows.start) & (inputs < rows.stop)).nonzero(as_tuple=True)
                place = (sequence, inputs[sequence, position] - rows.start)
                part.index_put_(place, gradient[sequence, position], accumulate=True)
            self.sums.add(part, name, entries[rows])


def least_numbers(model: PreTrainedModel, layers: list[Layer], sequences: int, tokens: int) -> int:
    """The least that a build has to hold of G: of ``sequences``, a row of each of ``layers`` and of the table.

    A row of the output layer comes with the residuals of all ``tokens`` that each sequence predicts.
    """
    widths = [layer.module.weight.shape[0 if layer.transposed else -1] for layer in layers]
    return sequences * max([tokens + model.get_output_embeddings().weight.shape[1], *widths])


@contextlib.contextmanager
def checkpointed(model: PreTrainedModel) -> Iterator[None]:
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
