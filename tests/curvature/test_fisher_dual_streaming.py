"""The streaming dual form against gradients of one sequence at a time and explicit matrices, in float64."""

import pytest
import torch
from helpers import ARCHITECTURES, VOCABULARY, random_sequences, tiny_model
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from unlearnlib import cost, losses, weights
from unlearnlib.curvature import column_pass
from unlearnlib.curvature.fisher_dual import FisherDual
from unlearnlib.curvature.fisher_dual_streaming import StreamingFisher
from unlearnlib.curvature.per_sequence_gradients import sequence_gradients
from unlearnlib.losses import log_probabilities, sequence_losses
from unlearnlib.models import loading

M = 7
SMALL_BUDGET = 12_000  # a few rows of each layer at a time
DAMPING = 0.03


def explicit_gradients(model, sequences):
    """G by autograd and the textbook call."""
    rows = []
    for s in sequences:
        logits = model(input_ids=s[None]).logits[0, :-1]
        gradient = torch.autograd.grad(F.cross_entropy(logits, s[1:]), list(weights.parameters(model).values()))
        rows.append(torch.cat([g.flatten() for g in gradient]))
    return torch.stack(rows)


def random_direction(model):
    return weights.random_vector(weights.parameters(model), torch.Generator().manual_seed(1))


def gram(fisher):
    return fisher.vectors @ (M * fisher.eigenvalues).diag() @ fisher.vectors.T


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(losses, "MOST_SEQUENCES", 3)


