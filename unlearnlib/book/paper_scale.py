"""The routes to H⁻¹v measured on a GPU at the paper's scale, beside what the cost model says of them.

The models have the shapes of the OPT family and random weights, made on the device: what a route costs does not
ask what the weights are, and nothing is downloaded. What runs out of memory is written down as such.
"""

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel

from unlearnlib import cost, curvature, methods
from unlearnlib.book import roofline
from unlearnlib.curvature.kronecker import layer_factors
from unlearnlib.experiment.inverse_fisher_time import inverse_fisher_seconds
from unlearnlib.models import loading
from unlearnlib.verdicts.results import write_results
from unlearnlib.weights import set_weights, snapshot

TOKENS = 127
"""T, the tokens that are predicted in each sequence."""
BLOCK = 64
"""Weights in a block of the recursion."""
BUDGET = 2**30
"""Bytes that the streaming form may use for its chunks."""
DAMPING = 1e-3
FACTORS_ONLY = "kfac:factors"
IN_GROUPS = "kfac:groups"
BUS = 25e9
"""Bytes a second to the host's memory: four fifths of what PCIe 4.0 with 16 lanes carries in one direction."""
ROOM = 30 * 2**30
"""Bytes beside the weights within which :data:`IN_GROUPS` is built: a group or two of OPT-2.7B's matrices."""
LONG = 2.0
"""Seconds after which a first time counts, though all that is done once is in it."""

OPT = {
    "OPT-125M": roofline.Shape(12, 768, 12, 50272, 2048, TOKENS),
    "OPT-1.3B": roofline.Shape(24, 2048, 32, 50272, 2048, TOKENS),
    "OPT-2.7B": roofline.Shape(32, 2560, 32, 50272, 2048, TOKENS),
}
"""Zhang et al. (2022), table 1."""

# Operations a second in bfloat16, float32 and float64, and bytes a second, from the makers' data sheets (SXM).
CARDS = {
    "A100": (312e12, 19.5e12, 19.5e12, 2.0e12),
    "H100": (989e12, 67e12, 67e12, 3.35e12),
    "H200": (989e12, 67e12, 67e12, 4.8e12),
}


@dataclass(frozen=True)
class Task:
    """One measurement: a ``method`` on ``m`` sequences, with weights in ``dtype``.

    With ``rounding`` the matrix products of float32 weights are in bfloat16, as the book trains on a GPU.
    """

    model: str
    method: str
    m: int
    dtype: torch.dtype = torch.float32
    rounding: bool = False

    @property
    def precision(self) -> str:
        """The number format of the weights, and of the products where it is another."""
        name = str(self.dtype).removeprefix("torch.")
        return f"{name}:bfloat16" if self.rounding else name


HALF = {"dtype": torch.bfloat16}
MIXED = {"rounding": True}
PLAN = (
    *(Task("OPT-125M", method, 64) for method in ("gradient", "ascent", "fisher_diagonal")),
    *(Task("OPT-125M", method, 32) for method in ("sequence_gradients", "fisher_dual", "fisher_recursion")),
    Task("OPT-125M", "fisher_dual:streaming", 64),
    Task("OPT-125M", "kfac", 64),
    Task("OPT-125M", "kfac:request", 64),
    Task("OPT-125M", "ekfac", 64),
    Task("OPT-125M", "gradient", 64, **MIXED),
    Task("OPT-125M", "gradient", 64, **HALF),
    *(Task("OPT-2.7B", method, 64, **HALF) for method in ("gradient", "ascent")),
    Task("OPT-2.7B", "gradient", 256, **HALF),
    *(Task("OPT-2.7B", method, 32, **HALF) for method in ("fisher_diagonal", "fisher_dual:streaming")),
    Task("OPT-2.7B", "sequence_gradients", 8, **HALF),
    Task("OPT-2.7B", "fisher_dual", 8, **HALF),
    *(
        Task("OPT-2.7B", method, 64)
        for method in ("gradient", "ascent", "fisher_diagonal", "fisher_dual:streaming")
    ),
    Task("OPT-2.7B", "gradient", 64, **MIXED),
    *(
        Task("OPT-1.3B", method, 64)
        for method in ("gradient", "ascent", "fisher_diagonal", "fisher_dual:streaming")
    ),
    *(Task("OPT-1.3B", method, 8) for method in ("sequence_gradients", "fisher_dual")),
    Task("OPT-1.3B", "gradient", 64, **MIXED),
    Task("OPT-1.3B", "gradient", 64, **HALF),
    Task("OPT-1.3B", FACTORS_ONLY, 64),
    *(Task("OPT-125M", method, 64) for method in ("gauss_newton_product", "hessian_product")),
    Task("OPT-2.7B", FACTORS_ONLY, 64),
    *(Task(model, IN_GROUPS, 64) for model in OPT),
)
"""In the order of what matters most, should there be no time for the rest."""

