"""Gradients put together from captured halves against autograd, one sequence at a time, in float64."""

import pytest
import torch
from helpers import ARCHITECTURES, random_sequences, tiny_model
from torch import nn

from unlearnlib import weights
from unlearnlib.curvature import capture
from unlearnlib.losses import mean_loss, sequence_losses


def by_autograd(model, sequences):
    """Gradient of every sequence's loss, name to [n, *shape]."""
    live = weights.parameters(model)
    rows = [torch.autograd.grad(sequence_losses(model, s[None]).sum(), list(live.values())) for s in sequences]
    return {name: torch.stack(parts) for name, parts in zip(live, zip(*rows, strict=True), strict=True)}


def by_capture(model, sequences):
    found: dict[str, torch.Tensor] = {}

    def receive(layer, inputs, gradient):
        for name, part in capture.sequence_gradients(layer, inputs, gradient).items():
            found[name] = found[name] + part if name in found else part

    with capture.capture(model, capture.find_layers(model), receive):
        sequence_losses(model, sequences).sum().backward()
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_sequence_gets_its_own_gradient(architecture):
    model, sequences = tiny_model(architecture), random_sequences(5)
    expected, ours = by_autograd(model, sequences), by_capture(model, sequences)
    assert ours.keys() == expected.keys()
    # Llama's norm rounds to float32, whatever we ask for.
    tolerance = 1e-5 if architecture == "llama" else 1e-10
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name], rtol=tolerance, atol=tolerance * 1e-2)


def test_a_tied_weight_is_in_two_layers_and_a_frozen_one_in_none():
    model = tiny_model("opt")
    tied = [
        layer.kind for layer in capture.find_layers(model) if layer.weight == "model.decoder.embed_tokens.weight"
    ]
    assert sorted(tied) == ["embedding", "linear"]
    model.model.decoder.embed_tokens.weight.requires_grad_(False)
    model.model.decoder.layers[0].fc1.bias.requires_grad_(False)
    expected, ours = by_autograd(model, random_sequences(3)), by_capture(model, random_sequences(3))
    assert ours.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-10, atol=1e-12)


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


class BiasedNorm(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x) + 1


class ScaledEmbedding(nn.Embedding):
    def forward(self, rows):
        return 4 * super().forward(rows)


def test_layers_we_do_not_know_are_named():
    model = tiny_model("opt")
    model.model.decoder.layers[1].activation_fn = Scale()
    with pytest.raises(
        NotImplementedError, match=r"'model\.decoder\.layers\.1\.activation_fn' \(Scale\) is no linear"
    ):
        capture.find_layers(model)
    model.model.decoder.layers[1].activation_fn.weight.requires_grad_(False)
    capture.find_layers(model)


@pytest.mark.parametrize("kind", ["norm", "embedding"])
def test_layers_that_do_more_than_they_seem_to_are_named(kind):
    model, sequences = tiny_model("opt"), random_sequences(2)
    if kind == "norm":
        model.model.decoder.final_layer_norm.__class__ = BiasedNorm
    else:
        model.model.decoder.embed_tokens.__class__ = ScaledEmbedding
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
