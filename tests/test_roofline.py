import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from unlearnlib import cost, fisher, gradient_ascent, kronecker, measures, models, newton, streaming
from unlearnlib.roofline import Machine, Route, Shape, Stage, routes
from unlearnlib.weights import flatten

LAYERS, WIDTH, HEADS, VOCABULARY, CONTEXT, M = 2, 64, 2, 512, 48, 8
SHAPE = Shape(LAYERS, WIDTH, HEADS, VOCABULARY, CONTEXT, tokens=CONTEXT - 1)


@pytest.fixture(scope="module")
def case():
    """A model of this shape, sequences, and a direction in weight space."""
    source = models.small_opt(VOCABULARY, WIDTH, LAYERS, HEADS, CONTEXT)
    model = models.load_model(source, device="cpu")
    sequences = torch.randint(VOCABULARY, (M, CONTEXT), generator=torch.Generator().manual_seed(0))
    return model, sequences, gradient_ascent.ascent_direction(model, sequences)


def executed(function):
    """Operations of the matrix products that ``function`` executes, as PyTorch counts them."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return counter.get_total_flops()


def counted(route):
    return sum(stage.flops for stage in route.stages if stage.kind != "eigen")


# Shapes


@pytest.mark.parametrize(
    ("shape", "table"),
    [((12, 768, 12), 768), ((24, 1024, 16), 512), ((24, 2048, 32), 2048), ((32, 2560, 32), 2560)],
    ids=["125M", "350M", "1.3B", "2.7B"],
)
def test_number_of_weights_of_the_opt_family(shape, table):
    layers, width, heads = shape
    config = AutoConfig.for_model(
        "opt",
        vocab_size=50272,
        hidden_size=width,
        word_embed_proj_dim=table,
        ffn_dim=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=2048,
        do_layer_norm_before=table == width,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    expected = models.parameter_count(model)
    assert Shape(layers, width, heads, 50272, 2048, tokens=64, table=table).d == expected


def test_number_of_weights_and_operations_of_a_small_model(case):
    model, sequences, _ = case
    assert SHAPE.d == models.parameter_count(model)
    with torch.no_grad():
        assert executed(lambda: measures.sequence_losses(model, sequences)) == M * SHAPE.forward


# Routes against what is executed


def test_gradients_and_products_are_counted_exactly(case):
    model, sequences, v = case
    theory = routes(SHAPE, M, forget=M)
    found = {
        "gradient": lambda: cost.plain_pass(model, sequences),
        "gauss_newton_product": lambda: newton.GaussNewton(model, sequences).matvec(v),
        "hessian_product": lambda: newton.Hessian(model, sequences).matvec(v),
        "sequence_gradients": lambda: fisher.sequence_gradients(model, sequences),
        "fisher_diagonal": lambda: fisher.FisherDiagonal(model, sequences),
    }
    for method, function in found.items():
        assert executed(function) == theory[method].stages[0].flops, method


def test_kronecker_factors_are_counted_closely(case):
    model, sequences, _ = case
    theory = routes(SHAPE, M, forget=M)
    factors = kronecker.kfac(model, sequences)
    found = {
        "kfac": lambda: kronecker.kfac(model, sequences),
        "ekfac": lambda: kronecker.ekfac(model, sequences),
        "kfac:request": lambda: factors.solve(gradient_ascent.ascent_direction(model, sequences), 0.1),
    }
    for method, function in found.items():
        assert counted(theory[method]) == pytest.approx(executed(function), rel=0.1), method


def test_recursion_and_dual_form_do_the_same_arithmetic_with_different_traffic():
    recursion, dual = (routes(SHAPE, 256, forget=M)[f"fisher_{name}"] for name in ("recursion:unrolled", "dual"))
    assert recursion.stages[0].flops == dual.stages[0].flops == 2 * 256**2 * SHAPE.d
    assert recursion.stages[0].traffic == 256 * dual.stages[0].traffic


def test_memory_is_predicted(case):
    model, sequences, v = case
    gradients, budget = fisher.sequence_gradients(model, sequences), 2**20
    theory = routes(SHAPE, M, forget=M, block=16, budget=budget)
    factors = kronecker.kfac(model, sequences)
    found = {
        "gradient": lambda: cost.plain_pass(model, sequences),
        "gauss_newton_product": lambda: newton.GaussNewton(model, sequences).matvec(v),
        "hessian_product": lambda: newton.Hessian(model, sequences).matvec(v),
        "sequence_gradients": lambda: fisher.sequence_gradients(model, sequences),
        "fisher_recursion": lambda: fisher.FisherRecursion(gradients, 16).inverse(0.1),
        "fisher_recursion:unrolled": lambda: fisher.unrolled_recursion(gradients, flatten(v), 0.1),
        "fisher_dual": lambda: fisher.FisherDual(gradients).solve(v, 0.1),
        "fisher_dual:streaming": lambda: streaming.StreamingFisher(model, sequences, budget, v).solve(v, 0.1),
        "kfac": lambda: kronecker.kfac(model, sequences),
        "ekfac": lambda: kronecker.ekfac(model, sequences),
        "kfac:request": lambda: factors.solve(gradient_ascent.ascent_direction(model, sequences), 0.1),
    }
    for method, function in found.items():
        measured = cost.measure(function, "cpu", runs=1, at_least=0.0).peak_bytes
        assert theory[method].peak_bytes == pytest.approx(measured, rel=0.2), method


# Machines


def test_a_stage_waits_for_arithmetic_or_for_memory_and_stages_add_up():
    machine = Machine({"model": 10.0, "eigen": 1.0}, bandwidth=2.0, start=0.5)
    assert machine.seconds(Route([Stage("model", 100, 4)], 0)) == 10
    assert machine.seconds(Route([Stage("model", 100, 40)], 0)) == 20
    assert machine.seconds(Route([Stage("model", 100, 4), Stage("eigen", 7), Stage("model", 0, 0, 6)], 0)) == 20


def test_one_sequence_at_a_time_is_the_same_arithmetic_but_more_starts_and_traffic():
    theory = routes(SHAPE, 64, forget=M)
    together, single = theory["gradient"].stages[0], theory["sequence_gradients"].stages[0]
    assert single.flops == together.flops
    assert single.starts == 32 * together.starts
    assert single.traffic > together.traffic
