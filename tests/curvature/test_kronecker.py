"""Kronecker factors against explicit Fisher matrices, block by block, in float64."""

import copy

import numpy as np
import pytest
import torch
from helpers import ARCHITECTURES, VOCABULARY, random_sequences, tiny_model
from torch import nn

from unlearnlib import cost, losses, weights
from unlearnlib.curvature import fisher_pass, kronecker, kronecker_blocks
from unlearnlib.losses import logits, token_losses
from unlearnlib.models import loading

SEQUENCES = random_sequences(6, 5)
BUILDERS = {"kfac": kronecker.kfac, "ekfac": kronecker.ekfac, "diagonal": kronecker.diagonal_fisher}


def tolerance(architecture):
    return 1e-5 if architecture == "llama" else 1e-9  # Llama's norm rounds to float32, whatever we ask for


@pytest.fixture
def datas_labels(monkeypatch):
    """In place of drawn labels those of the data, so that explicit matrices can be made with the same."""

    def follow(sequences):  # all in one batch, in as many passes as may be
        monkeypatch.setattr(fisher_pass, "draw_labels", lambda p, uniform: sequences[:, 1:, None])

    return follow


def build(name, model, sequences, datas_labels):
    datas_labels(sequences)
    return BUILDERS[name](model, sequences)


def biased_head():
    """A tied OPT whose head has a bias, which the table has not."""
    model = tiny_model("opt")
    model.lm_head.bias = nn.Parameter(torch.linspace(-1, 1, VOCABULARY, dtype=torch.float64))
    return model


def explicit_fishers(model, sequences, blocks):
    """(1/m) Σ s sᵀ/T for every block, from gradients of one sequence at a time."""
    live, rows = weights.parameters(model), [[] for _ in blocks]
    for sequence in sequences:
        loss = token_losses(model, sequence[None]).sum()
        gradient = dict(zip(live, torch.autograd.grad(loss, list(live.values())), strict=True))
        for found, block in zip(rows, blocks, strict=True):
            found.append(block.matrix(gradient).flatten())
    tokens = sequences[:, 1:].numel()
    return [torch.stack(found).T @ torch.stack(found) / tokens for found in rows]


def head_fisher(model, sequences):
    """The exact Fisher [V·columns, V·columns] of the head alone: Jᵀ(diag p − p pᵀ)J, with J by autograd."""
    total, untied = 0, untie(model)
    live = [p for p in untied.lm_head.parameters()]
    for sequence in sequences:
        z = logits(untied, sequence[None])[0]
        for row in z:
            jacobian = []
            for logit in row:
                parts = torch.autograd.grad(logit, live, retain_graph=True)
                jacobian.append(torch.cat([p.reshape(VOCABULARY, -1) for p in parts], dim=1).flatten())
            J, p = torch.stack(jacobian), row.detach().softmax(0)
            total = total + J.T @ (torch.diag(p) - torch.outer(p, p)) @ J
    return total / sequences[:, 1:].numel()


def untie(model):
    model = copy.deepcopy(model)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def bases(block):
    sides = zip((block.left, block.right), block.eigenvalues.shape, strict=True)
    return [torch.eye(size, dtype=torch.float64) if basis is None else basis for basis, size in sides]


def dense(block):
    """A block's matrix, from its bases and eigenvalues."""
    basis = torch.kron(*bases(block))
    return basis @ torch.diag(block.eigenvalues.flatten()) @ basis.T


def diagonal_of(fisher, block):
    basis = torch.kron(*bases(block))
    torch.testing.assert_close(basis.T @ basis, torch.eye(len(basis), dtype=torch.float64))
    return (basis * (fisher @ basis)).sum(0).reshape(block.eigenvalues.shape)


def has_head(model, block):
    return any(model.get_submodule(name) is model.get_output_embeddings() for name in block.layers)


@pytest.mark.parametrize("make", [*(lambda a=a: tiny_model(a) for a in ARCHITECTURES), biased_head])
def test_blocks_take_vectors_apart_and_put_them_together(make):
    model = make()
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


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kfac_is_the_fisher_where_inputs_are_constant(architecture, datas_labels):
    """One predicted position, and the same first token everywhere: every linear layer reads the same input."""
    model, sequences = tiny_model(architecture), random_sequences(9, 2)
    sequences[:, 0] = 3
    found = build("kfac", model, sequences, datas_labels)
    blocks = [block for block in found.blocks if block.left is not None]
    assert len(blocks) == {"opt": 12, "llama": 14, "gpt2": 8}[architecture]
    for block, fisher in zip(blocks, explicit_fishers(model, sequences, blocks), strict=True):
        scale = fisher.abs().max().item()
        torch.testing.assert_close(dense(block), fisher, rtol=0, atol=tolerance(architecture) * scale + 1e-18)


