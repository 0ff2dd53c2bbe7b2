"""The output layer's gradients in tiles, some tokens by some rows of the vocabulary: its logits need not fit."""

import math

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from unlearnlib.curvature.tiles import Tiles
from unlearnlib.weights import Vector


class OutputLayer:
    """The linear layer ``head`` on the last hidden states [m, T, width], with the labels ``targets`` [m, T].

    Parts of the logits are made in ``tiles``. :meth:`loss_gradient` comes first: it finds what :meth:`residuals`
    divide by.
    """

    def __init__(self, head: nn.Linear, hidden: Tensor, targets: Tensor, tiles: Tiles) -> None:
        self.targets, self.tiles = targets, tiles
        self.weight, self.bias = (p if p is None else p.detach() for p in (head.weight, head.bias))
        self.hidden = hidden.detach().to(tiles.buffer.dtype)

    def loss_gradient(self) -> Tensor:
        """Gradient of Σ ℓᵢ by the last hidden states, Wᵀ(p − e_y)/T of each token.

        Tiles of some tokens and some rows of the vocabulary fit, however large the vocabulary is: what
        has been summed relative to the largest logit so far is scaled down where a larger one comes (the online
        softmax of Milakov & Gimelshein 2018).
        """
        hidden, labels = self.hidden.flatten(end_dim=1), self.targets.flatten()
        gradient, total = torch.zeros_like(hidden), hidden.new_zeros(len(hidden), 1)
        top = torch.full_like(total, -math.inf)
        vocabulary, room = len(self.weight), len(self.tiles.buffer)
        height = max(min(vocabulary, math.isqrt(room)), room // len(hidden))
        for some in self.tiles.slices(len(hidden), height):
            for rows in self.tiles.slices(vocabulary, room // height):
                z, weight = self.logits(hidden[some], rows)
                largest = torch.maximum(top[some], z.amax(dim=1, keepdim=True))
                z, shrink = exp_(z.sub_(largest)), (top[some] - largest).exp_()
                top[some] = largest
                total[some] = shrink * total[some] + z.sum(dim=1, keepdim=True)
                gradient[some].mul_(shrink).addmm_(z, weight)
            gradient[some] /= total[some]
            gradient[some] -= self.weight[labels[some]]
        m, tokens = self.targets.shape
        self.normalisers = (top + total.log() + math.log(tokens)).view(m, tokens, 1)
        return gradient.div_(tokens).view_as(self.hidden)

    def residuals(self, rows: slice) -> Tensor:
        """(p − e_y)/T of each token of all sequences for some rows of the vocabulary, [m, T, rows]."""
        labels = self.targets
        z = self.logits(self.hidden.flatten(end_dim=1), rows)[0].view(*labels.shape, -1)
        z = exp_(z.sub_(self.normalisers))
        sequence, position = ((labels >= rows.start) & (labels < rows.stop)).nonzero(as_tuple=True)
        z[sequence, position, labels[sequence, position] - rows.start] -= 1 / labels.shape[1]
        return z

    def products(self, v: Vector, weight: str | None, bias: str | None) -> Tensor:
        """Gv of this layer's parameters, by the names that they have in ``v`` unless they are frozen, [m]."""
        products = self.hidden.new_zeros(len(self.hidden), dtype=torch.float64)
        (m, tokens), vocabulary = self.targets.shape, len(self.weight)
        for rows in self.tiles.slices(vocabulary, 2 * m * tokens):
            residuals = self.residuals(rows)
            outputs = self.tiles.space(residuals.numel(), *residuals.shape).zero_()
            if weight is not None:
                torch.matmul(self.hidden, v[weight][rows].to(self.hidden).mT, out=outputs)
            if bias is not None:
                outputs += v[bias][rows]
            products += outputs.mul_(residuals).sum(dim=(1, 2))
        return products

    def add_gradient(self, factors: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
        """Add the gradient of Σ fᵢ ℓᵢ by this layer's parameters to those that are given; ``factors`` is f [m]."""
        hidden, (m, tokens) = self.hidden.flatten(end_dim=1), self.targets.shape
        for rows in self.tiles.slices(len(self.weight), m * tokens):
            residuals = self.residuals(rows).mul_(factors[:, None, None].to(hidden)).flatten(end_dim=1)
            if weight is not None:
                weight[rows] += residuals.mT @ hidden
            if bias is not None:
                bias[rows] += residuals.sum(dim=0)

    def logits(self, hidden: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Logits of tokens for some rows of the vocabulary, at the start of the tiles, and the rows' weights."""
        weight = self.weight[rows].to(hidden.dtype)
        z = torch.mm(hidden, weight.mT, out=self.tiles.space(0, len(hidden), len(weight)))
        if self.bias is not None:
            z += self.bias[rows]
        return z, weight


def exp_(z: Tensor) -> Tensor:
    """Replace z by exp z: below ε² a probability counts for nothing, and products that underflow would be slow."""
    return torch.threshold_(z.exp_(), torch.finfo(z.dtype).eps ** 2, 0)


def find_output_layer(model: PreTrainedModel, tokens: Tensor) -> nn.Linear:
    """The linear layer that makes logits of the last hidden states, as is tried on ``tokens`` [n, T]."""
    head = model.get_output_embeddings()
    with torch.no_grad():
        plain = isinstance(head, nn.Linear) and torch.allclose(
            head(model.base_model(input_ids=tokens, use_cache=False).last_hidden_state),
            model(input_ids=tokens, use_cache=False).logits,
            rtol=1e-5,
            equal_nan=True,
        )
    if not plain:
        raise NotImplementedError(
            f"the logits of {type(model).__name__} are more than a linear layer of its last hidden states: they "
            "are scaled or capped (use FisherDual, with fewer sequences), or dropout is on (call model.eval())"
        )
    return head
