import pytest
import torch
from helpers import random_sequences, tiny_model

from unlearnlib.losses import token_losses
from unlearnlib.measures import prompts


def test_only_first_halves_are_tampered_with_and_by_the_share_that_is_asked():
    rows = random_sequences(400)
    for share in (0.0, 0.25, 1.0):
        changed = prompts.tampered(rows, share, seed=0)
        assert torch.equal(changed[:, 6:], rows[:, 6:])
        moved = (changed[:, :6] != rows[:, :6]).double().mean().item()
        assert moved == pytest.approx(share * (1 - 1 / 39), abs=0.03)  # a draw may be what was there
    assert torch.equal(prompts.tampered(rows, 0.0, seed=0), rows)
    assert set(prompts.tampered(rows, 1.0, seed=0)[:, :6].unique().tolist()) <= set(rows[:, :6].unique().tolist())


def test_losses_of_the_second_half_are_those_of_a_whole_pass():
    model, rows = tiny_model(), random_sequences(5)
    losses = prompts.second_half_losses(model, rows)
    torch.testing.assert_close(losses, token_losses(model, rows)[:, -6:].detach())


def test_a_share_must_be_one():
    with pytest.raises(ValueError, match="between 0 and 1"):
        prompts.tampered(random_sequences(2), 1.5, seed=0)
