"""What every layer read and what came back: the two halves of a gradient, before they are multiplied.

The gradient of a linear layer's weights is a sum over positions of outer products: of the output gradient δ and
the input a. Whoever has both, sequence by sequence, has every sequence's own gradient from a single backward
pass, and can form its statistics layer by layer without ever holding all of it.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from unlearnlib.weights import Vector


@dataclass(frozen=True)
class Layer:
    """A module with trainable parameters of its own.

    ``kind`` is ``"linear"`` (out = W a + b), ``"embedding"`` (out = the row of W that a names) or ``"norm"``
    (out = w · a + b, entry by entry, where a is the normalised input). ``weight`` and ``bias`` are the names of
    its parameters as :func:`unlearnlib.weights.parameters` has them, or None where there is none to train. The
    name of a tied weight is the same in both its layers. ``transposed``: W is stored as [in, out].
    """

    name: str
    kind: str
    module: nn.Module
    weight: str | None
    bias: str | None
    transposed: bool


Receive = Callable[[Layer, Tensor, Tensor], None]
"""Called with a layer, its input a and its output gradient δ [n, tokens, out].

The input is [n, tokens, in] for a linear layer, [n, tokens, out] for a norm, and for an embedding the numbers of
the rows read, int64 [n, tokens].
"""


def find_layers(model: PreTrainedModel) -> list[Layer]:
    """All layers with trainable parameters, in the model's order; a tied weight is in two of them.

    Raises NotImplementedError naming the first layer that is of no kind we know, or that has a padding row.
    """
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    layers = []
    for name, module in model.named_modules():
        own = {local: names[id(p)] for local, p in module.named_parameters(recurse=False) if id(p) in names}
        if not own:
            continue
        if isinstance(module, nn.Linear | Conv1D):
            kind = "linear"
        elif isinstance(module, nn.Embedding):
            kind = "embedding"
            if module.padding_idx is not None:
                raise NotImplementedError(
                    f"row {module.padding_idx} of {name!r} is for padding and gets no gradient: load the model "
                    "with unlearnlib.models.loading.load_model, or set padding_idx of that layer to None"
                )
        elif "norm" in type(module).__name__.lower():
            kind = "norm"
        else:
            raise _unsupported(name, module, "is no linear, embedding or norm layer")
        if not own.keys() <= {"weight", "bias"} or next(module.children(), None) is not None:
            raise _unsupported(name, module, f"has the parameters {', '.join(own)} or layers within")
        layers.append(Layer(name, kind, module, own.get("weight"), own.get("bias"), isinstance(module, Conv1D)))
    return layers


@contextlib.contextmanager
def capture(model: PreTrainedModel, layers: list[Layer], receive: Receive) -> Iterator[None]:
    """Within the block, every backward pass hands ``receive`` what went through each of ``layers``.

    That happens layer by layer during the pass, the last layer first, and nothing is kept afterwards. The
    weights themselves are frozen within the block, which saves the work of their own gradients.

    Raises NotImplementedError, in the forward pass, for an embedding or a norm that does more than its kind
    says, and for a layer that is used twice in one pass.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    current = _Pass()
    handles = [model.get_input_embeddings().register_forward_pre_hook(current.begin)]
    for layer in layers:
        hook = functools.partial(_after_forward, layer, current, receive)
        handles.append(layer.module.register_forward_hook(hook, with_kwargs=True))
    for p in trainable:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trainable:
            p.requires_grad_(True)
        for handle in handles:
            handle.remove()


@dataclass
class _Pass:
    """What must be known of the forward pass under way: the number of sequences, and the layers used so far."""

    sequences: int = 0
    used: set[str] = field(default_factory=set)

    def begin(self, _embedding: nn.Module, args: tuple) -> None:
        """The tokens are looked up before anything else."""
        self.sequences = len(args[0])
        self.used.clear()


