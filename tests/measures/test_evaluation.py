import math

import numpy as np
import pytest
import torch
from helpers import ARCHITECTURES, VOCABULARY, random_sequences, tiny_model
from scipy import special

from unlearnlib import losses
from unlearnlib.losses import batched, batches, mean_loss, sequence_losses
from unlearnlib.measures.evaluation import (
    Reading,
    auc_error,
    mean_kl,
    membership,
    membership_auc,
    min_k_scores,
    read,
)


def numpy_log_probabilities(model, sequences):
    with torch.no_grad():
        logits = model(input_ids=sequences).logits[:, :-1].numpy()
    return logits - special.logsumexp(logits, axis=2, keepdims=True)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_losses_against_numpy_and_the_models_own_loss(architecture):
    model, sequences = tiny_model(architecture), random_sequences(5)
    logp = numpy_log_probabilities(model, sequences)
    rows, columns = np.indices(sequences[:, 1:].shape)
    expected = -logp[rows, columns, sequences[:, 1:].numpy()].mean(axis=1)
    np.testing.assert_allclose(sequence_losses(model, sequences).detach(), expected, rtol=1e-12)
    own = model(input_ids=sequences, labels=sequences).loss.item()
    assert mean_loss(model, sequences) == pytest.approx(own, rel=1e-6)  # theirs is in float32
    assert mean_loss(model, sequences) == pytest.approx(expected.mean(), rel=1e-12)


def test_a_model_that_knows_nothing_has_the_loss_of_a_uniform_guess():
    model = tiny_model()
    for p in model.parameters():
        torch.nn.init.zeros_(p)
    assert mean_loss(model, random_sequences(3)) == pytest.approx(math.log(VOCABULARY))


def test_kl_against_numpy_and_zero_to_itself():
    p_model, q_model, sequences = tiny_model(seed=0), tiny_model(seed=1), random_sequences(70)
    p, q = (numpy_log_probabilities(m, sequences) for m in (p_model, q_model))
    expected = special.rel_entr(np.exp(p), np.exp(q)).sum(axis=2).mean()
    assert expected > 1e-5
    assert mean_kl(p_model, q_model, sequences) == pytest.approx(expected, rel=1e-9)
    assert mean_kl(p_model, p_model, sequences) == pytest.approx(0, abs=1e-14)


def test_batching_changes_nothing(monkeypatch):
    model, sequences = tiny_model(), random_sequences(11)
    whole = sequence_losses(model, sequences)
    monkeypatch.setattr(losses, "MOST_SEQUENCES", 4)
    torch.testing.assert_close(batched(sequence_losses, model, sequences), whole.detach())


@pytest.mark.parametrize(
    ("sequences", "logits", "sizes"),
    [(32, 2**26, [32, 32, 6]), (100, 10 * 11 * VOCABULARY, 7 * [10]), (4, 11 * VOCABULARY - 1, 70 * [1])],
)
def test_batches_hold_no_more_than_is_allowed_and_at_least_one(sequences, logits, sizes, monkeypatch):
    monkeypatch.setattr(losses, "MOST_SEQUENCES", sequences)
    monkeypatch.setattr(losses, "MOST_LOGITS", logits)
    parts = batches(tiny_model(), random_sequences(70, length=12))
    assert [len(part) for part in parts] == sizes
    assert torch.equal(torch.cat(parts), random_sequences(70, length=12))


def test_auc_is_the_share_of_pairs_ranked_right():
    members, others = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([0.0, 2.0, -1.0, 5.0])
    pairs = [1.0 if m > o else 0.5 if m == o else 0.0 for m in members for o in others]
    assert membership_auc(members, others) == pytest.approx(sum(pairs) / len(pairs))


def test_the_error_of_an_auc_of_a_half_is_mann_and_whitneys():
    for n, m in ((5, 9), (40, 300)):
        assert auc_error(0.5, n, m) == pytest.approx(((n + m + 1) / (12 * n * m)) ** 0.5)


def test_an_area_of_one_or_none_is_not_known_exactly():
    for n, m in ((2, 1), (5, 9), (40, 300)):
        assert auc_error(1.0, n, m) > 0
        assert auc_error(0.0, n, m) > 0
    assert auc_error(1.0, 2, 1) > 0.25


def test_min_k_by_hand():
    losses = torch.tensor([[5.0, 1.0, 4.0, 2.0, 3.0, 0.0, 0.0, 0.0, 0.0, 0.0], [1.0] * 10])
    assert min_k_scores(losses, share=0.2).tolist() == [-4.5, -1.0]
    assert min_k_scores(losses, share=0.01).tolist() == [-5.0, -1.0]
    rising = torch.arange(63.0)[None]  # a fifth of 63 is 12.6, of which the authors' code takes 12
    assert min_k_scores(rising, share=0.2).tolist() == [-sum(range(51, 63)) / 12]


def test_sequences_beyond_the_context_are_refused():
    with pytest.raises(ValueError, match="sequences of 33 tokens do not fit the model's context of 32"):
        mean_loss(tiny_model(), random_sequences(2, length=33))


def test_one_pass_tells_losses_hits_and_divergence():
    model, reference, sequences = tiny_model(), tiny_model(seed=1), random_sequences(35)  # more than a batch
    reading = read(model, sequences, reference)
    p, q = (numpy_log_probabilities(m, sequences) for m in (reference, model))
    targets = sequences[:, 1:].numpy()
    by_token = -np.take_along_axis(q, targets[..., None], axis=2)[..., 0]
    np.testing.assert_allclose(reading.losses, by_token, rtol=1e-9)
    assert np.array_equal(reading.hits, q.argmax(axis=2) == targets)
    np.testing.assert_allclose(reading.kl, (np.exp(p) * (p - q)).sum(axis=2).mean(axis=1), rtol=1e-6)
    assert reading.loss == pytest.approx(by_token.mean())
    assert reading.loss == pytest.approx(mean_loss(model, sequences))
    assert reading.accuracy == pytest.approx((q.argmax(axis=2) == targets).mean())
    assert reading.divergence == pytest.approx(reading.kl.mean().item())
    assert read(model, sequences).kl is None


def test_readings_of_sets_join_to_that_of_all():
    model, sequences = tiny_model(), random_sequences(7)
    joined = Reading.joined([read(model, sequences[:3]), read(model, sequences[3:])])
    torch.testing.assert_close(joined.losses, read(model, sequences).losses)
    assert len(joined.hits) == 7


def test_both_attacks_look_for_members_where_the_loss_is_low():
    low, high = torch.full((3, 10), 1.0), torch.full((4, 10), 2.0)
    hits = torch.zeros(3, 10)
    told = membership(Reading(low, hits), Reading(high, hits))
    assert told == {"membership_auc": 1.0, "membership_auc_min_k": 1.0}
    high[:, 0] = 0.1  # most tokens decide over the mean, the worst over Min-K%
    low[:, 0] = 30.0
    told = membership(Reading(low, hits), Reading(high, hits))
    assert told == {"membership_auc": 0.0, "membership_auc_min_k": 0.0}
