"""Every algorithm of the library computes on an accelerator what it computes on the CPU.

The accelerator is CUDA, or the device that ``UNLEARNLIB_TEST_DEVICE`` names. Without one there is nothing to
compare, and these tests are skipped. Sequences stay on the CPU, as they do in the book, and the weights of both
models are the same.
"""

import copy
import functools
import itertools
import os

import pytest
import torch
from helpers import VOCABULARY, random_sequences, tiny_model
from torch import Tensor

from unlearnlib import cost, curvature, measures, methods, weights
from unlearnlib.curvature.fisher_recursion import FisherRecursion, unrolled_recursion
from unlearnlib.curvature.newton import GaussNewton, Hessian
from unlearnlib.losses import batched, mean_loss, sequence_losses
from unlearnlib.methods.dp_sgd import PrivateRun, train_private
from unlearnlib.methods.privacy import Privacy
from unlearnlib.models import loading
from unlearnlib.models.training import Training, train
from unlearnlib.texts.sequences import train_tokenizer

NAME = os.environ.get("UNLEARNLIB_TEST_DEVICE", "cuda")
THERE = NAME != "cuda" or torch.cuda.is_available()
pytestmark = pytest.mark.skipif(not THERE, reason="no accelerator: there is no CUDA device")

# What may differ, relative to the length of the result: rounding, since sums are taken in another order.
PRECISION = {torch.float64: 1e-8, torch.float32: 1e-4}
ROTARY = 1e-6
"""transformers computes the rotary angles of Llama in single precision, whatever the weights are in."""
DRIFT = 5e-3
"""In single precision a walk of several steps drifts, most where steps are clipped or normalised."""
WALKS = (
    "gradient_difference",
    "npo",
    "npo_and_kl",
    "simnpo",
    "newton_descent",
    "soul",
    "gradient_ascent:repaired",
)
DAMPING = 1e-2
FORGET, RETAIN, HOLDOUT = random_sequences(6, seed=1), random_sequences(8, seed=2), random_sequences(6, seed=3)


@functools.cache
def initial(architecture, dtype):
    """A model whose predictions are neither uniform nor certain, on the CPU."""
    model = tiny_model(architecture, dtype=dtype)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype))
    return model


def delta(model):
    return methods.ascent_direction(model, FORGET)


def both_ways(built, model):
    """A curvature's three methods on Δ."""
    v = delta(model)
    return built.matvec(v), built.solve(v, DAMPING), built.power(v, -0.25, DAMPING)


def walked(model, walk):
    """Where a walk leaves the model that is to forget by 0.05 nats, and the weights and strength there."""
    match = walk.to(walk.loss + 0.05)
    assert match.reached
    return weights.snapshot(model), match.loss, match.strength


def losses(model):
    return batched(measures.token_losses, model, FORGET), batched(measures.log_probabilities, model, FORGET)


def first_order(loss, walk=methods.adam_walk):
    def run(model):
        built = loss(copy.deepcopy(model))
        return walked(model, walk(model, built, FORGET, RETAIN, 3e-3, seed=0, batch_size=4))

    return run


def repaired(model):
    target = mean_loss(model, FORGET) + 0.05
    way = methods.RepairedAscent(model, FORGET, RETAIN, 3e-3, overshoot=0.05, seed=0, max_steps=40, batch_size=4)
    match = way.to(target)
    return weights.snapshot(model), match.loss, match.strength


def newton(model):
    products = Hessian(model, RETAIN, tolerance=precision(model) / 10)
    v = delta(model)
    return products.matvec(v), products.solve(v, 10.0)


def gauss_newton(model):
    products = GaussNewton(model, RETAIN, tolerance=precision(model) / 10)
    v = delta(model)
    inverse_root = products.lanczos(v, 5).apply(lambda values: (values + 1.0) ** -0.5)
    return products.matvec(v), products.solve(v, 1.0), inverse_root


def block_gauss_newton(model):
    preconditioner = curvature.kfac(model, RETAIN)
    built = curvature.BlockGaussNewton(model, RETAIN, steps=3, preconditioner=preconditioner)
    return built.solve(delta(model), DAMPING)


def natural_newton(model):
    """What the space holds, and where the path leads."""
    v, preconditioner = delta(model), curvature.kfac(model, RETAIN)
    space = methods.krylov_subspace(GaussNewton(model, RETAIN), preconditioner, v, DAMPING, products=3)
    path = methods.NaturalPath(model, space.solve, FORGET, len(FORGET) / len(RETAIN), DAMPING)
    match = path.to(mean_loss(model, FORGET) + 0.05)
    return space.matrix, space.solve(DAMPING), weights.snapshot(model), match.loss, match.strength


def recursion(model):
    gradients = curvature.sequence_gradients(model, RETAIN)
    row = weights.flatten(delta(model))
    return gradients, both_ways(FisherRecursion(gradients, 24), model), unrolled_recursion(gradients, row, DAMPING)


def dual(model):
    return both_ways(curvature.FisherDual(curvature.sequence_gradients(model, RETAIN)), model)


