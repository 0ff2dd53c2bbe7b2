"""Private training against clipped gradients of autograd, one sequence at a time, in float64."""

import copy
import json
import math

import pytest
import torch
from helpers import ARCHITECTURES, random_sequences, tiny_model
from scipy import stats
from torch.nn import functional as F

from unlearnlib import weights
from unlearnlib.curvature import per_sequence_gradients
from unlearnlib.losses import mean_loss, sequence_losses
from unlearnlib.methods import dp_sgd
from unlearnlib.methods.dp_sgd import PrivateRun
from unlearnlib.methods.privacy import Privacy
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


def first_step(monkeypatch, run, model):
    """The gradient that the optimizer is given in the first step, shape [d], and the batch it came from."""
    batches, gradients = [], []
    clipped_sum, step = dp_sgd.clipped_sum, torch.optim.AdamW.step

    def seen(model, batch, length):
        batches.append(batch)
        return clipped_sum(model, batch, length)

    def stepped(self, *args, **kwargs):
        gradients.append(torch.cat([p.grad.flatten() for p in self.param_groups[0]["params"]]))
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(dp_sgd, "clipped_sum", seen)
        patch.setattr(torch.optim.AdamW, "step", stepped)
        dp_sgd.train_private(model, run)
    return gradients[0], batches[0]


@pytest.mark.parametrize("budget", [2**30, 0])  # of memory: all at once, and one sequence at a time
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_without_noise_the_gradient_is_the_sum_of_clipped_ones(architecture, budget, monkeypatch):
    monkeypatch.setattr(per_sequence_gradients, "GRADIENT_BYTES", budget)
    model = tiny_model(architecture)
    start = copy.deepcopy(model)
    # Llama's norm rounds to float32, whatever we ask for.
    tolerance = 1e-5 if architecture == "llama" else 1e-9
    all_lengths = one_by_one(start, random_sequences(8)).norm(dim=1)
    clip = all_lengths.median().item()
    run = private_run(max_gradient_norm=clip, source=ARCHITECTURES[architecture])
    gradient, batch = first_step(monkeypatch, run, model)
    rows = one_by_one(start, batch)
    lengths = rows.norm(dim=1, keepdim=True)
    assert (lengths > clip).any()
    assert (lengths < clip).any()
    expected = (rows * (clip / lengths).clamp(max=1)).sum(0) / 4  # 4: the expected size of the batch
    torch.testing.assert_close(gradient, expected, rtol=tolerance, atol=0.01 * tolerance)


def test_a_large_clipping_norm_changes_nothing_and_losses_are_those_of_the_sequences():
    model, sequences = tiny_model("gpt2"), random_sequences(5)
    total, losses = dp_sgd.clipped_sum(model, sequences, 1e6)
    torch.testing.assert_close(weights.flatten(total), one_by_one(model, sequences).sum(0), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(losses, sequence_losses(model, sequences).detach())


def test_noise_is_what_was_promised(monkeypatch):
    clean, _ = first_step(monkeypatch, private_run(None, random_sequences(40), epochs=1), tiny_model("llama"))
    run = private_run(4.0, random_sequences(40), epochs=1)
    noisy, _ = first_step(monkeypatch, run, tiny_model("llama"))
    noise = (noisy - clean) * 4 / (run.noise * 0.5)  # both drew the same batch
    assert run.noise > 0.1
    assert stats.kstest(noise.numpy(), "norm").pvalue > 1e-3
    assert abs(noise.std().item() - 1) < 4 / math.sqrt(2 * len(noise))


def test_every_sequence_is_drawn_with_the_same_probability(monkeypatch):
    sizes = []
    monkeypatch.setattr(
        dp_sgd, "clipped_sum", lambda m, batch, _: sizes.append(batch) or (weights.snapshot(m), torch.zeros(1))
    )
    run = private_run(None, torch.arange(1, 21)[:, None].expand(-1, 4), epochs=200, batch_size=5)
    dp_sgd.train_private(tiny_model(), run)
    counts = torch.bincount(torch.cat(sizes)[:, 0], minlength=21)[1:]
    assert len(sizes) == 800
    assert (counts - 200).abs().max() < 5 * math.sqrt(800 * 0.25 * 0.75)
    assert torch.tensor([float(len(batch)) for batch in sizes]).var() == pytest.approx(20 * 0.25 * 0.75, rel=0.2)


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
    assert json.loads((folder / "training.json").read_text())["seconds"] > 0
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
