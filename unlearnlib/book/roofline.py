"""What each route to H⁻¹v would cost on a machine that is not at hand: computed, and never measured.

A route is a few stages. A stage takes as long as its arithmetic or as its traffic with memory, whichever is longer
(the roofline model of Williams, Waterman & Patterson 2009), and Python takes time to start it. All three are
counted from the shape of the model.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from unlearnlib.curvature.per_sequence_gradients import GRADIENT_BYTES
from unlearnlib.losses import MOST_LOGITS


@dataclass(frozen=True)
class Stage:
    """Work of one ``kind``: ``flops``, bytes of ``traffic``, and how often a layer's forward pass ``starts``.

    A layer's backward pass is as much work as two forward ones, and counts as two. Of the kinds "host" and "link"
    there is traffic alone, with the memory of the host and with another process; a message there is one start.
    """

    kind: str
    flops: float
    traffic: float = 0.0
    starts: float = 0.0


@dataclass(frozen=True)
class Route:
    """The stages of a route, one after the other, and its peak memory above the weights and what it ``needs``.

    Both in bytes; ``needs`` is what an earlier route has made, the gradients G or Kronecker factors.
    """

    stages: list[Stage]
    peak_bytes: float
    needs: float = 0.0


@dataclass(frozen=True)
class Machine:
    """What is reached in practice: flops a second by kind, bytes a second, and seconds to start a layer.

    A processor starts a layer and then works on it. A GPU is ``asynchronous``: Python starts the next layers while
    it works, so that a stage takes as long as the longer of the two.

    Bytes a second also between the memories of device and ``host``, and over the ``link`` to another process, which
    takes ``latency`` seconds to bring a message however short it is. Only routes that use them need them.
    """

    flops: dict[str, float]
    bandwidth: float
    start: float
    asynchronous: bool = False
    host: float = 0.0
    link: float = 0.0
    latency: float = 0.0

    def seconds(self, route: Route) -> float:
        """The time of all stages. Raises ValueError naming what a stage needs and the machine does not have."""
        return sum(map(self.stage_seconds, route.stages))

    def stage_seconds(self, stage: Stage) -> float:
        """The time of one stage. Raises ValueError as :meth:`seconds`."""
        if stage.kind in ("host", "link"):
            rate = getattr(self, stage.kind)
            if not rate:
                raise ValueError(
                    f"the route needs a machine with a rate to the {stage.kind}: give it in bytes a second"
                )
            return stage.traffic / rate + stage.starts * self.latency * (stage.kind == "link")
        work = max(stage.flops / self.flops[stage.kind], stage.traffic / self.bandwidth)
        starts = stage.starts * self.start
        return max(work, starts) if self.asynchronous else work + starts


@dataclass(frozen=True)
class Shape:
    """A decoder of OPT's kind, and ``tokens``, the number T of tokens that it predicts in each sequence.

    ``table`` is the width of the token table where it is not ``width``; the output layer is tied to the table.
    """

    layers: int
    width: int
    heads: int
    vocabulary: int
    positions: int
    tokens: int
    table: int | None = None

    def matrices(self) -> Iterator[tuple[int, int, int]]:
        """Outputs and inputs of the linear layers but the last, and how often the model has such a layer."""
        h = self.width
        yield h, h, 4 * self.layers
        yield 4 * h, h, self.layers
        yield h, 4 * h, self.layers
        if self.table not in (None, h):
            yield h, self.table, 1
            yield self.table, h, 1

    @property
    def linear(self) -> int:
        """Weights in these layers."""
        return sum(out * ins * number for out, ins, number in self.matrices())

    @property
    def head(self) -> int:
        """Weights in the token table, which is the output layer as well."""
        return self.vocabulary * (self.table or self.width)

    @property
    def d(self) -> int:
        """All weights; a projection between table and layers replaces the last norm, as in OPT-350M."""
        final = 2 if self.table in (None, self.width) else 0
        return self.linear + self.head + (13 * self.layers + self.positions + 2 + final) * self.width

    @property
    def forward(self) -> int:
        """Operations of one sequence's forward pass: two a weight and token, and T² scores in the attention."""
        t = self.tokens
        return 2 * t * (self.linear + self.head) + 4 * t * t * self.width * self.layers


def lower_triangle(m: int, strip: int) -> int:
    """Multiplications for each column of G in the lower triangle of GGᵀ [m, m], made in strips of so many columns.

    The squares on the diagonal are made whole, so it is m (m + strip) / 2 where ``strip`` divides m, and m² up to
    m = ``strip``.
    """
    return sum((m - i) * min(strip, m - i) for i in range(0, m, strip))


