from types import SimpleNamespace

import pytest
import torch
from helpers import ARCHITECTURES, VOCABULARY, random_sequences, tiny_model

from unlearnlib import losses
from unlearnlib.measures import extraction
from unlearnlib.models import loading, training


def model_that_counts(model):
    """A stand-in for a model whose most likely next token is always the last one plus 1."""

    def forward(input_ids, past_key_values=None, use_cache=None, logits_to_keep=0):
        logits = torch.nn.functional.one_hot(input_ids[:, -1:] + 1, 100).float()
        return SimpleNamespace(logits=logits, past_key_values=None)

    model.forward = forward
    return model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_continuations_agree_with_plain_passes_and_with_generate(architecture):
    model, prompts = tiny_model(architecture, seed=3), random_sequences(4, length=7)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8)  # as drawn, a model repeats its last token, and would do so without its cache
    found = extraction.continuations(model, prompts, 9)
    assert len(found.unique()) > 5
    sequence = prompts
    for _ in range(9):
        with torch.no_grad():
            logits = model(input_ids=sequence, use_cache=False).logits
        sequence = torch.cat([sequence, logits[:, -1:].argmax(dim=2)], dim=1)
    assert found.tolist() == sequence[:, 7:].tolist()
    theirs = model.generate(
        input_ids=prompts, max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert found.tolist() == theirs[:, 7:].tolist()


def test_verbatim_length():
    truth = torch.tensor([1, 2, 3, 4])
    assert extraction.verbatim_length(torch.tensor([1, 2, 3]), truth) == 3
    assert extraction.verbatim_length(torch.tensor([1, 2, 9, 4]), truth) == 2
    assert extraction.verbatim_length(torch.tensor([9, 2]), truth) == 0


def test_recites_is_every_token_of_the_rest():
    model = tiny_model("opt")
    prompts = random_sequences(2, length=5)
    said = torch.cat([prompts, extraction.continuations(model, prompts, 3)], dim=1)
    other = said.clone()
    other[1, -1] = (other[1, -1] + 1) % VOCABULARY
    assert extraction.recites(model, said, 5).tolist() == [True, True]
    assert extraction.recites(model, other, 5).tolist() == [True, False]


def test_overlap_by_hand():
    truth = torch.tensor([1, 2, 3, 1, 2])
    assert extraction.overlap(torch.tensor([1, 2, 3, 1, 2]), truth, 2) == 1
    assert extraction.overlap(torch.tensor([7, 1, 2, 7, 1, 2]), truth, 2) == 2 / 5  # place and number are free
    assert extraction.overlap(torch.tensor([2, 1, 3, 2]), truth, 2) == 0
    assert extraction.overlap(torch.tensor([2, 1, 3, 9]), truth, 1) == 3 / 4
    assert extraction.overlap(torch.tensor([9, 2, 3, 1]), truth, 3) == 1 / 2


def test_extraction_likelihood_by_hand(monkeypatch):
    """The model counts on from the last token of its prompt; the text counts, but for one jump."""
    model = model_that_counts(tiny_model())
    text = torch.tensor([[10, 11, 12, 13, 30, 31, 32]])
    # t = 1 and 2 and 3 write 11-16, 12-16, 13-16, of which the pairs 11 12, 12 13 / 12 13 / none are in the rest;
    # t = 4 writes 14-16 and none is; t = 5 writes 31 32, which is all that is left.
    shares = [2 / 5, 1 / 4, 0, 0, 1]
    assert extraction.extraction_likelihood(model, text, n=2, stride=1) == pytest.approx(sum(shares) / 5)
    assert extraction.extraction_likelihood(model, text, n=2, stride=2) == pytest.approx((1 / 4 + 0) / 2)
    counting = torch.arange(20, 27)[None]
    assert extraction.extraction_likelihood(model, counting, n=3, stride=1) == 1
    both = torch.cat([text, counting])
    expected = (sum(shares) / 5 + 1) / 2
    for most in (1, 64):
        monkeypatch.setattr(losses, "MOST_SEQUENCES", most)
        found = extraction.extraction_likelihood(model, both, n=2, stride=1)
        assert found == pytest.approx(expected)


def slow_extraction_likelihood(model, sequences, n):
    """The definition, written out: one prompt, one token and one n-gram at a time."""
    total = 0.0
    for row in sequences.tolist():
        scores = []
        for t in range(1, len(row) - n + 1):
            text = row[:t]
            while len(text) < len(row):
                with torch.no_grad():
                    text.append(int(model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
            rest = [row[i : i + n] for i in range(t, len(row) - n + 1)]
            hits = sum(text[i : i + n] in rest for i in range(t, len(row) - n + 1))
            scores.append(hits / len(rest))
        total += sum(scores) / (len(row) - n)
    return total / len(sequences)


@pytest.fixture(scope="module")
def trained():
    """A model that has learnt the first half of the sequences, and only them."""
    model, sequences = tiny_model(dtype=torch.float32), random_sequences(8)
    training.train(model, sequences[:4], training.Training(epochs=60, learning_rate=1e-2), seed=0)
    return model, sequences


def test_extraction_likelihood_of_a_trained_model_against_a_slow_one(trained):
    model, sequences = trained
    for n in (1, 3):
        known, unknown = (
            extraction.extraction_likelihood(model, part, n=n, stride=1) for part in sequences.chunk(2)
        )
        assert known > unknown
        assert known == pytest.approx(slow_extraction_likelihood(model, sequences[:4], n))
        assert unknown == pytest.approx(slow_extraction_likelihood(model, sequences[4:], n))
    assert 0.2 < extraction.extraction_likelihood(model, sequences, n=3, stride=1) < 0.9


def test_what_does_not_fit_is_a_clear_error():
    model = tiny_model()
    with pytest.raises(ValueError, match="12 tokens are too short for 10-grams after 8 tokens: they need 18"):
        extraction.extraction_likelihood(model, random_sequences(2))
    assert 0 <= extraction.extraction_likelihood(model, random_sequences(2, length=18)) <= 1
    with pytest.raises(ValueError, match="sequences of 33 tokens do not fit the model's context of 32"):
        extraction.extraction_likelihood(model, random_sequences(2, length=33))
    with pytest.raises(ValueError, match="at least one token to continue and one to add, not 0 and 3"):
        extraction.continuations(model, random_sequences(2)[:, :0], 3)


@pytest.mark.parametrize(
    ("config", "cached"),
    [
        (ARCHITECTURES["opt"], True),
        (ARCHITECTURES["gpt2"], True),
        ({"model_type": "recurrent_gemma", "num_attention_heads": 2, "attention_window_size": 8}, False),
        ({"model_type": "mamba", "state_size": 4}, False),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_architectures_without_the_usual_cache_are_read_again(config, cached):
    config = (
        {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24} | config | {"vocab_size": VOCABULARY}
    )
    model, sequences = loading.load_model(config, device="cpu"), random_sequences(2, length=20)
    assert extraction.has_cache(model, sequences[:1, :9]) is cached
    found = sequences[:, :8]
    for _ in range(12):
        with torch.no_grad():
            found = torch.cat([found, model(input_ids=found, use_cache=False).logits[:, -1:].argmax(2)], dim=1)
    assert torch.equal(extraction.continuations(model, sequences[:, :8], 12, cached), found[:, 8:])
    assert extraction.extraction_likelihood(model, found, n=10, stride=8) == 1  # it writes what it would write
