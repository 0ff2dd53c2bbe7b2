"""Kronecker factors against explicit Fisher matrices, block by block, in float64."""

import pytest
import torch
from helpers import ARCHITECTURES, VOCABULARY, random_sequences, tiny_model

from unlearnlib import kronecker, measures, weights

SEQUENCES = random_sequences(6, 5)
BUILDERS = {"kfac": kronecker.kfac, "ekfac": kronecker.ekfac, "diagonal": kronecker.diagonal}


def tolerance(architecture):
    return 1e-5 if architecture == "llama" else 1e-9  # Llama's norm rounds to float32, whatever we ask for


@pytest.fixture
def datas_labels(monkeypatch):
    """In place of drawn labels those of the data, so that an explicit matrix can be made with the same."""

    def follow(sequences):
        rows = iter(sequences[:, 1:, None].split(32))
        monkeypatch.setattr(kronecker, "_draw", lambda log_p, uniform: next(rows))

    return follow


def build(name, model, sequences, datas_labels):
    """EK-FAC makes two passes over the same labels."""
    datas_labels(torch.cat([sequences, sequences]) if len(sequences) > 32 else sequences)
    if name == "ekfac":
        basis = build("kfac", model, sequences, datas_labels)
        datas_labels(sequences)
        return kronecker.second_moments(model, sequences, basis)
    return BUILDERS[name](model, sequences)


def explicit_fishers(model, sequences, blocks):
    """(1/m) Σ s sᵀ/T for every block, from gradients of one sequence at a time."""
    live, rows = weights.parameters(model), [[] for _ in blocks]
    for sequence in sequences:
        loss = measures.token_losses(model, sequence[None]).sum()
        gradient = dict(zip(live, torch.autograd.grad(loss, list(live.values())), strict=True))
        for found, block in zip(rows, blocks, strict=True):
            found.append(block.matrix(gradient).flatten())
    tokens = sequences.shape[1] - 1
    return [torch.stack(found).T @ torch.stack(found) / (len(sequences) * tokens) for found in rows]


def dense(block):
    """A block's matrix, from its bases and eigenvalues."""
    left, right = block.left, block.right
    left = torch.eye(block.eigenvalues.shape[0], dtype=torch.float64) if left is None else left
    right = torch.eye(block.eigenvalues.shape[1], dtype=torch.float64) if right is None else right
    basis = torch.kron(left, right)
    return basis @ torch.diag(block.eigenvalues.flatten()) @ basis.T


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_blocks_take_vectors_apart_and_put_them_together(architecture):
    model = tiny_model(architecture)
    v = weights.random_vector(weights.parameters(model), torch.Generator().manual_seed(0))
    found, entries = {}, 0
    for block in kronecker.kfac(model, SEQUENCES).blocks:
        matrix = block.matrix(v)
        assert matrix.shape == block.eigenvalues.shape
        entries += matrix.numel()
        found |= block.vector(matrix, v)
    assert found.keys() == v.keys()
    assert all(torch.equal(found[name], v[name]) for name in v)
    assert entries == sum(p.numel() for p in v.values())


def test_kfac_is_the_fisher_where_inputs_are_constant(datas_labels):
    """One predicted position, and the same first token everywhere: every linear layer reads the same input."""
    model, sequences = tiny_model("opt"), random_sequences(9, 2)
    sequences[:, 0] = 3
    found = build("kfac", model, sequences, datas_labels)
    checked = 0
    for block, fisher in zip(found.blocks, explicit_fishers(model, sequences, found.blocks), strict=True):
        if block.left is not None:
            torch.testing.assert_close(dense(block), fisher, rtol=1e-9, atol=1e-15)
            checked += 1
    assert checked == 12  # four attention and two feed-forward matrices, with their biases, in two layers


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", ["ekfac", "diagonal"])
def test_eigenvalues_are_second_moments_of_whole_gradients(architecture, name, datas_labels):
    model = tiny_model(architecture)
    found = build(name, model, SEQUENCES, datas_labels)
    for block, fisher in zip(found.blocks, explicit_fishers(model, SEQUENCES, found.blocks), strict=True):
        left, right = block.left, block.right
        left = torch.eye(block.eigenvalues.shape[0], dtype=torch.float64) if left is None else left
        right = torch.eye(block.eigenvalues.shape[1], dtype=torch.float64) if right is None else right
        basis = torch.kron(left, right)
        torch.testing.assert_close(basis.T @ basis, torch.eye(len(basis), dtype=torch.float64))
        expected = (basis * (fisher @ basis)).sum(0).reshape(block.eigenvalues.shape)
        scale = expected.max().item()
        torch.testing.assert_close(block.eigenvalues, expected, rtol=0, atol=tolerance(architecture) * scale)


