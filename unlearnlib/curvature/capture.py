"""What every layer read and what came back: the two halves of a gradient, before they are multiplied.

The gradient of a linear layer's weights is a sum over positions of outer products: of the output gradient δ and
the input a. Whoever has both, sequence by sequence, has every sequence's own gradient from a single backward
pass (:mod:`unlearnlib.curvature.per_sequence_gradients`). Statistics can be formed layer by layer, without ever
holding all of it.
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


@dataclass(frozen=True)
class Layer:
    """A module with trainable parameters of its own.

    ``kind`` is ``"linear"`` (out = W a + b), ``"embedding"`` (out = the row of W that a names, perhaps times a
    number) or ``"norm"`` (out = w · a + b, entry by entry, where a is the normalised input, perhaps with an offset
    that does not depend on w). ``weight`` and ``bias`` are the names of
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
the rows read, int64 [n, tokens]; δ is then that of the row read.
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

    Raises NotImplementedError for a layer that is used twice in one pass, and, before it hands on anything of a
    pass, for an embedding or a norm that does more than its kind says.
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
        current.look()
    finally:
        for p in trainable:
            p.requires_grad_(True)
        for handle in handles:
            handle.remove()


@dataclass
class _Pass:
    """What must be known of the forward pass under way: the number of sequences, and the layers used so far.

    ``plain`` has what is still to be looked at: layers, and whether they are what they seem, as tensors []. To
    read one from an accelerator is to wait for it, so those of a pass are read at once.
    """

    sequences: int = 0
    used: set[str] = field(default_factory=set)
    plain: list[tuple[Layer, Tensor]] = field(default_factory=list)

    def begin(self, _embedding: nn.Module, args: tuple) -> None:
        """The tokens are looked up before anything else."""
        self.sequences = len(args[0])
        self.used.clear()

    def look(self) -> None:
        """Raise NotImplementedError naming the first layer that is not what it seems."""
        layers, self.plain = self.plain, []
        if layers and not torch.stack([plain for _, plain in layers]).all():
            layer = next(layer for layer, plain in layers if not plain)
            raise _unsupported(
                layer.name, layer.module, f"is not the plain {layer.kind} layer that it seems to be"
            )


def _after_forward(
    layer: Layer, current: _Pass, receive: Receive, module: nn.Module, args: tuple, kwargs: dict, out: Tensor
) -> Tensor | None:
    if not torch.is_grad_enabled():  # a mere evaluation, or the first pass of a checkpoint
        return None
    if layer.name in current.used:
        raise _unsupported(layer.name, module, "is used twice in one forward pass")
    current.used.add(layer.name)
    inputs, scale = _input(layer, current, args, kwargs, out.detach())
    if not out.requires_grad:  # the first trainable layer: from here on gradients are needed
        # A leaf that requires them may not be changed in place, as Falcon does with what a layer gave it.
        out.add_(torch.zeros((), dtype=out.dtype, device=out.device, requires_grad=True))
    n = current.sequences
    if len(out) == 1 and n > 1:  # positions, looked up once for the whole batch
        out, inputs = out.expand(n, *out.shape[1:]), inputs.expand(n, *inputs.shape[1:])
    # Some architectures run positions as one long row: [n * tokens, width].
    inputs = inputs.reshape(n, -1) if layer.kind == "embedding" else inputs.reshape(n, -1, inputs.shape[-1])

    def hand_on(gradient: Tensor) -> None:
        current.look()
        gradient = gradient if scale is None else gradient * scale
        receive(layer, inputs, gradient.reshape(n, -1, gradient.shape[-1]))

    out.register_hook(hand_on)
    return out


def _input(layer: Layer, current: _Pass, args: tuple, kwargs: dict, out: Tensor) -> tuple[Tensor, Tensor | None]:
    """The layer's input in the form that :data:`Receive` describes, to be looked at beside the output.

    Also a factor by which an embedding multiplies what it reads [..., 1], and None for other layers.
    """
    module, scale = layer.module, None
    if layer.kind == "linear":
        return args[0].detach(), None
    weight = module.weight.detach()
    with torch.no_grad():
        if layer.kind == "embedding":
            # A table of row numbers and ones tells which rows were read, however the layer counts and scales.
            numbers = torch.arange(len(weight), dtype=torch.float64, device=out.device)
            table = torch.stack([numbers, torch.ones_like(numbers)], dim=1)
            read = functional_call(module, {"weight": table}, args, kwargs)
            inputs = (read[..., 0] / read[..., 1]).nan_to_num().round().long()
            scale = read[..., 1:].to(weight)
            again = weight[inputs[:1].clamp(0, len(weight) - 1)] * scale[:1]
        else:
            # A norm may have an offset, as (1 + w) · a has, and is tried where no weight is: at 0 and at 2.
            others = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
            offset = functional_call(module, others, args, kwargs)
            twice = functional_call(module, others | {"weight": torch.full_like(weight, 2)}, args, kwargs)
            inputs = (twice - offset) / 2
            again = inputs[:1] * weight + offset[:1]
            if getattr(module, "bias", None) is not None:
                again = again + module.bias
    # The first sequence speaks for all, and is quicker; norms round to float32, whatever they are asked for.
    out, tolerance = out[:1], 100 * max(torch.finfo(dtype).eps for dtype in (out.dtype, torch.float32))
    size = out.abs()
    same = ((again - out).abs() <= tolerance * (size + size.max())).all()
    # What is not finite cannot be compared: whoever uses the gradients finds it, and can name the sequence.
    current.plain.append((layer, same | ~out.isfinite().all()))
    return inputs, scale


def _unsupported(name: str, module: nn.Module, why: str) -> NotImplementedError:
    return NotImplementedError(
        f"the layer {name!r} ({type(module).__name__}) {why}: freeze its parameters with requires_grad_(False) "
        "to leave them out, or use a curvature that needs no layers (GaussNewton, Hessian)"
    )
