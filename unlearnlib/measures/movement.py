"""How the weights of a model have moved: how far, which way, where, and how evenly."""

import math
import re

import torch
from torch import Tensor

from unlearnlib.weights import Vector, difference, dot

KINDS = {
    "norm": r"norm|(^|\.)ln_",
    "head": r"lm_head|embed_out",
    "embedding": r"embed|wte|wpe|project_(in|out)",
    "bias": r"\.bias$",
    "query": r"q_proj",
    "key": r"k_proj",
    "value": r"v_proj",
    "query, key, value": r"c_attn|query_key_value",
    "attention out": r"(attn|attention)\.(out_proj|o_proj|c_proj|dense)",
    "MLP in": r"(^|\.)fc1|c_fc|gate_proj|up_proj|h_to_4h",
    "MLP out": r"(^|\.)fc2|mlp\.c_proj|down_proj|4h_to_h",
}
"""By kind of weights, what a parameter's name contains; the first that fits counts."""


def place(name: str) -> tuple[int | None, str]:
    """The layer of a parameter, None outside the layers, and its kind, one of :data:`KINDS`, from its name.

    Knows the names of OPT, GPT-2, GPT-NeoX and Llama models and of those built like them. Raises ValueError for
    a name of no known kind.
    """
    for kind, pattern in KINDS.items():
        if re.search(pattern, name):
            layer = re.search(r"\.(\d+)\.", name)
            return int(layer[1]) if layer else None, kind
    raise ValueError(f"{name!r} is a parameter of no known kind: add what its name contains to KINDS")


def relative_movement(delta: Vector, start: Vector) -> dict[tuple[int | None, str], float]:
    """By layer and kind, how far the weights have moved: ‖δ‖ / ‖θ‖ over all parameters of that place."""
    moved: dict[tuple[int | None, str], float] = {}
    length: dict[tuple[int | None, str], float] = {}
    for name in delta:
        at = place(name)
        moved[at] = moved.get(at, 0.0) + delta[name].double().square().sum().item()
        length[at] = length.get(at, 0.0) + start[name].double().square().sum().item()
    return {at: math.sqrt(moved[at] / length[at]) if length[at] else math.nan for at in moved}


def excess_kurtosis(values: Tensor) -> float:
    """E(x − x̄)⁴ / (E(x − x̄)²)² − 3 of the entries of ``values``: 0 of a normal distribution, −2 of ±1.

    Raises ValueError if all entries are alike.
    """
    squares = (values.double() - values.double().mean()).square()
    variance = squares.mean()
    if variance == 0:
        raise ValueError("all entries are alike: they have no kurtosis")
    return (squares.square().mean() / variance.square()).item() - 3


def alike(delta: Vector) -> Vector:
    """``delta`` with each parameter's entries divided by their root mean square; what has not moved stays 0."""
    return {name: x / x.square().mean().sqrt() if x.any() else x for name, x in delta.items()}


def largest_share(values: Tensor, share: float = 0.01) -> float:
    """Which part of Σ x² is in the largest ``share`` of the entries, by size: ``share`` if all are of one size.

    Raises ValueError if ``share`` is not between 0 and 1, or if all entries are zero.
    """
    if not 0 < share < 1:
        raise ValueError(f"the share must lie between 0 and 1, unlike {share}")
    squares = values.double().square().flatten()
    total = squares.sum()
    if total == 0:
        raise ValueError("all entries are zero: nothing has moved")
    return (squares.topk(max(1, round(share * len(squares)))).values.sum() / total).item()


def subspace_overlap(a: Tensor, b: Tensor, k: int) -> tuple[float, float]:
    """How far the top ``k`` left, and right, singular subspaces of two matrices [rows, columns] are the same.

    Of either side ‖Uᵀ V‖²_F / k, the mean squared cosine of the k principal angles: 1 if the subspaces are one,
    0 if they are orthogonal, and on average k / n if one of them is drawn at random in n dimensions.
    Raises ValueError if the matrices differ in shape or have no k singular vectors.
    """
    if a.shape != b.shape or not 1 <= k <= min(a.shape):
        raise ValueError(f"matrices of shapes {tuple(a.shape)} and {tuple(b.shape)} share no {k} singular vectors")
    (u, _, v), (w, _, z) = (torch.linalg.svd(x.double(), full_matrices=False) for x in (a, b))
    sides = ((u[:, :k], w[:, :k]), (v[:k].T, z[:k].T))
    left, right = ((one.T @ other).square().sum().item() / k for one, other in sides)
    return left, right


def way_left(delta: Vector, retrained: Vector, image: Vector, image_again: Vector) -> float:
    """How much of the squared distance to the mean retrained model is left after moving by ``delta``.

    That is ⟨δ − r, M(δ − r')⟩ / ⟨r, M r'⟩, where r and r' say where two retrained models lie, counted from the
    original as δ is, and ``image`` and ``image_again`` are Mδ and Mr' under the matrix of the metric; for
    Euclidean distance δ and r' themselves. The two must differ by chance alone, and by chances that are
    independent: then numerator and denominator have the squared distances to the *mean* retrained model as
    expectations, without the part that is chance. The original itself is at 1.
    Raises ValueError if ⟨r, M r'⟩ is not positive, so that there is no way.
    """
    way = dot(retrained, image_again).item()
    if not way > 0:
        raise ValueError(
            f"two retrained models lie in directions whose inner product is {way:.3g}: chance hides the way"
        )
    return dot(difference(delta, retrained), difference(image, image_again)).item() / way
