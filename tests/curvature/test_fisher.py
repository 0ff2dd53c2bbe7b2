import itertools
import math

import pytest
import torch
from helpers import random_sequences, tiny_model
from torch.nn import functional as F

from unlearnlib import weights
from unlearnlib.curvature import fisher_diagonal, fisher_dual, fisher_recursion, per_sequence_gradients
from unlearnlib.losses import sequence_losses
from unlearnlib.models import loading

M, D = 7, 23
LIKE = {"a": torch.zeros(3, 4, dtype=torch.float64), "b": torch.zeros(11, dtype=torch.float64)}
DAMPING = 0.03


@pytest.fixture
def gradients():
    return torch.randn(M, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def v():
    return weights.random_vector(LIKE, torch.Generator().manual_seed(1))


def explicit(gradients, block_size=D):
    """F as a matrix, with nothing outside its diagonal blocks."""
    outer = sum(torch.outer(g, g) for g in gradients) / len(gradients)
    block = torch.arange(gradients.shape[1]) // block_size
    return outer * (block[:, None] == block)


def matrix_power(matrix, exponent, damping):
    s, u = torch.linalg.eigh(matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype))
    return u @ s.pow(exponent).diag() @ u.T


def check(curvature, matrix, v, damping=DAMPING):
    """All three methods against the matrix, and ``v`` left alone."""
    row = weights.flatten(v).clone()
    eye = torch.eye(len(row), dtype=row.dtype)
    results = {"matvec": (curvature.matvec(v), matrix @ row)}
    results["solve"] = (curvature.solve(v, damping), torch.linalg.solve(matrix + damping * eye, row))
    for p in (-1.0, -0.5, -0.25, 0.0, 1.0, 1.7):
        results[p] = (curvature.power(v, p, damping), matrix_power(matrix, p, damping) @ row)
    for ours, theirs in results.values():
        assert [(name, x.shape) for name, x in ours.items()] == [(name, x.shape) for name, x in v.items()]
        torch.testing.assert_close(weights.flatten(ours), theirs, rtol=1e-9, atol=1e-9)
    assert torch.equal(weights.flatten(v), row)


# Inverses and powers


def test_dual_is_the_whole_matrix(gradients, v):
    for damping in (10.0, DAMPING, 1e-4):
        check(fisher_dual.FisherDual(gradients), explicit(gradients), v, damping)


