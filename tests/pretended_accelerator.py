"""A pretended accelerator: a device of PyTorch whose tensors keep their values on the CPU, and refuse to mix.

It finds, without any accelerator, tensors that were left behind on the CPU. Every operator is run by the CPU, once
its tensors have been seen to be on one device; as on a real one, numbers (tensors without dimensions) and what
indexes others may come from the CPU. And it counts how often the processor would have to wait for an accelerator.
The device is of the whole process, so it is for a process of its own: ``pytest -p pretended_accelerator`` with
``UNLEARNLIB_TEST_DEVICE=pretended``.
"""

from collections import Counter
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretended"
aten = torch.ops.aten
BETWEEN = (aten._to_copy.default, aten.copy_.default)
"""Operators that are there to take values from one device to another."""
BY_INDEX = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put")
READS = ("_local_scalar_dense", "equal", "nonzero", "_unique2", "unique_dim", "masked_select", "bincount")
"""Operators whose result, or its shape, the processor must know: ``item``, ``bool`` and ``int`` are the first."""
WAITS: Counter[str] = Counter()
"""How often the processor would have waited so far, by reason: these operators, and copies either way."""


class Pretended(torch.Tensor):
    """A tensor on the pretended device; ``held`` has its values."""

    @staticmethod
    def __new__(cls, held):
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, held.shape, device=torch.device(NAME, 0), **layout)
        made.held = held
        return made

    def __repr__(self):
        return f"Pretended({self.held})"

    def __deepcopy__(self, memo):
        new = Pretended(self.held.clone())
        memo[id(self)] = (
            torch.nn.Parameter(new, self.requires_grad) if isinstance(self, torch.nn.Parameter) else new
        )
        return memo[id(self)]

    def tolist(self):
        return self.cpu().tolist()

    def __format__(self, how):
        return format(self.cpu(), how)

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        return run(operator, args, kwargs or {})


def is_here(device):
    return device is not None and torch.device(device).type == NAME


def on_cpu(x):
    if isinstance(x, torch.device):
        return torch.device("cpu")
    return x.held if isinstance(x, Pretended) else x


def run(operator, args, kwargs):
    """Run an operator that makes or reads tensors of the device, on the CPU."""
    tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)]
    ours = {id(x.held): x for x in tensors if isinstance(x, Pretended)}
    name = operator._schema.name.partition("::")[2]
    strays = [x for x in tensors if not isinstance(x, Pretended) and x.ndim > 0]
    by_index = name in BY_INDEX and isinstance(args[0], Pretended)
    if ours and strays and operator not in BETWEEN and not by_index:
        raise RuntimeError(f"{name} mixes {NAME} with a tensor on the CPU, {tuple(strays[0].shape)}")
    if name in READS:
        WAITS[name] += 1
    elif by_index and args[1] is not None:
        WAITS["nonzero"] += sum(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        WAITS["to the device"] += bool(strays)
    elif operator in BETWEEN and strays:
        WAITS["to the device"] += 1
    if operator is aten.copy_.default and on_cpu(args[0]).data_ptr() == on_cpu(args[1]).data_ptr():
        return args[
            0
        ]  # a view of itself, which PyTorch cannot tell: wrappers have no memory that could be the same
    # Zeros without memory, as forward-mode differentiation makes them, are nothing that the CPU could read here.
    made = aten.zeros.default if operator is aten._efficientzerotensor.default else operator
    results = made(*tree_map(on_cpu, args), **tree_map(on_cpu, kwargs))
    away = operator is aten._to_copy.default and kwargs.get("device") is not None and not is_here(kwargs["device"])
    if away or (operator is aten.copy_.default and not isinstance(args[0], Pretended)):
        WAITS["to the CPU"] += 1
        return args[0] if operator is aten.copy_.default else results
    # What was changed in place is the same tensor as before, and not another with the same values.
    return tree_map(lambda x: ours.get(id(x), Pretended(x)) if isinstance(x, torch.Tensor) else x, results)


def copy_from(source, target, non_blocking=False):
    on_cpu(target).copy_(on_cpu(source))
    return target


class Arrivals(TorchDispatchMode):
    """Sends to :func:`run` what makes a tensor on the device out of none that is there already."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if is_here(kwargs.get("device")) or any(isinstance(x, Pretended) for x in tree_iter((args, kwargs))):
            return run(operator, args, kwargs)
        return operator(*args, **kwargs)


def register():
    """Make the device known. What is returned has to be kept."""
    none = lambda *_, **__: None  # noqa: E731
    module = SimpleNamespace(
        is_available=lambda: True,
        is_initialized=lambda: True,
        device_count=lambda: 1,
        current_device=lambda: 0,
        get_amp_supported_dtype=lambda: [torch.bfloat16],
        get_rng_state=lambda *_: torch.zeros(8, dtype=torch.uint8),
        set_rng_state=none,
        manual_seed=none,
        manual_seed_all=none,
        synchronize=none,
        _is_in_bad_fork=lambda: False,
        _lazy_init=none,
    )
    _setup_privateuseone_for_python_backend(NAME, backend_module=module)
    torch.__future__.set_swap_module_params_on_conversion(True)  # tied weights stay tied when a model moves
    autocast = torch.library.Library("_", "IMPL")
    autocast.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    inside = torch.library.Library("aten", "IMPL")  # asked for by operators that are made of others, in C++
    for operator in (aten.empty.memory_format, aten.empty_strided.default, aten._local_scalar_dense.default):
        name = operator.name().removeprefix("aten::")
        inside.impl(name, lambda *args, _made=operator, **kwargs: run(_made, args, kwargs), "PrivateUse1")
    inside.impl("_copy_from", copy_from, "PrivateUse1")
    mode = Arrivals()
    mode.__enter__()
    return autocast, inside, mode


KEPT = register()