def check(model, sequences=None, budget=SMALL_BUDGET):
    """The m × m matrix, and products with a vector known beforehand or not, against explicit gradients."""
    sequences = random_sequences(M) if sequences is None else sequences
    gradients, v = explicit_gradients(model, sequences), random_direction(model)
    expected = gradients.T @ (gradients @ weights.flatten(v)) / M
    for known in (None, v):
        fisher = StreamingFisher(model, sequences, budget, known)
        torch.testing.assert_close(gram(fisher), gradients @ gradients.T, rtol=1e-10, atol=1e-10)
        # Llama's norm rounds to float32, whatever we ask for.
        tolerance = (1e-6 if model.config.model_type == "llama" else 1e-10) * expected.abs().max().item()
        torch.testing.assert_close(weights.flatten(fisher.matvec(v)), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("budget", [SMALL_BUDGET, 2**25])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_is_made_of_every_sequences_own_gradient(architecture, budget):
    check(tiny_model(architecture), budget=budget)


@pytest.mark.parametrize("known", [False, True])
def test_all_three_methods_are_those_of_the_matrix(known):
    config = loading.small_opt(VOCABULARY, hidden_size=8, layers=1, heads=2, context=16)
    model, sequences = loading.load_model(config, dtype=torch.float64), random_sequences(M)
    gradients, v = explicit_gradients(model, sequences), random_direction(model)
    row = weights.flatten(v)
    values, basis = torch.linalg.eigh(gradients.T @ gradients / M)
    fisher = StreamingFisher(model, sequences, SMALL_BUDGET, v if known else None)

    def agree(ours, theirs):
        assert ours.keys() == v.keys()
        torch.testing.assert_close(weights.flatten(ours), theirs, rtol=1e-8, atol=1e-8)

    agree(fisher.matvec(v), gradients.T @ (gradients @ row) / M)
    for damping in (1e-3, DAMPING, 10.0):
        agree(fisher.solve(v, damping), basis @ ((basis.T @ row) / (values + damping)))
        for p in (-0.5, -0.25, 0.5, 2.0):
            agree(fisher.power(v, p, damping), basis @ ((basis.T @ row) * (values.clamp(min=0) + damping) ** p))
    torch.testing.assert_close(fisher.eigenvalues, values[-M:])
    # What came with the build is for that vector only.
    other = {name: 2 * x for name, x in v.items()}
    agree(fisher.solve(other, DAMPING), 2 * weights.flatten(fisher.solve(v, DAMPING)))


@pytest.mark.parametrize("frozen", ["model.decoder.embed", "model.decoder.layers.0", "fc1.weight", "bias", "norm"])
def test_frozen_parameters_are_left_out(frozen):
    model = tiny_model("opt")
    for name, p in model.named_parameters():
        p.requires_grad_(frozen not in name)
    check(model)


@pytest.mark.parametrize("frozen", ["embed_tokens", "lm_head"])
def test_an_output_layer_of_its_own(frozen):
    model = tiny_model("llama")
    model.get_parameter("lm_head.weight").requires_grad_(frozen != "lm_head")
    model.get_parameter("model.embed_tokens.weight").requires_grad_(frozen != "embed_tokens")
    check(model)


@pytest.mark.parametrize("architecture", ["opt", "llama"])
@pytest.mark.parametrize("weight", [True, False])
def test_an_output_layer_with_a_bias(architecture, weight):
    model = tiny_model(architecture)
    model.lm_head.bias = nn.Parameter(torch.linspace(-1, 1, VOCABULARY, dtype=torch.float64))
    model.lm_head.weight.requires_grad_(weight)
    check(model)


def test_probabilities_that_are_left_out_are_too_small_to_matter():
    model = tiny_model("opt")
    model.model.decoder.final_layer_norm.weight.data *= 1000
    assert log_probabilities(model, random_sequences(M)).min() < -100
    check(model)


class Largest(TorchDispatchMode):
    """The most numbers that any tensor had that was made within the block."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.numbers = max(self.numbers, x.numel())
        return out


def test_neither_gradients_nor_logits_are_ever_held():
    config = loading.small_opt(400, hidden_size=16, layers=1, heads=2, context=16)
    model, sequences = loading.load_model(config, dtype=torch.float64), random_sequences(M)
    tokens = sequences.shape[1] - 1
    row = 2 * tokens * 400  # the logits of one sequence, twice
    with Largest() as plain:
        sequence_losses(model, sequences).sum().backward()
    with Largest() as streamed:
        StreamingFisher(model, sequences, budget_bytes=8 * row)
    assert plain.numbers >= M * tokens * 400  # all logits
    assert streamed.numbers == row


def test_a_block_is_run_again_rather_than_kept():
    model = tiny_model("opt")
    runs = []
    model.model.decoder.layers[0].fc1.register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    with column_pass.checkpointed(model):
        hidden = model.base_model(input_ids=random_sequences(2), use_cache=False).last_hidden_state
        assert runs == [False]
        hidden.sum().backward()
    assert runs == [False, True]


def test_the_model_may_move_afterwards():
    model, sequences = tiny_model("opt"), random_sequences(M)
    fisher, v = StreamingFisher(model, sequences, SMALL_BUDGET), random_direction(model)
    before = fisher.solve(v, DAMPING)
    weights.set_weights(model, weights.snapshot(model), v)
    for p in model.parameters():
        p.requires_grad_(False)
    for name, x in fisher.solve(v, DAMPING).items():
        assert torch.equal(x, before[name])


def state(model):
    return [
        (name, vars(module).keys(), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ] + [(p.requires_grad, p.grad, p.detach().clone().nan_to_num(7).tolist()) for p in model.parameters()]


def test_the_model_is_left_as_it_was_and_a_sequence_without_gradient_is_named():
    model, sequences = tiny_model("llama"), random_sequences(M)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    before = state(model)
    StreamingFisher(model, sequences).solve(random_direction(model), DAMPING)
    assert state(model) == before
    sequences[3, 4] = 0  # which is in no other
    model.model.embed_tokens.weight.data[0] = torch.nan
    before = state(model)
    with pytest.raises(FloatingPointError, match="gradient of sequence 3 is not finite"):
        StreamingFisher(model, sequences)
    assert state(model) == before


def test_blocks_are_as_before_after_an_error():
    model = tiny_model("opt")
    before = state(model)
    with pytest.raises(ZeroDivisionError), column_pass.checkpointed(model):
        raise ZeroDivisionError
    assert state(model) == before


@pytest.mark.parametrize("budget", [0, 1, 1000, 3000])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_budget_is_too_small(architecture, budget):
    check(tiny_model(architecture), budget=budget)


@pytest.mark.parametrize("tokens", [1, 11])
def test_the_least_that_is_held_is_a_row_of_every_sequence(tokens):
    config = loading.small_opt(400, hidden_size=64, layers=1, heads=2, context=16)
    model, sequences = loading.load_model(config, dtype=torch.float64), random_sequences(M, tokens + 1)
    build = column_pass.ColumnPass(model, sequences, 0, None)
    assert len(build.sums.buffer) == M * 256  # what fc2 reads
    check(model, sequences, budget=0)


def test_memory_grows_with_the_weights_and_the_budget_alone():
    """Not with vocabulary × tokens, nor with vocabulary × width × sequences."""
    vocabulary = 2**17
    config = loading.small_opt(vocabulary, hidden_size=8, layers=1, heads=1, context=16)
    model, sequences = loading.load_model(config, dtype=torch.float32), random_sequences(16, 16)
    v, budget = random_direction(model), 2**22
    table = 4 * 8 * vocabulary
    fisher = StreamingFisher(model, sequences, budget)
    for run in (
        lambda: StreamingFisher(model, sequences, budget, v),
        lambda: fisher.products(v),
        lambda: fisher.combination(fisher.eigenvalues),
    ):
        assert cost.measure(run, "cpu", runs=1, at_least=0).peak_bytes < budget + 3.5 * table + 2**20


@pytest.mark.parametrize("budget", [200_000, 2**25])
def test_the_vocabulary_and_the_length_of_opt(budget):
    config = loading.small_opt(50_272, hidden_size=16, layers=1, heads=2)
    model = loading.load_model(config, dtype=torch.float64)
    sequences = torch.randint(1, 50_272, (3, 128), generator=torch.Generator().manual_seed(0))
    v = random_direction(model)
    exact = FisherDual(sequence_gradients(model, sequences))
    with Largest() as streamed:
        fisher = StreamingFisher(model, sequences, budget, v)
    # Nothing larger than the budget is made, or than the tables that the model has anyway.
    assert streamed.numbers <= max(budget // 8, 50_272 * 16)
    torch.testing.assert_close(fisher.eigenvalues, exact.eigenvalues, rtol=1e-10, atol=0)
    damping = exact.eigenvalues.mean().item()
    expected, found = exact.solve(v, damping), fisher.solve(v, damping)
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, rtol=1e-9, atol=1e-12)


def test_logits_that_are_more_than_a_linear_layer_are_named():
    granite = {**ARCHITECTURES["llama"], "model_type": "granite", "logits_scaling": 2.0}
    model = loading.load_model(granite, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="logits of GraniteForCausalLM are more than a linear layer"):
        StreamingFisher(model, random_sequences(M))
    dropout = tiny_model("opt").train()
    dropout.model.decoder.layers[0].dropout = 0.5
    with pytest.raises(NotImplementedError, match=r"call model\.eval\(\)"):
        StreamingFisher(dropout, random_sequences(M))


def test_other_bad_input():
    model = tiny_model("opt")
    with pytest.raises(ValueError, match="at least one sequence"):
        StreamingFisher(model, random_sequences(0))
    with pytest.raises(ValueError, match="do not fit the model's context"):
        StreamingFisher(model, random_sequences(2, length=40))
    fisher = StreamingFisher(model, random_sequences(2))
    for damping in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="damping must be positive"):
            fisher.solve(random_direction(model), damping)


def test_the_build_is_a_pass_over_all_sequences():
    with losses.counted_passes() as passes:
        StreamingFisher(tiny_model(), random_sequences(5))
    assert passes == losses.Passes(differentiated=5)
