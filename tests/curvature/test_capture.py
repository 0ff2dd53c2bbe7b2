"""Gradients put together from captured halves against autograd, one sequence at a time, in float64."""

import math

import pytest
import torch
from helpers import ARCHITECTURES, VOCABULARY, random_sequences, tiny_model
from torch import nn

from unlearnlib import losses, weights
from unlearnlib.curvature import capture, per_sequence_gradients
from unlearnlib.losses import mean_loss, sequence_losses, token_losses
from unlearnlib.models import loading

SMALL = ARCHITECTURES["llama"] | {"num_key_value_heads": 1, "head_dim": 8}
ELSEWHERE = {
    "gemma": SMALL
    | {"model_type": "gemma", "tie_word_embeddings": True},  # scaled embeddings, norms that are (1 + w) · a
    "qwen2": SMALL | {"model_type": "qwen2"},  # biases in some of its layers
    "qwen3": SMALL | {"model_type": "qwen3"},  # norms within the attention
    "gpt_neox": SMALL | {"model_type": "gpt_neox"},  # queries, keys and values are one layer
    "falcon": {  # what a layer gives is added to in place
        "model_type": "falcon",
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    },
}
ALL = ARCHITECTURES | ELSEWHERE
SINGLE = {"llama", *ELSEWHERE} - {"gpt_neox", "falcon"}  # their norms round to float32, whatever we ask for


def by_autograd(model, sequences, loss=sequence_losses):
    """Gradient of every sequence's loss, name to [n, *shape]."""
    live = weights.parameters(model)
    rows = [torch.autograd.grad(loss(model, s[None]).sum(), list(live.values())) for s in sequences]
    return {name: torch.stack(parts) for name, parts in zip(live, zip(*rows, strict=True), strict=True)}


def same(ours, expected, tolerance=1e-10):
    assert list(ours) == list(expected)
    scale = max(gradients.abs().max().item() for gradients in expected.values())
    for name, gradients in expected.items():  # of biases of keys they are zero, but for rounding
        torch.testing.assert_close(ours[name], gradients, rtol=tolerance, atol=1e-2 * tolerance * scale, msg=name)


@pytest.mark.parametrize("architecture", ALL)
def test_every_sequence_gets_its_own_gradient(architecture):
    model = loading.load_model(ALL[architecture], seed=0, dtype=torch.float64, device="cpu")
    generator = torch.Generator().manual_seed(1)
    weights.set_weights(  # norms that are more than ones, and biases that are more than zeros
        model, weights.snapshot(model), weights.random_vector(weights.snapshot(model), generator), 0.1
    )
    tolerance = 1e-5 if architecture in SINGLE else 1e-10
    for number in (5, 1):
        sequences = random_sequences(number)
        same(per_sequence_gradients.gradients_by_name(model, sequences), by_autograd(model, sequences), tolerance)


def test_any_loss_of_single_sequences_will_do():
    def worst(model, batch):
        return token_losses(model, batch).amax(dim=1).square()

    model, sequences = tiny_model("gpt2"), random_sequences(4)
    same(per_sequence_gradients.gradients_by_name(model, sequences, worst), by_autograd(model, sequences, worst))


def test_batches_are_cut_by_the_memory_that_gradients_take(monkeypatch):
    model, sequences = tiny_model(), random_sequences(40)
    sizes = [8 * p.numel() for p in weights.parameters(model).values()]  # float64

    def lengths(whole=False):
        return [len(batch) for batch in per_sequence_gradients.gradient_batches(model, sequences, whole)]

    assert lengths() == [32, 8]
    monkeypatch.setattr(per_sequence_gradients, "GRADIENT_BYTES", 2 * 15 * max(sizes))
    assert lengths() == [15, 15, 10]
    monkeypatch.setattr(per_sequence_gradients, "GRADIENT_BYTES", 21 * sum(sizes) - 1)
    assert lengths(whole=True) == [20, 20]
    monkeypatch.setattr(losses, "MOST_SEQUENCES", 30)
    assert lengths() == [30, 10]
    monkeypatch.setattr(per_sequence_gradients, "GRADIENT_BYTES", 0)
    assert lengths() == 40 * [1]