SIDES = (768, 2048, 2560, 3073, 8193, 10241)
"""Sides of Kronecker factors of these models, whose decompositions are most of K-FAC's time."""

LARGE = tuple((shape.d, m, block) for m in (32, 128) for block in (16, 64, 256) for shape in OPT.values())
SMALL = tuple((2**k, m, block) for m in (64, 256, 1024) for block in (16, 64, 256) for k in (18, 20, 22))
"""Weights, m and a block's weights for the time of the inverse Fisher, the paper's own measure of cost."""


def card_machine(card: str, task: Task | None = None) -> roofline.Machine | None:
    """What chapter 20's rule makes of the data sheet of ``card``; None of a card that is not known."""
    for name, (half, single, double, bandwidth) in CARDS.items():
        if name in card:
            whole = task is not None and task.precision == "float32"
            flops = {"model": 0.7 * single if whole else 0.5 * half, "float32": 0.7 * single}
            flops |= {"float64": 0.7 * double, "eigen": 0.05 * double}
            return roofline.Machine(flops, 0.8 * bandwidth, start=0.15e-3, asynchronous=True, host=BUS)
    return None


class Table:
    """Rows of measurements, of which the file is written anew with each: an end that comes early loses nothing."""

    def __init__(self, folder: Path, exhibit: str, card: str) -> None:
        self.folder, self.exhibit, self.card, self.rows = folder, exhibit, card, []

    def add(self, model: str, method: str, values: dict[str, float], **settings: object) -> None:
        """Write ``values`` by metric, and say them."""
        for metric, value in values.items():
            row = {"corpus": "random", "model": model, "method": method, "seed": 0, "metric": metric}
            self.rows.append(row | {"value": value, "card": self.card} | settings)
        write_results(pd.DataFrame(self.rows), self.folder, self.exhibit)
        said = ", ".join(f"{metric} {value:.4g}" for metric, value in values.items())
        print(f"{self.exhibit}: {model} {method} {' '.join(map(str, settings.values()))}: {said}", flush=True)