def test_the_eigenvalue_correction_comes_closer_to_the_fisher(datas_labels):
    model = tiny_model("opt")
    plain, corrected = (build(name, model, SEQUENCES, datas_labels) for name in ("kfac", "ekfac"))
    better = 0
    fishers = explicit_fishers(model, SEQUENCES, plain.blocks)
    for fisher, before, after in zip(fishers, plain.blocks, corrected.blocks, strict=True):
        errors = [(dense(block) - fisher).norm().item() for block in (before, after)]
        assert errors[1] <= errors[0] * (1 + 1e-9)
        better += errors[1] < 0.99 * errors[0]
    assert better > len(fishers) / 2


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_factors_are_second_moments_of_inputs_and_output_gradients(architecture, datas_labels):
    """Against hooks of our own on one feed-forward layer, and the product of traces on the tied or free head."""
    model = tiny_model(architecture)
    found = build("kfac", model, SEQUENCES, datas_labels)
    names = {
        "opt": "model.decoder.layers.1.fc1",
        "llama": "model.layers.1.mlp.up_proj",
        "gpt2": "transformer.h.1.mlp.c_fc",
    }
    module, seen = model.get_submodule(names[architecture]), {}
    module.register_forward_hook(lambda m, args, out: seen.update(a=args[0].detach()))
    module.register_full_backward_hook(lambda m, into, out: seen.update(d=out[0].detach()))
    measures.token_losses(model, SEQUENCES).sum().backward()
    a, d = (seen[key].reshape(-1, seen[key].shape[-1]) for key in "ad")
    if module.bias is not None:
        a = torch.cat([a, torch.ones_like(a[:, :1])], dim=1)
    expected = torch.kron(d.T @ d / len(d), a.T @ a / len(a))
    [block] = [block for block in found.blocks if block.layers[0].name == names[architecture]]
    atol = tolerance(architecture) * expected.abs().max().item()
    torch.testing.assert_close(dense(block), expected, rtol=0, atol=atol)


def test_a_tied_table_adds_both_its_uses(datas_labels):
    model = tiny_model("opt")
    found = build("kfac", model, SEQUENCES, datas_labels)
    [block] = [block for block in found.blocks if len(block.layers) == 2]
    seen = {}
    table, head = model.model.decoder.embed_tokens, model.lm_head
    table.register_forward_hook(lambda m, args, out: out.register_hook(lambda g: seen.update(e=g)) and None)
    head.register_full_backward_hook(lambda m, into, out: seen.update(d=out[0].detach()))
    head.register_forward_hook(lambda m, args, out: seen.update(h=args[0].detach()))
    measures.token_losses(model, SEQUENCES).sum().backward()
    e, d, h = (seen[key].flatten(0, 1) for key in "edh")
    frequency = torch.bincount(SEQUENCES[:, :-1].flatten(), minlength=VOCABULARY).double() / len(e)
    A, S, s = h.T @ h / len(h), e.T @ e / len(e), d.square().mean(0)
    for v in range(VOCABULARY):
        expected = (block.right * ((s[v] * A + frequency[v] * S) @ block.right)).sum(0)
        torch.testing.assert_close(block.eigenvalues[v], expected, rtol=1e-9, atol=1e-12)
    common = s.sum() * A + frequency.sum() * S
    rotated = block.right.T @ common @ block.right
    torch.testing.assert_close(
        rotated, torch.diag(rotated.diagonal()), rtol=0, atol=1e-9 * common.abs().max().item()
    )