def _after_forward(
    layer: Layer, current: _Pass, receive: Receive, module: nn.Module, args: tuple, kwargs: dict, out: Tensor
) -> Tensor | None:
    if not torch.is_grad_enabled():  # a mere evaluation, or the first pass of a checkpoint
        return None
    if layer.name in current.used:
        raise _unsupported(layer.name, module, "is used twice in one forward pass")
    current.used.add(layer.name)
    inputs = _input(layer, args, kwargs, out.detach())
    if not out.requires_grad:  # the first trainable layer: from here on gradients are needed
        out.requires_grad_(True)
    n = current.sequences
    if len(out) == 1:  # positions, looked up once for the whole batch
        out, inputs = out.expand(n, *out.shape[1:]), inputs.expand(n, *inputs.shape[1:])
    # Some architectures run positions as one long row: [n * tokens, width].
    inputs = inputs.reshape(n, -1) if layer.kind == "embedding" else inputs.reshape(n, -1, inputs.shape[-1])
    out.register_hook(lambda gradient: receive(layer, inputs, gradient.reshape(n, -1, gradient.shape[-1])))
    return out


def _input(layer: Layer, args: tuple, kwargs: dict, out: Tensor) -> Tensor:
    """The layer's input in the form that :data:`Receive` describes, checked against the output."""
    module = layer.module
    if layer.kind == "linear":
        return args[0].detach()
    weight = module.weight.detach()
    with torch.no_grad():
        if layer.kind == "embedding":
            # A table whose entries are its row numbers tells which rows were read, however the layer counts.
            numbers = torch.arange(len(weight), dtype=torch.float64, device=out.device)[:, None]
            inputs = functional_call(module, {"weight": numbers}, args, kwargs)[..., 0].long()
            again = weight[inputs[:1].clamp(0, len(weight) - 1)]
        else:
            others = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
            offset = functional_call(module, others, args, kwargs)
            inputs = functional_call(module, others | {"weight": torch.ones_like(weight)}, args, kwargs) - offset
            again = inputs[:1] * weight
            if getattr(module, "bias", None) is not None:
                again = again + module.bias
    out, tolerance = out[:1], 100 * torch.finfo(out.dtype).eps  # the first sequence speaks for all, and is quicker
    # What is not finite cannot be compared: whoever uses the gradients finds it, and can name the sequence.
    if out.isfinite().all() and not torch.allclose(
        again, out, rtol=tolerance, atol=tolerance * out.abs().max().item()
    ):
        raise _unsupported(layer.name, module, f"is not the plain {layer.kind} layer that it seems to be")
    return inputs


def sequence_gradients(layer: Layer, inputs: Tensor, gradient: Tensor) -> Vector:
    """Gradients of the layer's own parameters, sequence by sequence: name to [n, *shape of the parameter].

    For a tied weight this is the part of one of its two layers.
    """
    found = {}
    if layer.weight is not None:
        if layer.kind == "linear":
            left, right = (inputs, gradient) if layer.transposed else (gradient, inputs)
            found[layer.weight] = torch.einsum("nti,ntj->nij", left, right)
        elif layer.kind == "norm":
            found[layer.weight] = (gradient * inputs).sum(dim=1)
        else:
            table = gradient.new_zeros(len(gradient), *layer.module.weight.shape)
            sequence = torch.arange(len(gradient), device=gradient.device)[:, None]
            table.index_put_((sequence, inputs), gradient, accumulate=True)
            found[layer.weight] = table
    if layer.bias is not None:
        found[layer.bias] = gradient.sum(dim=1)
    return found


def _unsupported(name: str, module: nn.Module, why: str) -> NotImplementedError:
    return NotImplementedError(
        f"the layer {name!r} ({type(module).__name__}) {why}: freeze its parameters with requires_grad_(False) "
        "to leave them out, or use a curvature that needs no layers (FisherDual, FisherDiagonal, GaussNewton)"
    )