def random_opt(shape: roofline.Shape, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """An OPT of this shape with random weights, drawn on the device itself: a CPU would take minutes."""
    source = loading.small_opt(shape.vocabulary, shape.width, shape.layers, shape.heads, shape.positions)
    with torch.device(device):
        return loading.load_model(source, dtype=dtype, device=device)


def prepare(model: PreTrainedModel, method: str, sequences: Tensor, forget: Tensor) -> Callable[[], object]:
    """What is to be measured. What it starts from, such as the gradients G, is made here, and not measured."""
    if method in ("fisher_dual", "fisher_recursion"):
        gradients = curvature.sequence_gradients(model, sequences)
        if method == "fisher_recursion":
            return lambda: curvature.FisherRecursion(gradients, BLOCK).inverse(DAMPING)
        delta = methods.ascent_direction(model, forget)
        return lambda: curvature.FisherDual(gradients).solve(delta, DAMPING)
    if method == "kfac:request":
        factors = curvature.kfac(model, sequences)
        return lambda: factors.solve(methods.ascent_direction(model, forget), DAMPING)
    if method in ("fisher_dual:streaming", "gauss_newton_product", "hessian_product"):
        delta = methods.ascent_direction(model, forget)
        if method == "fisher_dual:streaming":
            return lambda: curvature.StreamingFisher(model, sequences, BUDGET, delta).solve(delta, DAMPING)
        kind = curvature.Hessian if method == "hessian_product" else curvature.GaussNewton
        product = kind(model, sequences)
        return lambda: product.matvec(delta)
    if method == "ascent":
        start = snapshot(model)
        return lambda: set_weights(model, start, methods.ascent_direction(model, sequences), 1e-3)
    functions = {
        "gradient": cost.plain_pass,
        "sequence_gradients": curvature.sequence_gradients,
        "fisher_diagonal": curvature.FisherDiagonal,
        "kfac": curvature.kfac,
        "ekfac": curvature.ekfac,
        IN_GROUPS: partial(curvature.kfac_in_groups, budget_bytes=ROOM),
        FACTORS_ONLY: layer_factors,
    }
    return lambda: functions[method](model, sequences)


def predict(task: Task, shape: roofline.Shape, forget: int, card: str) -> dict[str, float]:
    """Seconds and peak bytes by the cost model; empty where it has no such route or does not know the card."""
    settings = {"number": task.dtype.itemsize, "block": BLOCK, "budget": BUDGET}
    settings |= {"room": ROOM} if task.method == IN_GROUPS else {}
    routes = roofline.routes(shape, task.m, forget, **settings)
    name = {"ascent": "gradient", FACTORS_ONLY: "kfac", IN_GROUPS: "kfac"}.get(task.method, task.method)
    machine = card_machine(card, task)
    route = routes[name]
    if task.method == FACTORS_ONLY:
        route = replace(route, stages=[s for s in route.stages if s.kind in ("model", "float32")])
    if machine is None:
        return {}
    return {"predicted_seconds": machine.seconds(route), "predicted_bytes": route.peak_bytes}


def measure_routes(
    table: Table,
    device: torch.device,
    plan: Iterable[Task] = PLAN,
    shapes: dict[str, roofline.Shape] = OPT,
    forget: int = 32,
) -> None:
    """Measure every task of ``plan``: seconds, and peak bytes above the weights and what it starts from.

    What takes no more than :data:`LONG` seconds is done again for its time, now that all is warmed up.
    """
    held: tuple[object, PreTrainedModel] | None = None
    for task in plan:
        shape, settings = shapes[task.model], {"precision": task.precision, "m": task.m, "tokens": TOKENS}
        predicted = predict(task, shape, forget, table.card)
        try:
            if held is None or held[0] != (task.model, task.dtype):
                held = None
                free(device)
                held = (task.model, task.dtype), random_opt(shape, task.dtype, device)
            generator = torch.Generator().manual_seed(0)
            sequences = torch.randint(
                1, shape.vocabulary, (task.m + forget, shape.tokens + 1), generator=generator
            )
            with loading.half_precision(device, task.rounding):
                function = prepare(held[1], task.method, sequences[: task.m], sequences[task.m :])
                with cost.Meter(device) as meter:
                    function()
                spent = meter.cost
                if spent.seconds < LONG:
                    spent = replace(spent, seconds=timed(function, device))
            found = {"seconds": spent.seconds, "peak_bytes": spent.peak_bytes}
            if task.method == IN_GROUPS:  # beside the cost model's figure that of the library's planner
                planned = curvature.plan(held[1], sequences[: task.m], ROOM)
                found |= {"planned_bytes": planned.peak_bytes, "groups": len(planned.groups)}
        except torch.OutOfMemoryError:
            found = {"out_of_memory": 1.0}
        except Exception as error:
            print(f"{task}: {type(error).__name__}: {error}", flush=True)
            found = {"failed": 1.0}
        function = spent = None
        free(device)
        table.add(task.model, task.method, found | predicted, **settings)


def measure_speeds(table: Table, device: torch.device, side: int = 8192) -> None:
    """The speeds that the cost model asks for: products of square matrices by number format, and copying."""
    settings = {"m": side, "tokens": 0}
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        a = torch.randn(side, side, device=device).to(dtype)
        timed(lambda a=a: a @ a, device)
        speed = 2 * side**3 / timed(lambda a=a: a @ a, device)
        table.add("", "product", {"flops": speed}, precision=str(dtype).removeprefix("torch."), **settings)
    a = torch.randn(side, side, device=device)
    b = a.clone()
    table.add(
        "", "copy", {"bytes_a_second": 2 * a.nbytes / timed(lambda: b.copy_(a), device)}, precision="", **settings
    )


def measure_decompositions(table: Table, device: torch.device, sides: Iterable[int] = SIDES) -> None:
    """Eigendecompositions of symmetric matrices in float64, as K-FAC takes of its factors."""
    machine = card_machine(table.card)
    for side in sides:
        a = torch.randn(side, side, device=device, dtype=torch.float64)
        a = a @ a.T
        values = {"seconds": timed(lambda a=a: torch.linalg.eigh(a), device)}
        if machine is not None:
            values["predicted_seconds"] = 9 * side**3 / machine.flops["eigen"]
        table.add("", "eigendecomposition", values, precision="float64", m=side, tokens=0)


def measure_inverse(table: Table, device: torch.device, shapes: Iterable[tuple[int, int, int]]) -> None:
    """The time of the recursion that inverts the Fisher's blocks, extrapolated from parts of a large model."""
    names = {shape.d: model for model, shape in OPT.items()}
    for weights, m, block in shapes:
        settings = {"weights": weights, "m": m, "block": block}
        try:
            seconds = inverse_fisher_seconds(weights, m, block, device, repeats=1)
            table.add(
                names.get(weights, ""), "fisher_recursion", {"seconds": seconds}, **settings, seconds=seconds
            )
        except torch.OutOfMemoryError:
            print(f"{table.exhibit}: {settings} does not fit", flush=True)
        free(device)


def timed(function: Callable[[], object], device: torch.device) -> float:
    """Seconds that ``function`` takes, by the clock of the device."""
    read = cost.clock(device)
    started = read()
    function()
    return read() - started


def free(device: torch.device) -> None:
    """Give back what nothing holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