def test_a_parameter_that_takes_no_part_and_a_broken_gradient_are_named():
    model, sequences = tiny_model(), random_sequences(3)
    model.vision = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match=r"'vision\.weight' takes no part in the loss"):
        per_sequence_gradients.gradients_by_name(model, sequences)

    def broken(model, batch):
        return sequence_losses(model, batch) * torch.tensor([1.0, math.inf, 1.0])

    with pytest.raises(FloatingPointError, match="gradient of sequence 11 is not finite"):
        per_sequence_gradients.each_gradient(tiny_model(), sequences, broken, lambda *_: None, first=10)


def test_a_tied_weight_is_in_two_layers_and_a_frozen_one_in_none():
    model = tiny_model("opt")
    tied = [
        layer.kind for layer in capture.find_layers(model) if layer.weight == "model.decoder.embed_tokens.weight"
    ]
    assert sorted(tied) == ["embedding", "linear"]
    model.model.decoder.embed_tokens.weight.requires_grad_(False)
    model.model.decoder.layers[0].fc1.bias.requires_grad_(False)
    same(
        per_sequence_gradients.gradients_by_name(model, random_sequences(3)),
        by_autograd(model, random_sequences(3)),
    )


def test_a_padding_row_is_refused():
    model = tiny_model("opt")
    model.model.decoder.embed_tokens.padding_idx = 3
    with pytest.raises(NotImplementedError, match="is for padding and gets no gradient"):
        capture.find_layers(model)


def test_afterwards_all_is_as_before():
    model, sequences = tiny_model("opt"), random_sequences(3)
    model.model.decoder.layers[0].fc1.bias.requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ZeroDivisionError), capture.capture(model, capture.find_layers(model), lambda *_: None):
        assert not any(p.requires_grad for p in model.parameters())
        raise ZeroDivisionError
    assert [p.requires_grad for p in model.parameters()] == before
    received = []
    with capture.capture(model, capture.find_layers(model), lambda *got: received.append(got)):
        mean_loss(model, sequences)
    sequence_losses(model, sequences).sum().backward()
    assert received == []  # neither an evaluation nor a pass outside the block


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16, dtype=torch.float64))

    def forward(self, x):
        return x * self.weight


class SquaredNorm(nn.LayerNorm):
    def forward(self, x):
        return nn.functional.layer_norm(x, self.normalized_shape) * self.weight**2 + self.bias


class RowNorm(nn.LayerNorm):
    """More than one entry's weight in an entry."""

    def forward(self, x):
        return super().forward(x) * self.weight.flip(0).sum()


class ShiftedEmbedding(nn.Embedding):
    def forward(self, rows):
        return super().forward(rows) + 1


def test_layers_we_do_not_know_are_named():
    model = tiny_model("opt")
    model.model.decoder.layers[1].activation_fn = Scale()
    with pytest.raises(
        NotImplementedError, match=r"'model\.decoder\.layers\.1\.activation_fn' \(Scale\) is no linear"
    ):
        capture.find_layers(model)
    model.model.decoder.layers[1].activation_fn.weight.requires_grad_(False)
    capture.find_layers(model)


@pytest.mark.parametrize(
    ("kind", "module", "other"),
    [
        ("norm", "final_layer_norm", SquaredNorm),
        ("norm", "final_layer_norm", RowNorm),
        ("embedding", "embed_tokens", ShiftedEmbedding),
    ],
)
def test_layers_that_do_more_than_they_seem_to_are_named(kind, module, other):
    model, sequences = tiny_model("opt"), random_sequences(2)
    getattr(model.model.decoder, module).__class__ = other
    with (
        pytest.raises(NotImplementedError, match=f"is not the plain {kind} layer"),
        capture.capture(model, capture.find_layers(model), lambda *_: None),
    ):
        sequence_losses(model, sequences)


def test_a_layer_used_twice_is_named():
    model, sequences = tiny_model("opt"), random_sequences(2)
    layers = model.model.decoder.layers
    layers[1].fc1 = layers[0].fc1
    with (
        pytest.raises(NotImplementedError, match=r"'model\.decoder\.layers\.0\.fc1' .* is used twice"),
        capture.capture(model, capture.find_layers(model), lambda *_: None),
    ):
        sequence_losses(model, sequences)