def routes(
    shape: Shape, m: int, forget: int, number: int = 4, batch: int = 32, block: int = 64, budget: int = 2**25
) -> dict[str, Route]:
    """The routes of the book over ``m`` sequences, by name.

    ``number`` bytes a weight, an activation and a number of G, in whose format the recursions work as well;
    Kronecker factors and streaming's sums are in float32, factorisations and the dual form's GGᵀ in float64.
    Passes take ``batch`` sequences at a time, or fewer where those have too many logits; the recursion's blocks
    have ``block`` weights, streaming has ``budget`` bytes for its chunks, or what one row of a layer's gradients
    takes.
    The recursions and the dual form start from the gradients that ``sequence_gradients`` has made, and
    "kfac:request" from built factors and the gradient of ``forget`` sequences; "retrained:epoch" is one epoch.

    The constants of memory count the tensors that are alive at the peak, in this library's code.
    """
    d, t, h, trained = shape.d, shape.tokens, shape.width, min(batch, m)
    batch = max(1, min(trained, MOST_LOGITS // (t * shape.vocabulary)))  # as unlearnlib.losses.batches cuts them
    v, gradients = d * number, m * d * number  # bytes of a vector in weight space, and of G

    def passes(forwards: int, sequences: int = m, batch: int = batch) -> Stage:
        """Work of so many forward passes, each of which moves every weight once a batch."""
        activations = 12 * t * shape.layers * h * number + 3 * t * shape.vocabulary * 4
        traffic = forwards * sequences * (v / batch + activations)
        starts = forwards * shape.layers * math.ceil(sequences / batch)
        return Stage("model", forwards * sequences * shape.forward, traffic, starts)

    def float32(flops: float, traffic: float) -> Stage:
        return Stage("float32", flops, traffic)

    def kept(widths: float, outputs: float, scores: float = 0, batch: int = batch) -> float:
        """Bytes of a batch's activations: for each token and layer so many times the width, and so on."""
        layer = (widths * h + scores * shape.heads * t) * number
        return batch * t * (shape.layers * layer + outputs * shape.vocabulary * 4)

    # Gradients of single sequences come layer by layer, and those of the largest matrix decide how many at a time.
    few = max(1, min(batch, GRADIENT_BYTES // (2 * max(shape.head, 4 * h * h) * number)))
    table_parts = 4 * m * shape.head * number  # a tied table's two parts are made apart and added up
    layer_bytes = max(kept(12, 3, batch=few) + few * shape.head * number, 2 * few * shape.head * number)

    sides = [(out, ins + 1, count) for out, ins, count in shape.matrices()]  # the bias is one more input
    table = shape.table or h
    squares = sum((a**2 + b**2) * k for a, b, k in sides) + table**2 + h**2  # numbers in all Kronecker factors
    cubes = sum((a**3 + b**3) * k for a, b, k in sides) + table**3 + h**3
    rotations = 4 * sum((a * a * b + a * b * b) * k for a, b, k in sides) + 4 * shape.head * table
    covariances = 2 * m * t * (squares + table**2)
    factors = [
        passes(2),  # forward, and backward without the gradients of the weights
        float32(covariances, 2 * m / batch * squares * 4),
        Stage("eigen", 9 * cubes),
        Stage("float64", 2 * cubes),
    ]
    own_gradients = 2 * m * t * (shape.linear + shape.head)
    own_gram = float32(own_gradients + 2 * lower_triangle(m, 64) * d, 2 * m * d * 4)
    head = 3 * 2 * m * t * shape.head  # streaming's own products with the output layer: logits twice, and back
    trunk = passes(3, batch=m)
    trunk = replace(trunk, flops=trunk.flops - head)
    decomposition = Stage("eigen", 9 * m**3)
    pass_bytes = (
        kept(14, 6) if m == batch else kept(14, 8) + squares * 4
    )  # the last batch's logits are still there
    factors_bytes = max(pass_bytes, 2 * squares * 4 + 6 * (4 * h) ** 2 * 8) + d * 4
    one = min(batch, forget)  # sequences at a time for Δ
    chunk = max(budget, m * max(t + table, 4 * h) * 4)  # at least a row of the widest layer of all sequences

    return {
        "gradient": Route([passes(3)], kept(12, 3) + v),
        "hessian_product": Route([passes(9)], kept(27, 6, 3) + 4 * v),
        "gauss_newton_product": Route([passes(6)], kept(12, 9, 1) + 2 * v),
        "newton_cg": Route([passes(6), float32(10 * d, 10 * v)], kept(12, 9, 1) + 6 * v),
        "sequence_gradients": Route(
            [passes(3, batch=few), float32(0, 4 * gradients + table_parts)], gradients + layer_bytes
        ),
        "fisher_recursion": Route(
            [Stage("model", 4 * m * d * block, 3 * gradients * block)],
            gradients + v * block,
            gradients,
        ),
        "fisher_recursion:unrolled": Route(
            [Stage("model", 2 * m**2 * d, m * gradients)], gradients + 4 * v, gradients
        ),
        "fisher_dual": Route(
            [
                Stage("float64", 2 * lower_triangle(m, 128) * d, gradients),
                decomposition,
                Stage("model", 4 * m * d, 2 * gradients),
            ],
            max(4 * v, 4096 * 8 * m + 24 * m * m),
            gradients,
        ),
        "fisher_dual:streaming": Route(
            [trunk, float32(head, 0), own_gram, decomposition, passes(3)],
            max(chunk + m * t * h * (shape.layers + 20) * number, v + kept(12, 3)) + 2 * v,
        ),
        "fisher_diagonal": Route(
            [passes(3, batch=few), float32(2 * m * d, 5 * gradients + table_parts)], v + layer_bytes
        ),
        "kfac": Route(factors, factors_bytes),
        "ekfac": Route(
            [*factors, passes(2), float32(covariances + own_gradients, 2 * m * d * 4)],
            max(factors_bytes, pass_bytes + (squares + d) * 4) + d * 4,
        ),
        "kfac:request": Route(
            [passes(3, forget, one), float32(rotations, (2 * squares + 4 * d) * 4)],
            max(kept(12, 3, batch=one), 2 * v) + 2 * v,
            (squares + d) * 4,
        ),
        "retrained:epoch": Route(  # AdamW is a list of operations, which together read or write 20 vectors
            [passes(3, batch=trained), float32(15 * d * m / trained, 20 * v * m / trained)],
            kept(12, 3, batch=trained) + 3 * v,
        ),
    }
