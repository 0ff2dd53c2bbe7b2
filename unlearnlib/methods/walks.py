"""First-order methods as paths: small steps down a loss, in batches, until the forget loss is at its target."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from unlearnlib.methods.first_order import Loss, ascent_loss, retain_loss
from unlearnlib.methods.matching import Match, Walk
from unlearnlib.weights import set_weights, snapshot


def descend(
    model: PreTrainedModel,
    loss: Loss,
    forget: Tensor,
    retain: Tensor,
    optimizer: torch.optim.Optimizer,
    seed: int,
    batch_size: int = 32,
) -> Iterator[float]:
    """Minimise ``loss`` in place, endlessly; each ``next`` is one step and gives the loss before it.

    Batches of ``forget`` and of ``retain`` [n, tokens] are drawn without replacement within an epoch of each, in
    an order set by ``seed``. The caller decides when to stop, usually a ``Walk``.

    Raises FloatingPointError when the loss is no longer finite: for ascent, a question of time.
    """
    streams = (_batches(forget, batch_size, seed), _batches(retain, batch_size, seed + 1))
    for forget_batch, retain_batch in zip(*streams, strict=True):
        value = loss(model, forget_batch, retain_batch)
        number = value.item()
        if not math.isfinite(number):
            raise FloatingPointError("the loss is not finite any more: stop earlier or take smaller steps")
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
        yield number


def sgd_walk(
    model: PreTrainedModel,
    loss: Loss,
    forget: Tensor,
    retain: Tensor,
    learning_rate: float,
    seed: int,
    max_steps: int = 1000,
    batch_size: int = 32,
) -> Walk:
    """The path of :func:`descend` with plain SGD, by targets of the loss on ``forget``.

    It starts from the weights that ``model`` has now, and is of ``max_steps`` steps at the most. With
    ``ascent_loss`` each step is θ ← θ + η∇L(θ; batch), ascent batch by batch: Algorithm 1 of Gu et al. (2024).
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    return Walk(model, descend(model, loss, forget, retain, optimizer, seed, batch_size), forget, max_steps)


def adam_walk(
    model: PreTrainedModel,
    loss: Loss,
    forget: Tensor,
    retain: Tensor,
    learning_rate: float,
    seed: int,
    max_steps: int = 1000,
    batch_size: int = 32,
    falling: bool = False,
) -> Walk:
    """As :func:`sgd_walk`, with Adam (Kingma & Ba 2015). If ``falling``, it comes to its targets from above."""
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    steps = descend(model, loss, forget, retain, optimizer, seed, batch_size)
    return Walk(model, steps, forget, max_steps, falling)


class RepairedAscent:
    """Ascent past the target, and then repair: a path that comes to its targets from above.

    Adam climbs the loss on ``forget`` until it is ``overshoot`` nats above the target, and then descends the loss
    on ``retain`` until the forget loss has fallen back to the target. Every target is a new journey from the
    weights that ``model`` has now, so that the result does not depend on the targets before it. A strength is the
    number of steps, up and down together, of which each half may have ``max_steps``. With no overshoot it would be
    plain ascent. Raises ValueError if ``overshoot`` is not positive.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        forget: Tensor,
        retain: Tensor,
        learning_rate: float,
        overshoot: float,
        seed: int,
        max_steps: int = 1000,
        batch_size: int = 32,
    ) -> None:
        if not (overshoot > 0 and math.isfinite(overshoot)):
            raise ValueError(f"the overshoot must be positive and finite, in nats, not {overshoot}")
        self.model, self.start, self.overshoot = model, snapshot(model), overshoot
        self.settings = forget, retain, learning_rate, seed, max_steps, batch_size

    def to(self, target: float) -> Match:
        """Bring ``model`` to the forget loss ``target`` in nats from above.

        Where ascent does not get past the target, or repair does not bring the loss down to it, ``reached`` is
        false, and the model is left where it ended.
        """
        set_weights(self.model, self.start)
        up = adam_walk(self.model, ascent_loss, *self.settings).to(target + self.overshoot)
        if not up.reached:
            return Match(up.strength, up.loss, False, up.evaluations)
        down = adam_walk(self.model, retain_loss, *self.settings, falling=True).to(target)
        return Match(up.strength + down.strength, down.loss, down.reached, up.evaluations + down.evaluations)


def _batches(sequences: Tensor, batch_size: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from sequences[torch.randperm(len(sequences), generator=generator)].split(batch_size)