def test_drawn_labels_give_the_gauss_newton_matrix():
    """Many draws of one constant-input sequence: K-FAC comes close to Jᵀ(diag p − p pᵀ)J, explicit."""
    model = tiny_model("opt")
    sequences = random_sequences(1, 2).repeat(20_000, 1)
    [block] = [b for b in kronecker.kfac(model, sequences).blocks if "model.decoder.layers.1.fc2" in b.layers]
    live = [weights.parameters(model)[name] for name in block.names]
    z = logits(model, sequences[:1])[0, 0]
    rows = [torch.autograd.grad(logit, live, retain_graph=True) for logit in z]
    J = torch.stack([torch.cat([w, b[:, None]], dim=1).flatten() for w, b in rows])
    p = z.detach().softmax(0)
    expected = J.T @ (torch.diag(p) - torch.outer(p, p)) @ J
    assert (dense(block) - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", ["ekfac", "diagonal"])
def test_eigenvalues_are_second_moments_of_whole_gradients(architecture, name, datas_labels):
    model = tiny_model(architecture)
    blocks = [b for b in build(name, model, SEQUENCES, datas_labels).blocks if not has_head(model, b)]
    for block, fisher in zip(blocks, explicit_fishers(model, SEQUENCES, blocks), strict=True):
        expected = diagonal_of(fisher, block)
        atol = tolerance(architecture) * expected.max().item()
        torch.testing.assert_close(block.eigenvalues, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("make", [lambda: tiny_model("opt"), biased_head])
@pytest.mark.parametrize("name", ["ekfac", "diagonal"])
def test_a_tied_table_has_the_exact_fisher_of_its_head_and_that_of_its_rows(make, name, datas_labels):
    model, few = make(), SEQUENCES[:2]
    [block] = [b for b in build(name, model, few, datas_labels).blocks if has_head(model, b)]
    apart = untie(model)
    padding = torch.zeros(VOCABULARY, block.eigenvalues.shape[1] - 16, dtype=torch.float64)
    rows = []
    for sequence in few:
        loss = token_losses(apart, sequence[None]).sum()
        (gradient,) = torch.autograd.grad(loss, apart.model.decoder.embed_tokens.weight)
        rows.append(torch.cat([gradient, padding], dim=1).flatten())
    table = torch.stack(rows).T @ torch.stack(rows) / few[:, 1:].numel()
    expected = diagonal_of(head_fisher(model, few) + table, block)
    torch.testing.assert_close(block.eigenvalues, expected, rtol=1e-9, atol=1e-12)


def test_a_head_of_its_own_needs_no_labels():
    model, few = tiny_model("llama"), SEQUENCES[:2]
    one, other = (kronecker.ekfac(model, few, seed=seed) for seed in (0, 1))
    [found], [again] = ([b for b in c.blocks if has_head(model, b)] for c in (one, other))
    assert torch.equal(found.eigenvalues, again.eigenvalues)
    expected = diagonal_of(head_fisher(model, few), found)
    torch.testing.assert_close(found.eigenvalues, expected, rtol=1e-5, atol=1e-9)


def test_the_eigenvalue_correction_comes_closer_to_the_fisher(datas_labels):
    model = tiny_model("opt")
    plain, corrected = (
        [b for b in build(name, model, SEQUENCES, datas_labels).blocks if not has_head(model, b)]
        for name in ("kfac", "ekfac")
    )
    better = 0
    fishers = explicit_fishers(model, SEQUENCES, plain)
    for fisher, before, after in zip(fishers, plain, corrected, strict=True):
        errors = [(dense(block) - fisher).norm().item() for block in (before, after)]
        assert errors[1] <= errors[0] * (1 + 1e-9)
        better += errors[1] < 0.99 * errors[0]
    assert better > len(fishers) / 2


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_factors_are_second_moments_of_inputs_and_output_gradients(architecture, datas_labels):
    """Against hooks of our own on one feed-forward layer."""
    model = tiny_model(architecture)
    name = {
        "opt": "model.decoder.layers.1.fc1",
        "llama": "model.layers.1.mlp.up_proj",
        "gpt2": "transformer.h.1.mlp.c_fc",
    }[architecture]
    datas_labels(SEQUENCES)
    left, right = kronecker.layer_factors(model, SEQUENCES)[name]
    module, seen = model.get_submodule(name), {}
    module.register_forward_hook(lambda m, args, out: seen.update(a=args[0].detach()))
    module.register_full_backward_hook(lambda m, into, out: seen.update(d=out[0].detach()))
    token_losses(model, SEQUENCES).sum().backward()
    a, d = (seen[key].reshape(-1, seen[key].shape[-1]) for key in "ad")
    if module.bias is not None:
        a = torch.cat([a, torch.ones_like(a[:, :1])], dim=1)
    for ours, side in ((left, d), (right, a)):
        expected = side.T @ side / len(side)
        atol = tolerance(architecture) * expected.abs().max().item()
        torch.testing.assert_close(ours, expected, rtol=0, atol=atol)


def test_the_head_keeps_the_diagonal_of_its_left_factor():
    """Of E[diag p − p pᵀ], a matrix over the vocabulary."""
    model = tiny_model("llama")
    p = logits(model, SEQUENCES).flatten(0, 1).softmax(1)
    exact = torch.diag(p.mean(0)) - p.T @ p / len(p)
    left, _ = kronecker.layer_factors(model, SEQUENCES)["lm_head"]
    torch.testing.assert_close(left, exact.diagonal(), rtol=1e-5, atol=1e-9)
    assert (exact - torch.diag(left)).norm() > 0.01 * exact.norm()  # and drops something


@pytest.mark.parametrize("name", ["q_proj", "out_proj", "fc1", "fc2", "k_proj", "v_proj"])
def test_which_layers_of_the_last_block_have_no_terms_between_positions(name):
    """What a layer computes at t enters the prediction at t alone, save for keys and values."""
    model = tiny_model("opt")
    block, seen = model.model.decoder.layers[-1], []
    layer = block.get_submodule(name if name.startswith("fc") else f"self_attn.{name}")
    layer.register_forward_hook(lambda m, args, out: seen.append(out))
    z = logits(model, SEQUENCES[:1])[0]
    later = 0.0
    for t in range(len(z)):
        (change,) = torch.autograd.grad(z[t].square().sum(), seen[0], retain_graph=True)
        change = change.reshape(len(z), -1).norm(dim=1)
        change[t] = 0
        later = max(later, change.max().item())
    assert (later > 1e-6) == (name in ("k_proj", "v_proj"))


def test_independence_at_each_position_does_not_make_a_kronecker_product():
    """Moments S_t = A_t = 1 and 3 at two positions: the Fisher is (1·1 + 3·3)/2 = 5 and K-FAC 2·2 = 4."""
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64)
    moments = torch.tensor([1.0, 3.0], dtype=torch.float64).sqrt()
    # Equally likely sequences of two positions, in which the signs of both sides are independent of each other.
    s = torch.cartesian_prod(signs, signs, signs, signs)
    l, r = (s[:, :2] * moments)[..., None], (s[:, 2:] * moments)[..., None]
    fisher = (l * r).sum(1).square().mean() / 2
    S, A = (torch.zeros(1, 1, dtype=torch.float64) for _ in range(2))
    kronecker.add_moment(S, l)
    kronecker.add_moment(A, r)
    kfac = S * A / (2 * len(s)) ** 2
    assert (fisher.item(), kfac.item()) == (pytest.approx(5), pytest.approx(4))


def test_a_tied_table_adds_the_factors_of_both_its_uses(datas_labels):
    model = tiny_model("opt")
    [block] = [b for b in build("kfac", model, SEQUENCES, datas_labels).blocks if has_head(model, b)]
    seen = {}
    embedding, head = model.model.decoder.embed_tokens, model.lm_head
    embedding.register_forward_hook(lambda m, args, out: out.register_hook(lambda g: seen.update(e=g)) and None)
    head.register_forward_hook(lambda m, args, out: seen.update(h=args[0].detach(), z=out.detach()))
    token_losses(model, SEQUENCES).sum().backward()
    e, h, p = seen["e"].flatten(0, 1), seen["h"].flatten(0, 1), seen["z"].flatten(0, 1).softmax(1)
    frequency = torch.bincount(SEQUENCES[:, :-1].flatten(), minlength=VOCABULARY).double() / len(e)
    A, S, s = h.T @ h / len(h), e.T @ e / len(e), (p * (1 - p)).mean(0)
    for v in range(VOCABULARY):
        expected = (block.right * ((s[v] * A + frequency[v] * S) @ block.right)).sum(0)
        torch.testing.assert_close(block.eigenvalues[v], expected, rtol=1e-9, atol=1e-12)
    common = s.sum() * A + frequency.sum() * S
    rotated = block.right.T @ common @ block.right
    off = rotated - torch.diag(rotated.diagonal())
    assert off.abs().max() < 1e-9 * common.abs().max()


@pytest.mark.parametrize("name", BUILDERS)
def test_products_solutions_and_powers_are_those_of_the_dense_blocks(name):
    model, damping = tiny_model("gpt2"), 1e-2
    curvature = BUILDERS[name](model, SEQUENCES)
    v = weights.random_vector(weights.parameters(model), torch.Generator().manual_seed(1))
    found = [curvature.matvec(v), curvature.solve(v, damping), curvature.power(v, -0.25, damping)]
    for block in curvature.blocks:
        values, vectors = torch.linalg.eigh(dense(block))
        row = vectors.T @ block.matrix(v).flatten()
        for ours, scales in zip(found, (values, 1 / (values + damping), (values + damping) ** -0.25), strict=True):
            expected = vectors @ (scales * row)
            torch.testing.assert_close(block.matrix(ours).flatten(), expected, rtol=1e-8, atol=1e-10)


def test_labels_are_drawn_with_the_given_probabilities():
    p = torch.tensor([0.1, 0.0, 0.6, 0.3], dtype=torch.float64).expand(1, 20_000, 4)
    evenly = (torch.arange(20_000, dtype=torch.float64) / 20_000)[None, :, None]
    counts = torch.bincount(fisher_pass.draw_labels(p, evenly).flatten(), minlength=4)
    assert (counts / 20_000 - p[0, 0]).abs().max().item() < 1e-3
    assert counts[1] == 0
    ends = torch.tensor([0.0, 1 - 1e-16], dtype=torch.float64).view(1, 2, 1)
    assert fisher_pass.draw_labels(p[:, :2], ends).flatten().tolist() == [3, 0]


def test_pieces_of_the_logits_change_nothing(monkeypatch):
    """Neither a label nor an expected square depends on how many tokens are taken at a time."""
    models = {dtype: tiny_model("gpt2", dtype=dtype) for dtype in (torch.float64, torch.bfloat16)}
    whole = {dtype: kronecker.ekfac(model, SEQUENCES) for dtype, model in models.items()}
    monkeypatch.setattr(fisher_pass, "PIECE", 3 * VOCABULARY)
    for dtype, model in models.items():
        for a, b in zip(whole[dtype].blocks, kronecker.ekfac(model, SEQUENCES).blocks, strict=True):
            torch.testing.assert_close(a.eigenvalues, b.eigenvalues)


def test_of_the_logits_size_there_are_two_tensors_at_most(monkeypatch):
    monkeypatch.setattr(fisher_pass, "PIECE", 20_000)
    config = loading.small_opt(20_000, hidden_size=8, layers=1, heads=2, context=16)
    model, sequences = loading.load_model(config, dtype=torch.float32), random_sequences(64)
    of_a_batch = 4 * 32 * sequences[0, 1:].numel() * 20_000
    spent = cost.measure(lambda: kronecker.kfac(model, sequences), "cpu", runs=1)
    assert 2 * of_a_batch < spent.peak_bytes < 2.2 * of_a_batch


def test_the_same_seed_gives_the_same_curvature_in_batches_of_any_size(monkeypatch):
    model, sequences = tiny_model(), random_sequences(40, 5)
    first, again, other = (kronecker.ekfac(model, sequences, seed=seed) for seed in (0, 0, 1))
    for a, b in zip(first.blocks, again.blocks, strict=True):
        assert torch.equal(a.eigenvalues, b.eigenvalues)
    assert not torch.equal(first.blocks[3].eigenvalues, other.blocks[3].eigenvalues)
    sums, largest = [], []
    for most in (7 * 4 * VOCABULARY, 10**9):  # numbers of logits, for four predictions a sequence
        monkeypatch.setattr(losses, "MOST_LOGITS", most)
        found, sizes = {}, []

        def receive(block, layer, left, right, found=found, sizes=sizes):
            found[layer.name] = found.get(layer.name, 0) + right.square().sum()
            sizes.append(len(right))

        fisher_pass.receive_terms(model, sequences, kronecker_blocks.find_blocks(model), 0, receive)
        sums.append(found)
        largest.append(max(sizes))
    assert largest == [7, 32]
    for name in sums[0]:
        torch.testing.assert_close(sums[0][name], sums[1][name])


@pytest.mark.parametrize("uses", [1, 2])
def test_float32_factors_are_solved_as_in_float64_down_to_a_millionth_of_the_largest_eigenvalue(uses):
    """Against dense solutions of (Σ L ⊗ R + λI) x = v. Eigenvectors of float32 would miss by 1e-4."""
    model, rng = tiny_model("opt", dtype=torch.float32), np.random.default_rng(0)
    block = next(
        b for b in kronecker_blocks.find_blocks(model) if len(b.layers) == uses and b.form in ("plain", "table")
    )

    def moment(size):
        side = np.linalg.qr(rng.normal(size=(size, size)))[0] * np.logspace(0, -4, size)
        return torch.from_numpy(side @ side.T).float()

    rows, columns = block.eigenvalues.shape
    left, right = torch.linspace(0.5, 1, rows) if uses == 2 else moment(rows), moment(columns)
    pairs = [(left, right), (left.flip(0), right / 2)][:uses]  # right sides that commute, or no basis were exact
    solver = kronecker.from_factors(model, dict(zip(block.layers, pairs, strict=True)), [block])
    live = {name: p for name, p in weights.parameters(model).items() if name in block.names}
    v = weights.random_vector(live, torch.Generator().manual_seed(0))
    full = [(l.diag() if l.ndim == 1 else l).double() for l, _ in pairs]
    exact = sum(torch.kron(l, r.double()) for l, (_, r) in zip(full, pairs, strict=True)).numpy()
    top = np.linalg.eigvalsh(exact)[-1]
    for damping in 10.0 ** -np.arange(1, 7) * top:
        expected = np.linalg.solve(
            exact + damping * np.eye(len(exact)), block.matrix(v).double().flatten().numpy()
        )
        error = block.matrix(solver.solve(v, damping)).double().flatten().numpy() - expected
        assert np.linalg.norm(error) < 2e-6 * np.linalg.norm(expected)


def test_frozen_parameters_are_left_out():
    model = tiny_model("opt")
    model.model.decoder.embed_tokens.weight.requires_grad_(False)
    model.model.decoder.layers[0].fc1.weight.requires_grad_(False)  # its bias stays
    live = weights.parameters(model)
    v = weights.random_vector(live, torch.Generator().manual_seed(0))
    for builder in BUILDERS.values():
        assert builder(model, SEQUENCES).solve(v, 1e-2).keys() == live.keys()


def test_bfloat16_models_have_float32_factors(datas_labels):
    model = tiny_model("opt", dtype=torch.bfloat16)
    curvature, exact = (build("kfac", m, SEQUENCES, datas_labels) for m in (model, tiny_model("opt")))
    step = curvature.solve(weights.snapshot(model), 1e-2)
    assert all(value.dtype == torch.bfloat16 and value.isfinite().all() for value in step.values())
    assert all(block.eigenvalues.dtype == torch.float32 for block in curvature.blocks)
    traces = [sum(block.eigenvalues.sum().item() for block in found.blocks) for found in (curvature, exact)]
    assert traces[0] == pytest.approx(traces[1], rel=0.1)


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
    torch.nn.init.constant_(model.model.decoder.embed_tokens.weight[int(SEQUENCES[2, 1])], torch.nan)
    bad = int((SEQUENCES[:, :-1] == SEQUENCES[2, 1]).any(dim=1).nonzero()[0])
    with pytest.raises(FloatingPointError, match="predictions are not finite for sequence 0"):
        kronecker.kfac(model, SEQUENCES)  # the head shares the damaged row: all predictions are lost
    apart = untie(tiny_model("opt"))
    torch.nn.init.constant_(apart.model.decoder.embed_tokens.weight[int(SEQUENCES[2, 1])], torch.nan)
    with pytest.raises(FloatingPointError, match=f"predictions are not finite for sequence {bad}"):
        kronecker.kfac(apart, SEQUENCES)


def test_gradients_that_are_not_finite_are_named():
    model = tiny_model("opt")
    model.model.decoder.layers[0].register_full_backward_hook(
        lambda m, into, out: (into[0].index_fill(0, torch.tensor(3), torch.inf),)
    )
    with pytest.raises(FloatingPointError, match=r"gradients at '.*' are not finite for sequence 3"):
        kronecker.kfac(model, SEQUENCES)


def test_heads_and_biases_without_a_form_are_named():
    granite = ARCHITECTURES["llama"] | {"model_type": "granite", "logits_scaling": 2.0}
    with pytest.raises(NotImplementedError, match="'lm_head' is not the logits"):
        kronecker.kfac(loading.load_model(granite, dtype=torch.float64, device="cpu"), SEQUENCES)
    model = tiny_model("opt")
    layers = model.model.decoder.layers
    layers[1].fc1.bias = layers[0].fc1.bias
    with pytest.raises(NotImplementedError, match=r"fc1\.bias' belongs to several matrices"):
        kronecker.kfac(model, SEQUENCES)