def dual_of_drawn_labels(model):
    loss = curvature.sampled_losses(torch.Generator().manual_seed(3))
    return both_ways(curvature.FisherDual(curvature.sequence_gradients(model, RETAIN, loss=loss)), model)


def dual_streaming(model):
    unknown = curvature.StreamingFisher(model, RETAIN, budget_bytes=2**12)
    known = curvature.StreamingFisher(model, RETAIN, v=delta(model))
    return unknown.eigenvalues, both_ways(unknown, model), known.solve(delta(model), DAMPING)


def removal_in_steps(model):
    build = functools.partial(curvature.ekfac, sequences=RETAIN)
    settings = {"damping": DAMPING, "steps": 2, "refresh": True, "renew": True, "hold": RETAIN}
    match = methods.RemovalInSteps(model, FORGET, build, **settings).to(mean_loss(model, FORGET) + 0.05)
    return weights.snapshot(model), match.loss, match.strength


def forgetting(model):
    built = curvature.kfac(model, RETAIN)
    noise = methods.forgetting_noise(built, delta(model), DAMPING, seed=0)
    return noise, methods.noise_kl(built, delta(model), DAMPING, scale=0.1, exponent=-0.25)


def matched_line(model):
    line = methods.Line(
        model, methods.removal_direction(curvature.kfac(model, RETAIN), delta(model), DAMPING), FORGET
    )
    match = line.to(mean_loss(model, FORGET) + 0.05)
    return weights.snapshot(model), match.loss, match.strength


def training(model):
    return train(model, RETAIN, Training(epochs=2, batch_size=4), 0), weights.snapshot(model)


def dp_sgd(model):
    private = PrivateRun({}, RETAIN, Training(epochs=1, batch_size=4, max_gradient_norm=0.5), 0, Privacy(8.0))
    vars(private)["noise"] = 1.0  # which the accountant would take seconds to find
    return train_private(model, private), weights.snapshot(model)


def relearning(model):
    return measures.probe(model, FORGET, HOLDOUT, steps=3, learning_rate=1e-3)


def attacks(model):
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for p in reference.parameters():
            p.mul_(0.9)
    inside, outside = measures.read(model, FORGET, reference), measures.read(model, HOLDOUT, reference)
    scores = [-measures.min_k_scores(reading.losses) for reading in (inside, outside)]
    shadows = measures.calibrated(scores[0], torch.stack([scores[0] / 2, scores[0] / 3]))
    numbers = measures.membership(inside, outside)
    return inside.losses, inside.hits, inside.kl, inside.divergence, shadows, *numbers.values()


def exposure(model):
    """Of a model of the same architecture that has a vocabulary of bytes."""
    tokenizer = train_tokenizer(["the number of the house is 1234"] * 3, 260)
    config = model.config.to_dict() | {"vocab_size": 260}
    speller = loading.load_model(config, dtype=model.dtype, device=model.device)
    texts = ["1234", *measures.candidates("1234", 20, seed=0)]
    found = measures.text_losses(speller, tokenizer, "house", texts)
    return found, measures.exposure_bits(found[0].item(), found[1:])


def extraction(model):
    said = measures.continuations(model, FORGET[:, :4], 6)
    again = measures.continuations(model, FORGET[:, :4], 6, cached=False)
    return said, again, measures.extraction_likelihood(model, FORGET, n=2, stride=4)


def rounding(model):
    return batched(sequence_losses, measures.rounded(model, 4), FORGET)


def keeping(original):
    return methods.with_retain(methods.npo_loss(original, 0.1), 1.0, methods.kl_loss(original))


def newton_descent(original):
    return methods.newton_loss(original, delta(original), len(FORGET) / len(RETAIN))


