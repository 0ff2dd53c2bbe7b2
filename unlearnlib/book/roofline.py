"""What each route to H⁻¹v would cost on machines that are not at hand: computed, and never measured.

A route is a few stages. A stage takes as long as its arithmetic or as its traffic with memory, whichever is longer
(the roofline model of Williams, Waterman & Patterson 2009), and Python takes time to start it. All three are
counted from the shape of the model. Several processes that share the work also exchange messages, each of which
takes a while however short it is, and then as long as its bytes take.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from unlearnlib.curvature.kronecker_blocks import assign_owners
from unlearnlib.curvature.kronecker_plan import neighbours
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

    All in bytes; ``needs`` is what an earlier route has made, the gradients G or Kronecker factors. All this is of
    one process; ``host_bytes`` is what all of them together keep in the host's memory. ``groups`` of matrices, of
    which each takes a pass, are one unless memory is short.
    """

    stages: list[Stage]
    peak_bytes: float
    needs: float = 0.0
    host_bytes: float = 0.0
    groups: int = 1


@dataclass(frozen=True)
class Machine:
    """What is reached in practice: flops a second by kind, bytes a second, and seconds to start a layer.

    A processor starts a layer and then works on it. A GPU is ``asynchronous``: Python starts the next layers while
    it works, so that a stage takes as long as the longer of the two.

    Bytes a second also between the memories of device and ``host``, and over the ``link`` to another process,
    which takes ``latency`` seconds to bring a message however short it is. Only routes that use them need them.
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
                raise ValueError(f"the route uses a {stage.kind} that the machine lacks: give its bytes a second")
            return stage.traffic / rate + stage.starts * self.latency * (stage.kind == "link")
        work = max(stage.flops / self.flops[stage.kind], stage.traffic / self.bandwidth)
        starts = stage.starts * self.start
        return max(work, starts) if self.asynchronous else work + starts


@dataclass(frozen=True)
class Matrix:
    """A matrix of weights [rows, columns] in ``layer``, a bias among its columns, as Kronecker factors see it.

    ``left`` is the side of its left factor, 0 if that is a diagonal. A tied table has two ``uses``.
    """

    layer: int
    rows: int
    columns: int
    left: int
    uses: int = 1

    @property
    def size(self) -> int:
        """Weights, and eigenvalues."""
        return self.rows * self.columns

    @property
    def bases(self) -> int:
        """Numbers in the two eigenbases."""
        return self.left**2 + self.columns**2

    @property
    def factors(self) -> int:
        """Numbers in all Kronecker factors."""
        return self.uses * ((self.left**2 or self.rows) + self.columns**2)

    @property
    def cubes(self) -> int:
        """The n³ of the decompositions."""
        return self.left**3 + self.columns**3


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

    def matrices(self) -> Iterator[Matrix]:
        """Every matrix of weights, in the order in which the library takes them."""
        h, table = self.width, self.table or self.width
        yield Matrix(0, self.vocabulary, table, left=0, uses=2)
        yield Matrix(0, self.positions + 2, h, left=0)
        if table != h:
            yield Matrix(0, table, h, left=table)
            yield Matrix(0, h, table, left=h)
        for layer in range(self.layers):
            for rows, columns in (*4 * [(h, h)], (4 * h, h), (h, 4 * h)):
                yield Matrix(layer, rows, columns + 1, left=rows)

    @property
    def linear(self) -> int:
        """Weights in the linear layers but the last."""
        h = self.width
        return 12 * self.layers * h**2 + (2 * h * self.table if self.table not in (None, h) else 0)

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


def exchange(operation: str, size: float, processes: int, calls: int = 1) -> list[Stage]:
    """A collective ``operation`` on tensors of ``size`` bytes, in so many ``calls``, as each process sees it.

    The bytes that go over its link and the messages that wait for each other, where all processes form a ring
    (Thakur, Rabenseifner & Gropp 2005). ``size`` is of what comes out, of "all_to_all" of what a process puts in.
    Alone there is nothing to exchange.
    """
    part = 1 - 1 / processes  # of the whole, what a process does not have itself
    # What goes from or to one process is passed on in pieces, so that all links are busy with it at a time.
    over = {"all_reduce": 2 * part, "all_gather": part, "all_to_all": part, "reduce": 1, "broadcast": 1}[operation]
    turns = (2 if operation == "all_reduce" else 1) * (processes - 1)
    return [Stage("link", 0, over * size, turns * calls)] if processes > 1 else []


WHOLE = ("hessian_product", "gauss_newton_product", "newton_cg", "fisher_recursion:unrolled")
WHOLE += ("fisher_dual:streaming", "retrained:epoch")
"""Routes that every process goes alone, however many there are."""
SHARDED = ("gradient", "kfac", "ekfac", "kfac:request")
"""Routes that can be gone where no process has all weights."""


def routes(
    shape: Shape,
    m: int,
    forget: int,
    number: int = 4,
    batch: int = 32,
    block: int = 64,
    budget: int = 2**25,
    processes: int = 1,
    room: float = math.inf,
    sharded: bool = False,
) -> dict[str, Route]:
    """The routes of the book over ``m`` sequences, by name.

    ``number`` bytes a weight, an activation and a number of G, in whose format the recursions work as well;
    Kronecker factors and streaming's sums are in float32, factorisations and the dual form's GGᵀ in float64.
    Passes take ``batch`` sequences at a time, or fewer where those have too many logits; the recursion's blocks
    have ``block`` weights, streaming has ``budget`` bytes for its chunks, or what one row of a layer's gradients
    takes.
    The recursions and the dual form start from the gradients that ``sequence_gradients`` has made, and
    "kfac:request" from built factors and the gradient of ``forget`` sequences; "retrained:epoch" is one epoch.

    Of several ``processes`` the stages are those of the one that has most to do; each goes the routes of
    :data:`WHOLE` alone. If weights are ``sharded`` (FSDP), they are gathered layer by layer in each pass, and only
    the routes of :data:`SHARDED` are left. Where a process has less ``room`` than infinite in its device's memory
    beside the weights, in bytes, K-FAC is built in groups of matrices and kept in the host's memory; a group whose
    first layer is a late one needs no backward pass through the earlier ones.

    The constants of memory count the tensors that are alive at the peak, in this library's code.
    """
    alone = routes(shape, m, forget, number, batch, block, budget) if processes > 1 and not sharded else {}
    d, t, h, trained = shape.d, shape.tokens, shape.width, min(batch, m)
    mine, forget = math.ceil(m / processes), math.ceil(forget / processes)  # sequences of one process
    batch = max(1, min(batch, mine, MOST_LOGITS // (t * shape.vocabulary)))  # as unlearnlib.losses.batches does
    v, gradients = d * number, mine * d * number  # bytes of a vector in weight space, and of a process's part of G
    matrices = list(shape.matrices())
    one_layer = 12 * h * h * number
    # FSDP gathers one layer while the last is still there; what is in no layer stays gathered, and is the tables.
    gathered = 2 * one_layer + (shape.head + shape.positions * h) * number if sharded else 0
    held = v / processes if sharded else v  # of a vector, which is divided as the weights are

    def passes(forwards: float, sequences: int = mine, batch: int = batch) -> list[Stage]:
        """Work of so many forward passes, each of which moves every weight once a batch."""
        activations = 12 * t * shape.layers * h * number + 3 * t * shape.vocabulary * 4
        traffic = forwards * sequences * (v / batch + activations)
        times = forwards * math.ceil(sequences / batch)
        work = Stage("model", forwards * sequences * shape.forward, traffic, times * shape.layers)
        weights = exchange("all_gather", v, processes, shape.layers) if sharded else []
        return [work, *(replace(x, traffic=times * x.traffic, starts=times * x.starts) for x in weights)]

    def float32(flops: float, traffic: float) -> Stage:
        return Stage("float32", flops, traffic)

    def kept(widths: float, outputs: float, scores: float = 0, batch: int = batch) -> float:
        """Bytes of a batch's activations: for each token and layer so many times the width, and so on."""
        layer = (widths * h + scores * shape.heads * t) * number
        return batch * t * (shape.layers * layer + outputs * shape.vocabulary * 4) + gathered

    # Gradients of single sequences come layer by layer, and those of the largest matrix decide how many at a time.
    few = max(1, min(batch, GRADIENT_BYTES // (2 * max(shape.head, 4 * h * h) * number)))
    table_parts = 4 * mine * shape.head * number  # a tied table's two parts are made apart and added up
    layer_bytes = max(kept(12, 3, batch=few) + few * shape.head * number, 2 * few * shape.head * number)
    calls = 16 * shape.layers + 4  # parameters, each of which is exchanged by itself

    owners = assign_owners([x.factors + x.size for x in matrices], processes)
    owner_of = {id(matrix): owner for matrix, owner in zip(matrices, owners, strict=True)}

    def most(group: list[Matrix], size: Callable[[Matrix], float]) -> float:
        """The most that any process has of a group."""
        return max(sum(size(x) for x in group if owner_of[id(x)] == owner) for owner in range(processes))

    # Probabilities in float32, for a moment with the logits they are made of; and 5 widths that are of no layer.
    pass_bytes = kept(14 + 5 / shape.layers, 1 + number / 4)
    eigen_bytes = (
        4 * max(max(x.left, x.columns) for x in matrices) ** 2 * 8
    )  # a matrix, its basis, and LAPACK's two

    def build(corrected: bool) -> Route:
        """K-FAC, or if ``corrected`` EK-FAC."""

        def bytes_of(groups: list[list[Matrix]]) -> float:
            """The peak of building them one after the other, each with all of its matrices in memory."""
            work = max(pass_bytes + corrected * 4 * max(x.size for x in matrices), eigen_bytes)
            return work + max(sum(map(held_bytes, group)) for group in groups)

        def held_bytes(x: Matrix) -> float:
            """Its factors; or of EK-FAC the bases, with K-FAC's eigenvalues and the sums that replace them."""
            return 4 * (max(x.factors, x.bases + 2 * x.size) if corrected else x.factors)

        stages, total = [], sum(x.factors for x in matrices)
        for number_of in range(1, len(matrices) + 1):  # as unlearnlib.curvature.kronecker_plan fills groups
            groups = neighbours(matrices, lambda x: x.factors, total / number_of)
            if bytes_of(groups) <= room:
                break
        for group in groups:
            early = group[0].layer / shape.layers * (shape.forward - 2 * t * shape.head) / shape.forward
            factors, bases, sizes = (sum(getattr(x, of) for x in group) for of in ("factors", "bases", "size"))
            products = float32(2 * mine * t * factors, 2 * mine / batch * factors * 4)
            cubes, tied = (most(group, lambda x, k=k: x.cubes * (x.uses > k)) for k in (0, 1))
            stages += [*passes(2 - early), products]  # forward, and backward without the gradients of the weights
            stages += exchange("reduce", 4 * factors, processes, 2 * sum(x.uses for x in group))
            stages += [Stage("eigen", 9 * cubes), Stage("float64", 4 * tied)]
            if corrected:
                stages += exchange("broadcast", 4 * bases, processes, 2 * len(group))
                stages += [*passes(2 - early), products, float32(2 * mine * t * sizes, 2 * mine * sizes * 4)]
                stages += exchange("reduce", 4 * sizes, processes, len(group))
        if room == math.inf:  # and all factors are there until all are decomposed
            factors_bytes = 4 * most(matrices, lambda x: x.factors)
            return Route(stages, max(bytes_of(groups), factors_bytes + own_bytes + eigen_bytes))
        kept_bytes = 4 * sum(x.bases + x.size for x in matrices)
        return Route([*stages, Stage("host", 0, own_bytes)], bytes_of(groups), 0, kept_bytes, len(groups))

    own_bytes = 4 * most(matrices, lambda x: x.bases + x.size)
    rotations = 4 * most(matrices, lambda x: x.size * (x.left + x.columns))
    one = max(1, min(batch, forget))  # sequences at a time for Δ
    request_stages = [*passes(3, forget, one), *exchange("all_reduce", v, processes, calls)]
    request_bytes = max(kept(12, 3, batch=one), 2 * held) + 2 * held
    if sharded:
        request_stages[-1:] = exchange(
            "all_gather", v, processes, calls
        )  # sums come with the pass, and then Δ is put together
    if room < math.inf:  # each matrix comes from the host when its turn comes
        request_stages.append(Stage("host", 0, own_bytes))
        request_bytes += 4 * max(x.bases + x.size for x in matrices)
    request_stages += [
        float32(rotations, 2 * own_bytes),
        *exchange("broadcast", v, processes, calls),
    ]
    request_needs = own_bytes if room == math.inf else 0
    found = {
        "gradient": Route(
            [*passes(3), *([] if sharded else exchange("all_reduce", v, processes, calls))], kept(12, 3) + held
        ),
        "kfac": build(corrected=False),
        "ekfac": build(corrected=True),
        "kfac:request": Route(request_stages, request_bytes, request_needs),
    }
    if sharded:
        return found

    share = d / processes  # columns of G
    columns = exchange("all_to_all", gradients, processes)
    found |= {
        "sequence_gradients": Route(
            [*passes(3, batch=few), float32(0, 4 * gradients + table_parts)], gradients + layer_bytes
        ),
        "fisher_recursion": Route(
            [*columns, Stage("model", 4 * m * share * block, 3 * m * share * number * block)],
            gradients + v / processes * block,
            gradients,
        ),
        "fisher_dual": Route(
            [
                *columns,
                Stage("float64", 2 * lower_triangle(m, 128) * share, gradients),
                *exchange("all_reduce", 8 * m * m, processes),
                Stage("eigen", 9 * m**3),
                Stage("model", 4 * m * share, 2 * gradients),
                *exchange("all_reduce", m * number, processes),
                *exchange("all_gather", v, processes),
            ],
            max(3 * v, 4096 * 8 * m + 24 * m * m) + (2 * gradients if columns else 0),
            gradients,
        ),
        "fisher_diagonal": Route(
            [
                *passes(3, batch=few),
                float32(2 * mine * d, 5 * gradients + table_parts),
                *exchange("all_reduce", v, processes, calls),
            ],
            v + layer_bytes,
        ),
    }
    if processes > 1:
        return found | {name: alone[name] for name in WHOLE}

    own_gradients = 2 * m * t * (shape.linear + shape.head)
    own_gram = float32(own_gradients + 2 * lower_triangle(m, 64) * d, 2 * m * d * 4)
    head = 3 * 2 * m * t * shape.head  # streaming's own products with the output layer: logits twice, and back
    [trunk] = passes(3, batch=m)
    trunk = replace(trunk, flops=trunk.flops - head)
    chunk = max(budget, m * max(t + (shape.table or h), 4 * h) * 4)  # at least a row of the widest layer of all
    return found | {
        "hessian_product": Route(passes(9), kept(27, 6, 3) + 4 * v),
        "gauss_newton_product": Route(passes(6), kept(12, 9, 1) + 2 * v),
        "newton_cg": Route([*passes(6), float32(10 * d, 10 * v)], kept(12, 9, 1) + 6 * v),
        "fisher_recursion:unrolled": Route(
            [Stage("model", 2 * m**2 * d, m * gradients)], gradients + 4 * v, gradients
        ),
        "fisher_dual:streaming": Route(
            [trunk, float32(head, 0), own_gram, Stage("eigen", 9 * m**3), *passes(3)],
            max(chunk + m * t * h * (shape.layers + 20) * number, v + kept(12, 3)) + 2 * v,
        ),
        "retrained:epoch": Route(  # AdamW is a list of operations, which together read or write 20 vectors
            [*passes(3, batch=trained), float32(15 * d * m / trained, 20 * v * m / trained)],
            kept(12, 3, batch=trained) + 3 * v,
        ),
    }
