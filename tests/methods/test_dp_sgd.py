import copy
import math

import pytest
import torch
from helpers import ARCHITECTURES, random_sequences, tiny_model
from scipy import integrate, stats
from torch.nn import functional as F

from unlearnlib import weights
from unlearnlib.losses import mean_loss
from unlearnlib.methods import dp_sgd
from unlearnlib.methods.dp_sgd import Privacy, PrivateRun
from unlearnlib.models import loading
from unlearnlib.models.training import Training

LLAMA = ARCHITECTURES["llama"]


def private_run(epsilon=None, sequences=None, seed=0, source=LLAMA, **training):
    sequences = random_sequences(8) if sequences is None else sequences
    settings = {"epochs": 2, "batch_size": 4, "learning_rate": 1e-2, "max_gradient_norm": 0.5} | training
    return PrivateRun(source, sequences, Training(**settings), seed, Privacy(epsilon))


def one_by_one(model, sequences):
    """Gradients of single sequences by autograd and the textbook loss, shape [n, d]."""
    rows = []
    for sequence in sequences:
        loss = F.cross_entropy(model(input_ids=sequence[None]).logits[0, :-1], sequence[1:])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    return torch.stack(rows)


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_of_single_sequences_are_autograds(tied):
    model = loading.load_model(LLAMA | {"tie_word_embeddings": tied}, dtype=torch.float64, device="cpu")
    sequences = random_sequences(3)
    found = dp_sgd.sequence_gradients(model, sequences)
    rows = torch.stack([weights.flatten({name: g[i] for name, g in found.items()}) for i in range(3)])
    # Llama's norms compute in float32, so that float64 ends there.
    torch.testing.assert_close(rows, one_by_one(model, sequences), rtol=1e-5, atol=1e-6)
    assert not model.training
    assert all(p.grad is None and not hasattr(p, "grad_sample") for p in model.parameters())


def test_a_configuration_with_dropout_can_be_trained_privately():
    source = LLAMA | {"attention_dropout": 0.1}
    model = loading.load_model(source, device="cpu")
    dp_sgd.check_supported(model, random_sequences(3))
    ends = []
    for _ in range(2):
        model = loading.load_model(source, device="cpu")
        dp_sgd.train_private(model, private_run(source=source))
        ends.append(weights.flatten(weights.snapshot(model)))
    assert torch.equal(*ends)


def first_step(monkeypatch, run, model):
    """The gradient that the optimizer is given in the first step, shape [d], and the batch it came from."""
    batches, gradients = [], []
    backward, step = dp_sgd._backward, torch.optim.AdamW.step

    def seen(model, sequences):
        batches.append(sequences)
        return backward(model, sequences)

    def stepped(self, *args, **kwargs):
        gradients.append(torch.cat([p.grad.flatten() for p in self.param_groups[0]["params"]]))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(dp_sgd, "check_supported", lambda *_: None)
    monkeypatch.setattr(dp_sgd, "_backward", seen)
    monkeypatch.setattr(torch.optim.AdamW, "step", stepped)
    dp_sgd.train_private(model, run)
    return gradients[0], batches[0]


def test_without_noise_the_gradient_is_the_sum_of_clipped_ones(monkeypatch):
    model = tiny_model("llama")
    start = copy.deepcopy(model)
    run = private_run(max_gradient_norm=0.5)
    gradient, batch = first_step(monkeypatch, run, model)
    rows = one_by_one(start, batch)
    lengths = rows.norm(dim=1, keepdim=True)
    assert len(batch) > 1
    assert (lengths > 0.5).any()
    expected = (rows * (0.5 / lengths).clamp(max=1)).sum(0) / 4  # 4: the expected size of the batch
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_a_large_clipping_norm_changes_nothing(monkeypatch):
    model = tiny_model("llama")
    start = copy.deepcopy(model)
    gradient, batch = first_step(monkeypatch, private_run(max_gradient_norm=1e6), model)
    torch.testing.assert_close(gradient, one_by_one(start, batch).sum(0) / 4, rtol=1e-4, atol=1e-6)


def test_noise_has_the_length_that_was_promised(monkeypatch):
    clean, _ = first_step(monkeypatch, private_run(None, random_sequences(40), epochs=1), tiny_model("llama"))
    monkeypatch.undo()
    run = private_run(4.0, random_sequences(40), epochs=1)
    noisy, _ = first_step(monkeypatch, run, tiny_model("llama"))
    noise = (noisy - clean) * 4 / (run.noise * 0.5)  # both drew the same batch
    assert run.noise > 0.1
    assert stats.kstest(noise.numpy(), "norm").pvalue > 1e-3
    assert abs(noise.std().item() - 1) < 4 / math.sqrt(2 * len(noise))