def rmu(model):
    loss = methods.with_retain(methods.rmu_loss(1, 3.0, 0), 0.1, methods.activation_loss(copy.deepcopy(model), 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    steps = methods.descend(model, loss, FORGET, RETAIN, optimizer, seed=0, batch_size=4)
    return list(itertools.islice(steps, 4)), weights.snapshot(model)


ALGORITHMS = {
    "losses": losses,
    "gradient": delta,
    "gradient_ascent": lambda model: walked(
        model, methods.sgd_walk(model, methods.ascent_loss, FORGET, RETAIN, 0.1, seed=0, batch_size=4)
    ),
    "gradient_difference": first_order(lambda original: methods.with_retain(methods.ascent_loss, 1.0)),
    "npo": first_order(lambda original: methods.npo_loss(original, 0.1)),
    "npo_and_kl": first_order(keeping),
    "simnpo": first_order(lambda original: methods.with_retain(methods.simnpo_loss(2.0, 0.1), 0.5)),
    "newton_descent": first_order(newton_descent),
    "rmu": rmu,
    "soul": first_order(lambda original: methods.with_retain(methods.ascent_loss, 1.0), methods.sophia_walk),
    "gradient_ascent:repaired": repaired,
    "newton": newton,
    "gauss_newton": gauss_newton,
    "block_gauss_newton": block_gauss_newton,
    "newton_cg:natural": natural_newton,
    "fisher_recursion": recursion,
    "fisher_dual": dual,
    "fisher_dual:drawn": dual_of_drawn_labels,
    "fisher_dual:streaming": dual_streaming,
    "fisher_diagonal": lambda model: both_ways(curvature.FisherDiagonal(model, RETAIN), model),
    "kfac": lambda model: both_ways(curvature.kfac(model, RETAIN), model),
    "ekfac": lambda model: both_ways(curvature.ekfac(model, RETAIN), model),
    "kronecker_diagonal": lambda model: both_ways(curvature.diagonal_fisher(model, RETAIN), model),
    "fisher_removal": matched_line,
    "fisher_removal:steps": removal_in_steps,
    "fisher_forgetting": forgetting,
    "training": training,
    "dp_sgd": dp_sgd,
    "relearning": relearning,
    "attacks": attacks,
    "exposure": exposure,
    "extraction": extraction,
    "rounding": rounding,
}


def allowed(name, architecture, dtype):
    if dtype == torch.float64:
        return ROTARY if architecture == "llama" else PRECISION[dtype]
    return DRIFT if name in WALKS else PRECISION[dtype]


def precision(model):
    return PRECISION[next(model.parameters()).dtype]


def results(value):
    """All numbers of a result, in float64 on the CPU: of a vector in weight space one row, of a list likewise."""
    if isinstance(value, Tensor):
        return [value.detach().cpu().double().flatten()]
    if isinstance(value, dict):
        return [torch.cat(list(itertools.chain.from_iterable(map(results, value.values()))))]
    if isinstance(value, tuple):
        return list(itertools.chain.from_iterable(map(results, value)))
    return [torch.tensor(value, dtype=torch.float64).flatten()]


@pytest.mark.parametrize("dtype", PRECISION, ids=str)
@pytest.mark.parametrize("architecture", ["opt", "gpt2", "llama"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_accelerator_gives_what_the_cpu_gives(name, architecture, dtype, record_property):
    model = initial(architecture, dtype)
    here, there = copy.deepcopy(model), copy.deepcopy(model).to(NAME)
    assert there.device.type == torch.device(NAME).type
    expected, found = results(ALGORITHMS[name](here)), results(ALGORITHMS[name](there))
    assert there.device.type == torch.device(NAME).type
    errors = [((a - b).norm() / b.norm().clamp(min=1e-300)).item() for a, b in zip(found, expected, strict=True)]
    record_property("error", max(errors))
    assert max(errors) < allowed(name, architecture, dtype), errors


PASSES = {
    "gradient": (methods.ascent_direction, (0, 3)),
    "per_sequence_gradients": (curvature.sequence_gradients, (0, 4)),
    "fisher_diagonal": (curvature.FisherDiagonal, (0, 4)),
    "kfac": (curvature.kfac, (1, 5)),
    "ekfac": (curvature.ekfac, (2, 10)),
    "kronecker_diagonal": (curvature.diagonal_fisher, (1, 5)),
    "hessian": (lambda model, sequences: Hessian(model, sequences).matvec(weights.snapshot(model)), (1, 2)),
    "gauss_newton": (
        lambda model, sequences: GaussNewton(model, sequences).matvec(weights.snapshot(model)),
        (1, 3),
    ),
}
"""What passes over the sequences, and how often it may make the processor wait: in all, and once more a batch."""


@pytest.mark.skipif(NAME != "pretended", reason="only a pretended accelerator counts")
@pytest.mark.parametrize("name", PASSES)
def test_waits_grow_with_the_batches_alone(name, monkeypatch):
    from pretended_accelerator import WAITS

    run, (in_all, a_batch) = PASSES[name]
    for layers, sequences, batch in ((1, 2, 2), (3, 8, 4)):
        monkeypatch.setattr("unlearnlib.losses.MOST_SEQUENCES", batch)
        config = loading.small_opt(VOCABULARY, hidden_size=16, layers=layers, heads=2, context=32)
        model = loading.load_model(config, seed=0, dtype=torch.float64, device="cpu").to(NAME)
        before = WAITS.total()
        run(model, random_sequences(sequences))
        waits = WAITS.total() - before
        assert waits == in_all + a_batch * sequences // batch, (layers, sequences, batch)


def test_what_is_left_on_the_cpu_is_found():
    with pytest.raises(RuntimeError, match=r"(?i)device|mixes"):
        torch.ones(2, device=NAME) + torch.ones(2)


@pytest.mark.skipif(NAME != "cuda", reason="memory and time are measured on CUDA")
def test_costs_are_those_of_the_device():
    model = initial("opt", torch.float32)
    model = copy.deepcopy(model).to(NAME)
    cost.plain_pass(model, RETAIN)  # which makes room for what the matrix products keep
    found = cost.measure(lambda: cost.plain_pass(model, RETAIN), NAME)
    assert found.seconds > 0
    logits = RETAIN[:, 1:].numel() * model.config.vocab_size * 4
    assert found.peak_bytes > logits
    with cost.Meter(NAME) as meter:
        cost.plain_pass(model, RETAIN)
    assert meter.cost.peak_bytes == pytest.approx(found.peak_bytes, rel=0.2)
    assert loading.has_bfloat16(torch.device(NAME)) == (torch.cuda.get_device_capability()[0] >= 8)