@pytest.mark.parametrize("name", BUILDERS)
def test_products_solutions_and_powers_are_those_of_the_dense_blocks(name):
    model, damping = tiny_model("gpt2"), 1e-2
    curvature = BUILDERS[name](model, SEQUENCES)
    v = weights.random_vector(weights.parameters(model), torch.Generator().manual_seed(1))
    for exponent, ours in (
        (None, curvature.matvec(v)),
        (-1.0, curvature.solve(v, damping)),
        (-0.25, curvature.power(v, -0.25, damping)),
    ):
        for block in curvature.blocks:
            matrix = dense(block)
            if exponent is not None:
                values, vectors = torch.linalg.eigh(matrix + damping * torch.eye(len(matrix), dtype=torch.float64))
                matrix = vectors @ torch.diag(values**exponent) @ vectors.T
            expected = matrix @ block.matrix(v).flatten()
            torch.testing.assert_close(block.matrix(ours).flatten(), expected, rtol=1e-8, atol=1e-10)


def test_labels_are_drawn_from_the_model():
    log_p = torch.tensor([0.1, 0.0, 0.6, 0.3], dtype=torch.float64).log().expand(1, 20_000, 4)
    uniform = torch.rand(1, 20_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shares = torch.bincount(kronecker._draw(log_p, uniform).flatten(), minlength=4) / 20_000
    assert (shares - log_p[0, 0].exp()).abs().max().item() < 0.015
    assert shares[1] == 0
    ends = torch.tensor([0.0, 1 - 1e-16], dtype=torch.float64).view(1, 2, 1)
    assert kronecker._draw(log_p[:, :2], ends).flatten().tolist() == [3, 0]


def test_the_same_seed_gives_the_same_curvature_in_batches_of_any_size(monkeypatch):
    model, sequences = tiny_model(), random_sequences(40, 5)
    first, again, other = (kronecker.kfac(model, sequences, seed=seed) for seed in (0, 0, 1))
    for a, b in zip(first.blocks, again.blocks, strict=True):
        assert torch.equal(a.eigenvalues, b.eigenvalues)
    assert not torch.equal(first.blocks[3].eigenvalues, other.blocks[3].eigenvalues)
    monkeypatch.setattr(kronecker, "CHUNK", 1)  # and a vocabulary in pieces of any size
    small = kronecker.second_moments(model, sequences, first)
    monkeypatch.undo()
    for a, b in zip(small.blocks, kronecker.second_moments(model, sequences, first).blocks, strict=True):
        torch.testing.assert_close(a.eigenvalues, b.eigenvalues)


def test_frozen_parameters_are_left_out():
    model = tiny_model("opt")
    model.model.decoder.embed_tokens.weight.requires_grad_(False)
    model.model.decoder.layers[0].fc1.weight.requires_grad_(False)  # its bias stays
    live = weights.parameters(model)
    v = weights.random_vector(live, torch.Generator().manual_seed(0))
    for builder in BUILDERS.values():
        assert builder(model, SEQUENCES).solve(v, 1e-2).keys() == live.keys()


def test_bad_input_is_refused():
    model = tiny_model("opt")
    v = weights.snapshot(model)
    with pytest.raises(ValueError, match="m = 9 of 6 sequences"):
        kronecker.kfac(model, SEQUENCES, 9)
    with pytest.raises(ValueError, match="m = 0 of 0"):
        kronecker.ekfac(model, SEQUENCES[:0])
    curvature = kronecker.kfac(model, SEQUENCES, 4)
    for damping in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="damping must be positive"):
            curvature.solve(v, damping)
    with torch.no_grad():
        model.model.decoder.layers[0].fc1.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="predictions for sequence 0 are not finite"):
        kronecker.kfac(model, SEQUENCES)