def gaussian_delta(epsilon, mu):
    """δ of a shift by μ standard deviations (Balle & Wang 2018, theorem 8), in closed form."""
    return stats.norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * stats.norm.cdf(-mu / 2 - epsilon / mu)


@pytest.mark.parametrize(("noise", "steps"), [(5.0, 1), (5.0, 9), (20.0, 100)])
def test_epsilon_of_full_batches_against_the_closed_form(noise, steps):
    # T Gaussian mechanisms are one with μ = √T/σ. Its Rényi divergence of order a is aμ²/2.
    delta, mu = 1e-5, math.sqrt(steps) / noise
    found = dp_sgd.spent_epsilon(noise, 1.0, steps, delta)
    orders = torch.tensor(dp_sgd._ORDERS, dtype=torch.float64)
    by_hand = (orders * mu**2 / 2 + torch.log1p(-1 / orders) - (delta * orders).log() / (orders - 1)).min()
    assert found == pytest.approx(by_hand.item(), rel=1e-9)
    assert gaussian_delta(found, mu) <= delta  # it is a bound
    assert gaussian_delta(0.8 * found, mu) > delta  # and not a loose one


@pytest.mark.parametrize(("noise", "steps"), [(5.0, 9), (20.0, 100)])
def test_the_tighter_epsilon_is_the_closed_form_and_below_that_of_the_accountant(noise, steps):
    delta, mu = 1e-5, math.sqrt(steps) / noise
    found = dp_sgd.tighter_epsilon(noise, 1.0, steps, delta)
    assert gaussian_delta(found, mu) <= delta < gaussian_delta(found - 0.03, mu)
    assert found < dp_sgd.spent_epsilon(noise, 1.0, steps, delta)
    assert type(found) is float  # what pages format


def test_epsilon_of_one_subsampled_step_against_numerical_integration():
    noise, rate, delta = 0.8, 0.2, 1e-3

    def excess(x, epsilon):
        p, q = stats.norm.pdf(x, 0, noise), stats.norm.pdf(x, 1, noise)
        return max((1 - rate) * p + rate * q - math.exp(epsilon) * p, 0.0)

    found = dp_sgd.spent_epsilon(noise, rate, 1, delta)
    exact = [
        integrate.quad(excess, -10, 15, args=(e,), limit=500, points=[0, 1, 3])[0] for e in (found, 0.5 * found)
    ]
    assert exact[0] <= delta < exact[1]


def test_noise_multiplier_keeps_the_promise_and_wastes_little():
    for epsilon in (0.5, 8.0, 500.0):
        privacy = Privacy(epsilon)
        noise = dp_sgd.noise_multiplier(privacy, 0.05, 200)
        spent = dp_sgd.spent_epsilon(noise, 0.05, 200, privacy.delta)
        assert 0.98 * epsilon <= spent <= epsilon


def test_a_group_as_large_as_one_sequence_is_one_sequence():
    privacy = Privacy(3.0)
    assert dp_sgd.group_guarantee(privacy, 1) == pytest.approx((3.0, 1e-5))
    epsilon, delta = dp_sgd.group_guarantee(privacy, 3)
    assert (epsilon, delta) == pytest.approx((9.0, 1e-5 * (1 + math.exp(3) + math.exp(6))))
    assert dp_sgd.group_guarantee(privacy, 1000)[1] == math.inf


def test_groups_that_make_no_sense_are_refused():
    for size in (0, -2):
        with pytest.raises(ValueError, match=f"at least one sequence, not {size}"):
            dp_sgd.group_guarantee(Privacy(1.0), size)
        with pytest.raises(ValueError, match=f"at least one sequence, not {size}"):
            dp_sgd.spent_epsilon(1.0, 0.1, 10, 1e-5, size)
    with pytest.raises(ValueError, match="nothing is promised to one sequence"):
        dp_sgd.group_guarantee(Privacy(None), 2)


def test_group_of_a_full_batch_is_a_larger_shift():
    one = dp_sgd.spent_epsilon(10.0, 1.0, 4, 1e-5)
    assert dp_sgd.spent_epsilon(30.0, 1.0, 4, 1e-5, size=3) == pytest.approx(one)
    sizes = [dp_sgd.spent_epsilon(5.0, 0.05, 50, 1e-5, size=size) for size in (1, 2, 8)]
    assert sizes == sorted(sizes)
    assert sizes[2] > 2 * sizes[1]


