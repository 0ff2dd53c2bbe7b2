import pytest
import torch
from helpers import ARCHITECTURES, random_sequences, tiny_model

from unlearnlib import losses, weights
from unlearnlib.losses import mean_loss, sequence_losses


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_mean_gradient_against_finite_differences(architecture, monkeypatch):
    monkeypatch.setattr(losses, "MOST_SEQUENCES", 3)
    model, sequences = tiny_model(architecture), random_sequences(7)
    gradient = weights.mean_gradient(model, sequences, sequence_losses)
    start = weights.snapshot(model)
    generator = torch.Generator().manual_seed(0)
    direction = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in start.items()}
    ends = []
    # Llama's norm rounds to float32, whatever we ask for.
    step, tolerance = (1e-4, 1e-2) if architecture == "llama" else (1e-6, 1e-6)
    for sign in (1, -1):
        weights.set_weights(model, start, direction, sign * step)
        ends.append(mean_loss(model, sequences))
    numeric = (ends[0] - ends[1]) / (2 * step)
    assert weights.dot(gradient, direction).item() == pytest.approx(numeric, rel=tolerance)


def test_tied_weights_appear_once_and_frozen_ones_not_at_all():
    model = tiny_model("opt")
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    names = weights.parameters(model).keys()
    assert len(names) == len({p.data_ptr() for p in model.parameters()})
    assert "lm_head.weight" not in names
    model.model.decoder.embed_positions.weight.requires_grad_(False)
    assert "model.decoder.embed_positions.weight" not in weights.parameters(model)
    gradient = weights.mean_gradient(model, random_sequences(2), sequence_losses)
    assert gradient.keys() == weights.parameters(model).keys()


def test_set_weights_moves_and_restores():
    model = tiny_model()
    start = weights.snapshot(model)
    step = {name: torch.ones_like(p) for name, p in start.items()}
    weights.set_weights(model, start, step, 0.5)
    moved = weights.difference(weights.snapshot(model), start)
    assert weights.norm(moved) == pytest.approx(0.5 * sum(p.numel() for p in start.values()) ** 0.5)
    weights.set_weights(model, start)
    assert weights.norm(weights.difference(weights.snapshot(model), start)) == 0


def test_factors_weigh_the_sequences(monkeypatch):
    monkeypatch.setattr(losses, "MOST_SEQUENCES", 2)
    model, sequences, factors = tiny_model(), random_sequences(5), torch.linspace(-1, 2, 5)
    live = list(weights.parameters(model).values())
    expected = torch.autograd.grad((factors * sequence_losses(model, sequences)).mean(), live)
    ours = weights.mean_gradient(model, sequences, sequence_losses, factors)
    for gradient, other in zip(ours.values(), expected, strict=True):
        torch.testing.assert_close(gradient, other)


def test_a_sequence_with_a_bad_loss_is_named(monkeypatch):
    monkeypatch.setattr(losses, "MOST_SEQUENCES", 4)

    def loss(model, batch):
        values = sequence_losses(model, batch)
        return torch.where(batch[:, 0] == bad[0], values * torch.nan, values)

    sequences = random_sequences(9)
    sequences[:, 0] = torch.arange(9)
    bad = sequences[7]
    with pytest.raises(FloatingPointError, match="the loss of sequence 7 is not finite"):
        weights.mean_gradient(tiny_model(), sequences, loss)


def test_rows_and_vectors_are_two_forms_of_one_thing():
    vector = weights.snapshot(tiny_model())
    row = weights.flatten(vector)
    assert row.shape == (sum(p.numel() for p in vector.values()),)
    for name, value in weights.unflatten(row, vector).items():
        assert torch.equal(value, vector[name])
    drawn = [weights.random_vector(vector, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(weights.flatten(drawn[0]), weights.flatten(drawn[1]))
    assert not torch.equal(weights.flatten(drawn[0]), weights.flatten(drawn[2]))
    assert weights.flatten(drawn[0]).std().item() == pytest.approx(1, abs=0.05)


def test_a_unit_vector_has_length_one_and_keeps_the_direction():
    like = weights.parameters(tiny_model())
    vector = weights.random_vector(like, torch.Generator().manual_seed(0))
    unit = weights.unit(vector)
    assert weights.norm(unit) == pytest.approx(1, rel=1e-12)
    assert weights.cosine(unit, vector) == pytest.approx(1, rel=1e-12)


def test_no_part_of_a_direction_that_is_not_finite_leaves_the_start():
    model = tiny_model()
    start = weights.snapshot(model)
    nowhere = {name: torch.full_like(value, float("nan")) for name, value in start.items()}
    weights.set_weights(model, start, nowhere, 0.0)
    assert weights.norm(weights.difference(weights.snapshot(model), start)) == 0
