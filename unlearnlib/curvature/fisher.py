"""The Fisher matrix of a set of sequences, and its inverse by the routes that do not form it.

F = (1/m) Σ gᵢ gᵢᵀ = GᵀG/m over m sequences, where gᵢ, row i of G [m, d], is the gradient of sequence i's own
loss: the mean cross-entropy of its tokens for the empirical Fisher (``sequence_losses``), the loss of labels that
the model has drawn for the true one (:func:`sampled_losses`). Columns of G are in the order of
:func:`unlearnlib.weights.flatten`.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from unlearnlib.curvature.capture import SequenceLoss, each_gradient, gradient_batches
from unlearnlib.curvature.protocol import check_damping, take
from unlearnlib.losses import log_probabilities, sequence_losses
from unlearnlib.weights import Vector, flatten, parameters, unflatten


def sequence_gradients(
    model: PreTrainedModel, sequences: Tensor, number: int | None = None, loss: SequenceLoss = sequence_losses
) -> Tensor:
    """G: the gradient of each of the first ``number`` sequences [n, tokens], or of all, a row each, [m, d].

    Raises ValueError if there are fewer than ``number`` sequences, and as
    :func:`unlearnlib.curvature.capture.each_gradient`: among others FloatingPointError naming the sequence whose
    gradient is not finite.
    """
    chosen = take(sequences, number)
    sizes = {name: p.numel() for name, p in parameters(model).items()}
    rows = next(model.parameters()).new_empty(len(chosen), sum(sizes.values()))
    columns = dict(zip(sizes, rows.split(list(sizes.values()), dim=1), strict=True))

    def receive(name: str, gradients: Tensor) -> None:
        columns[name][start : start + len(gradients)] = gradients.flatten(start_dim=1)

    start = 0
    for batch in gradient_batches(model, chosen):
        each_gradient(model, batch, loss, receive, start)
        start += len(batch)
    return rows


def sampled_losses(generator: torch.Generator) -> SequenceLoss:
    """The loss whose per-sequence gradients give the true Fisher, in expectation over the labels it draws.

    Each label is drawn from the model's own prediction, on the CPU and sequence by sequence, so that
    ``generator`` gives the same labels on every device and in batches of any size. A sequence's loss is the sum
    over its T predicted tokens, divided by √T: the tokens' cross terms vanish in expectation, so that E[g gᵀ] =
    (1/T) Σ_t J_tᵀ (diag p_t − p_t p_tᵀ) J_t, which is the Gauss–Newton matrix of the sequence's mean loss.
    """

    def loss(model: PreTrainedModel, sequences: Tensor) -> Tensor:
        log_p = log_probabilities(model, sequences)
        p = log_p.detach().exp().cpu()
        labels = torch.stack([torch.multinomial(one, 1, generator=generator) for one in p]).to(log_p.device)
        return -log_p.gather(2, labels).sum(dim=(1, 2)) / math.sqrt(log_p.shape[1])

    return loss


class FisherRecursion:
    """Fisher blocks inverted by the recursion of WoodFisher (Singh & Alistarh 2020), a gradient at a time.

    ``gradients`` is G [m, d]. Of F only the diagonal blocks of ``block_size`` neighbouring weights are kept, the
    last of which may be smaller; ``block_size >= d`` keeps all of F. The recursion starts from I/λ, so each λ
    runs it afresh, in O(m d block_size) time; the inverse of the last λ is kept, d · block_size numbers.
    """

    chunk = 2**18  # entries of inverses at work at a time: few enough to stay in a processor's cache

    def __init__(self, gradients: Tensor, block_size: int) -> None:
        if block_size < 1:
            raise ValueError(f"the block size must be at least 1, not {block_size}")
        m, self.d = gradients.shape
        size = min(block_size, self.d)
        # Zeros after the last weight: they couple to nothing, so a last block that is shorter stays exact.
        self.blocks = torch.nn.functional.pad(gradients, (0, -self.d % size)).view(m, -1, size).transpose(0, 1)
        self._inverse: tuple[float, Tensor] | None = None

    def matvec(self, v: Vector) -> Vector:
        """F v, block by block."""
        return self._apply(lambda rows: self.blocks.mT @ (self.blocks @ rows) / self.blocks.shape[1], v)

    def solve(self, v: Vector, damping: float) -> Vector:
        """(F + λI)⁻¹ v, with the recursion's inverse."""
        return self._apply(lambda rows: self.inverse(damping) @ rows, v)

    def power(self, v: Vector, exponent: float, damping: float) -> Vector:
        """(F + λI)^p v. The recursion gives the inverse alone, so this takes each block's eigendecomposition."""
        check_damping(damping)
        s, u = torch.linalg.eigh(self.blocks.mT @ self.blocks / self.blocks.shape[1])
        powers = (s.clamp(min=0) + damping).pow(exponent)
        return self._apply(lambda rows: u @ (powers[..., None] * (u.mT @ rows)), v)

    def inverse(self, damping: float) -> Tensor:
        """The blocks of (F + λI)⁻¹, shape [blocks, size, size]."""
        check_damping(damping)
        if self._inverse is None or self._inverse[0] != damping:
            number, _, size = self.blocks.shape
            inverse = self.blocks.new_empty(number, size, size)
            at_once = max(1, self.chunk // size**2)
            for result, part in zip(inverse.split(at_once), self.blocks.split(at_once), strict=True):
                result.copy_(sherman_morrison(part, damping))
            self._inverse = damping, inverse
        return self._inverse[1]

    def _apply(self, function: Callable[[Tensor], Tensor], v: Vector) -> Vector:
        row = torch.nn.functional.pad(flatten(v), (0, -self.d % self.blocks.shape[2]))
        return unflatten(function(row.view(len(self.blocks), -1, 1)).reshape(-1)[: self.d], v)


def sherman_morrison(blocks: Tensor, damping: float) -> Tensor:
    """(BᵀB/m + λI)⁻¹ of each of ``blocks`` B [blocks, m, size], by m updates of rank one."""
    number, m, size = blocks.shape
    inverse = torch.eye(size, dtype=blocks.dtype, device=blocks.device).div(damping).repeat(number, 1, 1)
    for g in blocks.transpose(0, 1)[..., None].contiguous():
        column = inverse @ g
        column = column / (m + g.mT @ column).sqrt()
        inverse.baddbmm_(column, column.mT, alpha=-1)
    return inverse


def unrolled_recursion(gradients: Tensor, v: Tensor, damping: float) -> Tensor:
    """(F + λI)⁻¹ v by the same recursion for all of F, without a matrix of d × d.

    Each update is kept as its vector, m in all, and applied to whatever is multiplied next: O(m² d) time.
    ``gradients`` is G [m, d], ``v`` [d].
    """
    check_damping(damping)
    m = len(gradients)
    columns = torch.empty_like(gradients)
    for i, g in enumerate(gradients):
        column = g / damping - (columns[:i] @ g) @ columns[:i]
        columns[i] = column / (m + g @ column).sqrt()
    return v / damping - (columns @ v) @ columns


class FisherDual:
    """All of F, through the m × m matrix GGᵀ, which has the eigenvalues of GᵀG: no blocks, no recursion.

    With GGᵀ = U diag(s) Uᵀ, for every exponent p and damping λ

        (F + λI)^p v = λ^p v + Gᵀ U diag(((s/m + λ)^p − λ^p)/s) Uᵀ G v.

    ``gradients`` is G [m, d], which is kept and not copied. ``eigenvalues`` of F [m], ascending; all others are 0.
    """

    def __init__(self, gradients: Tensor) -> None:
        self.gradients = gradients
        s, self.vectors = torch.linalg.eigh(gram(gradients), UPLO="L")
        self.eigenvalues = s.clamp(min=0) / len(gradients)

    def matvec(self, v: Vector) -> Vector:
        """F v."""
        row = flatten(v)
        return unflatten((self.gradients @ row) @ self.gradients / len(self.gradients), v)

    def solve(self, v: Vector, damping: float) -> Vector:
        """(F + λI)⁻¹ v."""
        return self.power(v, -1.0, damping)

    def power(self, v: Vector, exponent: float, damping: float) -> Vector:
        """(F + λI)^p v."""
        check_damping(damping)
        row, gain = flatten(v), power_gain(self.eigenvalues, exponent, damping)
        mixture = self.vectors @ (gain * (self.vectors.mT @ (self.gradients @ row).to(gain.dtype)))
        change = mixture.to(row.dtype) @ self.gradients / len(self.gradients)
        return unflatten(damping**exponent * (row + change), v)


def power_gain(eigenvalues: Tensor, exponent: float, damping: float) -> Tensor:
    """((f + λ)^p / λ^p − 1) / f for each eigenvalue f, and its limit p/λ for f → 0.

    Without loss of digits where f is small beside λ.
    """
    f = eigenvalues
    return torch.where(f > 0, torch.expm1(exponent * torch.log1p(f / damping)) / f, exponent / damping)


def gram(gradients: Tensor, columns: int = 4096, rows: int = 128) -> Tensor:
    """The lower triangle of GGᵀ [m, m], in float64 whatever G has: rounding shows in small eigenvalues."""
    gram = gradients.new_zeros(len(gradients), len(gradients), dtype=torch.float64)
    for part in gradients.split(columns, dim=1):
        part = part.double()
        for i in range(0, len(part), rows):
            gram[i:, i : i + rows].addmm_(part[i:], part[i : i + rows].T)
    return gram


def effective_rank(gram: Tensor, number: int | None = None) -> float:
    """(tr F)² / tr F², estimated from the inner products ``gram`` = GGᵀ [m, m] of gradients drawn at random.

    F is the Fisher of ``number`` sequences, of which these m are a sample without replacement, or where it is None
    of the whole population they come from. tr F² is the mean of (gᵢᵀgⱼ)² over all pairs, and (tr F)² that of
    gᵢᵀgᵢ gⱼᵀgⱼ. The pairs i = j have the share 1/number, none in a population, and must not be given the share 1/m
    that they have in the sample. Both means are then without bias, and their quotient nearly so.

    Raises ValueError if there are less than two gradients, or more than ``number``.
    """
    m = len(gram)
    if m < 2 or (number is not None and number < m):
        raise ValueError(f"need 2 gradients or more, and no more than there are ({number}), not {m}")
    gram = gram.double()
    lengths, same = gram.diagonal(), 0.0 if number is None else 1 / number
    equal = lengths.square().sum()

    def mean(over_all_pairs: Tensor) -> Tensor:
        return same * equal / m + (1 - same) * (over_all_pairs - equal) / (m * (m - 1))

    return (mean(lengths.sum().square()) / mean(gram.square().sum())).item()


class FisherDiagonal:
    """The diagonal of F: d numbers, added up batch by batch and layer by layer, without ever holding G.

    Sequences and ``loss`` as for :func:`sequence_gradients`, which also says what is raised.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sequences: Tensor,
        number: int | None = None,
        loss: SequenceLoss = sequence_losses,
    ) -> None:
        chosen = take(sequences, number)
        self.diagonal = {name: torch.zeros_like(p) for name, p in parameters(model).items()}

        def receive(name: str, gradients: Tensor) -> None:
            for g in gradients:
                self.diagonal[name].addcmul_(g, g, value=1 / len(chosen))

        start = 0
        for batch in gradient_batches(model, chosen):
            each_gradient(model, batch, loss, receive, start)
            start += len(batch)

    def matvec(self, v: Vector) -> Vector:
        """diag(F) v."""
        return {name: self.diagonal[name] * x for name, x in v.items()}

    def solve(self, v: Vector, damping: float) -> Vector:
        """(diag(F) + λI)⁻¹ v."""
        return self.power(v, -1.0, damping)

    def power(self, v: Vector, exponent: float, damping: float) -> Vector:
        """(diag(F) + λI)^p v."""
        check_damping(damping)
        return {name: (self.diagonal[name] + damping).pow(exponent) * x for name, x in v.items()}