def test_auc_bound_holds_for_randomised_response():
    # Whether a sequence was in the data is announced truthfully with probability p = e^ε/(1 + e^ε). The score is
    # the announcement, so that a member beats a stranger with p², ties with 2p(1 - p), and the AUC is p.
    for epsilon in (0.1, 1.0, 3.0):
        p = math.exp(epsilon) / (1 + math.exp(epsilon))
        assert 0.5 < p**2 + p * (1 - p) <= dp_sgd.auc_bound(epsilon, 0.0) < 1
    assert dp_sgd.auc_bound(0.0, 0.0) == 0.5
    assert dp_sgd.auc_bound(0.0, 0.1) == pytest.approx(0.6)  # with δ all may be told, once in a while
    assert dp_sgd.auc_bound(math.log(2), 0.1) == pytest.approx(0.8)


def test_same_seed_same_weights_and_global_numbers_untouched():
    state = torch.get_rng_state()
    ends = []
    for seed in (0, 0, 1):
        model = tiny_model("llama", dtype=torch.float32)
        dp_sgd.train_private(model, private_run(8.0, random_sequences(40), seed, epochs=1))
        ends.append(weights.flatten(weights.snapshot(model)))
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])
    assert torch.equal(torch.get_rng_state(), state)


def test_empty_batches_are_steps_of_noise_alone():
    model = tiny_model("llama", dtype=torch.float32)
    losses = dp_sgd.train_private(model, private_run(8.0, random_sequences(6), batch_size=1, epochs=3))
    assert len(losses) == 18
    assert any(math.isnan(loss) for loss in losses)
    assert all(p.isfinite().all() for p in model.parameters())


def test_private_training_learns_and_leaves_an_ordinary_model():
    model, sequences = tiny_model("llama", dtype=torch.float32), random_sequences(8)
    before = mean_loss(model, sequences)
    dp_sgd.train_private(model, private_run(None, sequences, epochs=40))
    assert mean_loss(model, sequences) < before - 0.5
    assert not model.training
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())


def test_models_come_from_the_cache_and_damage_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setenv("UNLEARNLIB_CACHE", str(tmp_path))
    run = private_run(8.0, random_sequences(40), epochs=1)
    first = weights.snapshot(dp_sgd.load_private(run, "cpu"))
    folder = run.folder
    monkeypatch.setattr(PrivateRun, "folder", property(lambda run: folder))
    monkeypatch.setattr(dp_sgd, "train_private", None)  # whoever trains again fails
    again = weights.snapshot(dp_sgd.load_private(run, "cpu"))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert dp_sgd.private_record(run)["seconds"] > 0
    (folder / "training.json").write_text("{}")
    with pytest.warns(UserWarning, match="is damaged"), pytest.raises(TypeError):
        dp_sgd.load_private(run, "cpu")


def test_every_setting_makes_a_model_of_its_own():
    base = private_run(8.0)
    others = [
        private_run(4.0),
        private_run(None),
        private_run(8.0, seed=1),
        private_run(8.0, max_gradient_norm=0.4),
        private_run(8.0, random_sequences(8, seed=1)),
        PrivateRun(LLAMA, base.sequences, base.training, 0, Privacy(8.0, 1e-4)),
    ]
    assert len({run.folder for run in (base, *others)}) == 7
    assert private_run(8.0).folder == base.folder


@pytest.mark.parametrize("epsilon", [0.0, -1.0, math.nan, math.inf])
def test_a_promise_must_be_positive(epsilon):
    with pytest.raises(ValueError, match=r"epsilon must be positive and finite.*None means no noise"):
        Privacy(epsilon)


@pytest.mark.parametrize("delta", [0.0, 1.0, -0.1, math.nan])
def test_delta_is_a_probability(delta):
    with pytest.raises(ValueError, match=r"delta must lie between 0 and 1.*well below 1/n"):
        Privacy(1.0, delta)


def test_there_must_be_enough_to_draw_from():
    with pytest.raises(ValueError, match="nothing to train on"):
        private_run(1.0, random_sequences(8)[:0])
    with pytest.raises(ValueError, match="batches of 9 cannot be drawn from 8 sequences"):
        private_run(1.0, batch_size=9)


@pytest.mark.parametrize("option", ["bfloat16", "checkpointing"])
def test_ways_of_training_that_are_not_available_are_refused(option):
    with pytest.raises(ValueError, match="neither bfloat16 nor checkpointing"):
        private_run(1.0, **{option: True})


def test_sequences_must_fit_the_context():
    with pytest.raises(ValueError, match="context of 32"):
        dp_sgd.train_private(tiny_model("llama"), private_run(None, random_sequences(8, length=40)))


@pytest.mark.parametrize("architecture", ["opt", "gpt2"])
def test_models_that_opacus_gets_wrong_are_refused(architecture):
    model = tiny_model(architecture)
    with pytest.raises(ValueError, match=f"single sequences of this {architecture} model.*Llama type"):
        dp_sgd.train_private(model, private_run(8.0, source=ARCHITECTURES[architecture]))
    mean_loss(model, random_sequences(2))  # and it is left whole