@pytest.mark.parametrize("case", ["more gradients than weights", "one of them twice", "all zero"])
def test_dual_whatever_the_rank(case, gradients, v):
    if case == "more gradients than weights":
        gradients = torch.randn(40, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    elif case == "one of them twice":
        gradients = torch.cat([gradients, gradients[:1]])
    else:
        gradients = torch.zeros_like(gradients)
    check(fisher_dual.FisherDual(gradients), explicit(gradients), v)


def test_eigenvalues_of_the_dual_are_those_of_the_matrix(gradients):
    expected = torch.linalg.eigvalsh(explicit(gradients))
    torch.testing.assert_close(fisher_dual.FisherDual(gradients).eigenvalues, expected[-M:])
    assert expected[:-M].abs().max() < 1e-12


@pytest.mark.parametrize("block_size", [1, 5, 8, 22, 23, 1000])
def test_recursion_is_the_matrix_of_blocks(block_size, gradients, v):
    check(fisher_recursion.FisherRecursion(gradients, block_size), explicit(gradients, block_size), v)


@pytest.mark.parametrize("at_once", [2, 3, M, 50])
@pytest.mark.parametrize("block_size", [1, 5, 1000])
def test_recursion_gives_the_same_however_many_gradients_a_step_takes(at_once, block_size, gradients, v):
    assert M % 3
    check(fisher_recursion.FisherRecursion(gradients, block_size, at_once), explicit(gradients, block_size), v)
    matrices = torch.randn(3, M, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    one_by_one = fisher_recursion.sherman_morrison(matrices, DAMPING)
    torch.testing.assert_close(fisher_recursion.woodbury(matrices, DAMPING, at_once), one_by_one)


@pytest.mark.parametrize("size", [1, 64, 512, 600])
def test_blocks_at_once_fit_a_cache(size):
    here, gpu = (fisher_recursion.blocks_at_once(size, device) for device in ("cpu", "cuda"))
    assert here == max(1, 2**18 // size**2)
    assert gpu == 2**23 // size**2


def test_recursion_over_several_parts(gradients, v, monkeypatch):
    monkeypatch.setattr(fisher_recursion, "blocks_at_once", lambda size, device: 2)
    check(fisher_recursion.FisherRecursion(gradients, 5), explicit(gradients, 5), v)


def test_recursion_answers_for_the_damping_it_is_asked_for(gradients, v):
    curvature = fisher_recursion.FisherRecursion(gradients, 5)
    for damping in (0.1, 1.0, 0.1):
        check(curvature, explicit(gradients, 5), v, damping)


def test_unrolled_recursion_is_the_recursion_and_the_dual(gradients, v):
    row = weights.flatten(v)
    ours = fisher_recursion.unrolled_recursion(gradients, row, DAMPING)
    torch.testing.assert_close(ours, torch.linalg.inv(explicit(gradients) + DAMPING * torch.eye(D)) @ row)
    for other in (fisher_recursion.FisherRecursion(gradients, D), fisher_dual.FisherDual(gradients)):
        torch.testing.assert_close(ours, weights.flatten(other.solve(v, DAMPING)))


def test_single_precision_holds_at_small_damping(v):
    scale = torch.logspace(0, -4, D, dtype=torch.float64)  # eigenvalues from about 1 to 1e-8, damping 1e-6
    gradients = torch.randn(12, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * scale
    gradients = gradients.float()
    expected = matrix_power(explicit(gradients.double()), -1.0, 1e-6) @ weights.flatten(v)
    single = {name: x.float() for name, x in v.items()}
    ours = weights.flatten(fisher_dual.FisherDual(gradients).solve(single, 1e-6))
    assert ours.dtype == torch.float32
    assert (ours - expected).norm() < 1e-4 * expected.norm()


def test_everything_stays_on_the_device_of_the_gradients():
    gradients = torch.zeros(M, D, device="meta")
    v = {name: torch.zeros(x.shape, device="meta") for name, x in LIKE.items()}
    for curvature in (fisher_dual.FisherDual(gradients), fisher_recursion.FisherRecursion(gradients, 5)):
        for result in (curvature.matvec(v), curvature.solve(v, 1.0), curvature.power(v, -0.5, 1.0)):
            assert all(x.is_meta and x.shape == v[name].shape for name, x in result.items())


# Effective rank


def test_effective_rank_of_all_sequences_is_that_of_their_matrix(gradients):
    s = torch.linalg.eigvalsh(explicit(gradients))
    expected = (s.sum().square() / s.square().sum()).item()
    assert fisher_dual.effective_rank(gradients @ gradients.T, M) == pytest.approx(expected)
    orthogonal = torch.diag(torch.full((M,), 3.0))
    assert fisher_dual.effective_rank(orthogonal @ orthogonal, M) == pytest.approx(M)


def test_effective_rank_of_a_sample_is_right_on_average_for_the_set_and_for_the_population(gradients):
    """Over all samples that there are; with gradients of one length only tr F² is estimated, and 1/rank ∝ it."""
    g = F.normalize(gradients, dim=1)
    gram = g @ g.T
    expected = explicit(g).square().sum().item()
    subsets = [list(chosen) for chosen in itertools.combinations(range(M), 4)]
    of_set = [1 / fisher_dual.effective_rank(gram[chosen][:, chosen], M) for chosen in subsets]
    assert sum(of_set) / len(of_set) == pytest.approx(expected)
    draws = [list(chosen) for chosen in itertools.product(range(M), repeat=3)]
    of_population = [1 / fisher_dual.effective_rank(gram[chosen][:, chosen]) for chosen in draws]
    assert sum(of_population) / len(of_population) == pytest.approx(expected)


@pytest.mark.parametrize(("m", "number"), [(1, None), (4, 3)])
def test_effective_rank_needs_a_sample(m, number):
    with pytest.raises(ValueError, match=f"not {m}"):
        fisher_dual.effective_rank(torch.eye(m), number)


# Gradients


def textbook_gradients(model, sequences):
    rows = []
    for sequence in sequences:
        logits = model(input_ids=sequence[None]).logits[0, :-1]
        loss = F.cross_entropy(logits, sequence[1:])
        rows.append(
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(weights.parameters(model).values()))])
        )
    return torch.stack(rows)


@pytest.mark.parametrize("architecture", ["opt", "llama", "gpt2"])
def test_gradients_are_those_of_single_sequences(architecture):
    model, sequences = tiny_model(architecture), random_sequences(4)
    model.get_input_embeddings().weight.requires_grad_(False)
    expected = textbook_gradients(model, sequences)
    torch.testing.assert_close(
        per_sequence_gradients.sequence_gradients(model, sequences), expected, rtol=1e-9, atol=1e-12
    )
    torch.testing.assert_close(per_sequence_gradients.sequence_gradients(model, sequences, number=3), expected[:3])


def test_diagonal_is_the_diagonal():
    model, sequences = tiny_model(), random_sequences(5)
    rows = textbook_gradients(model, sequences)
    v = weights.random_vector(weights.parameters(model), torch.Generator().manual_seed(1))
    row = weights.flatten(v)
    for number, chosen in ((None, rows), (3, rows[:3])):
        diagonal = chosen.square().mean(dim=0)
        curvature = fisher_diagonal.FisherDiagonal(model, sequences, number)
        for ours, theirs in (
            (curvature.matvec(v), diagonal * row),
            (curvature.solve(v, DAMPING), row / (diagonal + DAMPING)),
            (curvature.power(v, -0.25, DAMPING), row / (diagonal + DAMPING).sqrt().sqrt()),
        ):
            torch.testing.assert_close(weights.flatten(ours), theirs)


def test_sampled_labels_give_the_true_fisher(monkeypatch):
    """In expectation, exactly: the mean over all possible labels, each weighed with its probability."""
    vocabulary, tokens = 4, 3
    config = loading.small_opt(vocabulary, hidden_size=4, layers=1, heads=2, context=8)
    model = loading.load_model(config, seed=0, dtype=torch.float64)
    sequence = torch.tensor([[1, 3, 0, 2]])
    live = weights.parameters(model)

    def logits(values):
        kwargs = {"input_ids": sequence[:, :-1], "use_cache": False}
        return torch.func.functional_call(model, values, (), kwargs).logits[0]

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        jacobian = torch.func.jacrev(logits)({name: p.detach() for name, p in live.items()})
    jacobian = torch.cat([j.flatten(start_dim=2) for j in jacobian.values()], dim=2)
    p = logits({name: x.detach() for name, x in live.items()}).softmax(dim=1)
    inner = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    true = torch.einsum("tvi,tvw,twj->ij", jacobian, inner, jacobian) / tokens

    expected = torch.zeros_like(true)
    for labels in itertools.product(range(vocabulary), repeat=tokens):
        monkeypatch.setattr(torch, "multinomial", lambda *_, labels=labels, **__: torch.tensor(labels)[:, None])
        g = per_sequence_gradients.sequence_gradients(
            model, sequence, loss=per_sequence_gradients.sampled_losses(torch.Generator())
        )[0]
        expected += math.prod(p[t, label].item() for t, label in enumerate(labels)) * torch.outer(g, g)
    assert true.abs().max() > 1e-6
    torch.testing.assert_close(expected, true, rtol=1e-9, atol=1e-12)


def test_labels_are_drawn_from_the_model_and_by_the_generator():
    model, sequences = tiny_model(), random_sequences(1).repeat(3000, 1)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # far from uniform, so that drawing uniformly would show
        log_p = model(input_ids=sequences[:1]).logits[0, :-1].log_softmax(1)
        first, again, other = (
            per_sequence_gradients.sampled_losses(torch.Generator().manual_seed(seed))(model, sequences)
            for seed in (0, 0, 1)
        )
    entropies = -(log_p.exp() * log_p).sum(dim=1)
    tokens = len(log_p)
    error = first.std().item() / math.sqrt(len(sequences))
    assert first.mean().item() == pytest.approx(entropies.sum().item() / math.sqrt(tokens), abs=4 * error)
    assert (math.log(log_p.shape[1]) - entropies.mean()) * math.sqrt(tokens) > 40 * error
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# Bad input


def test_more_gradients_than_sequences_is_an_error():
    model, sequences = tiny_model(), random_sequences(3)
    for make in (per_sequence_gradients.sequence_gradients, fisher_diagonal.FisherDiagonal):
        for number in (4, 0):
            with pytest.raises(ValueError, match=rf"m = {number} of 3 sequences: choose m from 1 to 3"):
                make(model, sequences, number)


def test_a_gradient_that_is_not_finite_names_its_sequence():
    model, sequences = tiny_model(), random_sequences(5)
    sequences[sequences == 39] = 1
    sequences[3, 5] = 39

    def loss(model, batch):
        return sequence_losses(model, batch) / (batch != 39).all(dim=1)

    for make in (per_sequence_gradients.sequence_gradients, fisher_diagonal.FisherDiagonal):
        with pytest.raises(FloatingPointError, match="gradient of sequence 3 is not finite"):
            make(model, sequences, loss=loss)


@pytest.mark.parametrize("damping", [0.0, -1.0, math.nan, math.inf])
def test_damping_must_be_positive(damping, gradients, v):
    model = tiny_model()
    model_v = weights.snapshot(model)
    for curvature, vector in (
        (fisher_dual.FisherDual(gradients), v),
        (fisher_recursion.FisherRecursion(gradients, 5), v),
        (fisher_diagonal.FisherDiagonal(model, random_sequences(2)), model_v),
    ):
        for call in (curvature.solve, lambda v, damping, c=curvature: c.power(v, -0.5, damping)):
            with pytest.raises(ValueError, match="damping must be positive"):
                call(vector, damping)
    with pytest.raises(ValueError, match="damping must be positive"):
        fisher_recursion.unrolled_recursion(gradients, weights.flatten(v), damping)


def test_a_block_needs_a_weight(gradients):
    with pytest.raises(ValueError, match="block size must be at least 1, not 0"):
        fisher_recursion.FisherRecursion(gradients, 0)


def test_a_step_of_the_recursion_needs_a_gradient(gradients):
    with pytest.raises(ValueError, match="at least 1 gradient, not 0"):
        fisher_recursion.FisherRecursion(gradients, 5, at_once=0)


def test_a_damping_below_what_single_precision_resolves_is_told_as_such():
    matrices = 1e3 * torch.randn(1, 8, 12, generator=torch.Generator().manual_seed(0))
    with pytest.raises(FloatingPointError, match="too small"):
        fisher_recursion.woodbury(torch.cat([matrices, matrices], dim=1), 1e-9, 4)
