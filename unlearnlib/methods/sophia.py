"""SOUL (Jia et al. 2024): many small unlearning steps, each entry of which is divided by its own curvature.

The optimizer is Sophia (Liu et al. 2024). Its curvature is a diagonal, re-estimated now and then from one batch of
retained sequences, and a clip keeps every entry of a step below the learning rate where the estimate is too small
to be trusted.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from unlearnlib.curvature.per_sequence_gradients import sampled_losses
from unlearnlib.methods.first_order import Loss
from unlearnlib.methods.matching import Walk
from unlearnlib.methods.walks import descend
from unlearnlib.weights import check_whole


class Sophia(torch.optim.Optimizer):
    """θ ← θ − η clip(m / max(γh, ε), 1), entry by entry (Liu et al. 2024, algorithm 3).

    m is the running mean of the gradients, h that of the estimates given to :meth:`update_curvature`, with weights
    ``betas`` on what was; both start at 0, as in the paper, so that h is too small at first and the clip decides.
    Where |m| > γh the entry is a step of ±η, as in sign descent; elsewhere it is a Newton step of length η/γ.
    """

    def __init__(
        self,
        weights: Iterable[Tensor],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        gamma: float = 0.04,
        epsilon: float = 1e-12,
    ) -> None:
        super().__init__(weights, {"lr": lr, "betas": betas, "gamma": gamma, "epsilon": epsilon})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {"m": torch.zeros_like(p), "h": torch.zeros_like(p)}

    @torch.no_grad()
    def update_curvature(self, estimates: Iterable[Tensor]) -> None:
        """Take new estimates of the diagonal into h, one a parameter, in the order of the parameters."""
        pairs = [(p, group["betas"][1]) for group in self.param_groups for p in group["params"]]
        for (p, beta), estimate in zip(pairs, estimates, strict=True):
            self.state[p]["h"].lerp_(estimate, 1 - beta)

    @torch.no_grad()
    def step(self) -> None:
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    m, h = self.state[p]["m"], self.state[p]["h"]
                    m.lerp_(p.grad, 1 - group["betas"][0])
                    ratio = m / (group["gamma"] * h).clamp(min=group["epsilon"])
                    p.sub_(ratio.clamp(-1, 1), alpha=group["lr"])


def bartlett_diagonal(model: PreTrainedModel, sequences: Tensor, generator: torch.Generator) -> list[Tensor]:
    """The Gauss–Newton–Bartlett estimate of the diagonal of the Gauss–Newton matrix, from one backward pass.

    With labels drawn from the model (:func:`unlearnlib.curvature.per_sequence_gradients.sampled_losses`) the
    gradients gᵢ of the n ``sequences`` have mean zero and are independent, so that E[(Σ gᵢ)²] = Σ E[gᵢ²]: the
    square of the whole batch's gradient, over n, will do (Liu et al. 2024, algorithm 2). One tensor a parameter.
    Raises NotImplementedError for sharded weights.
    """
    check_whole(model, "Sophia's estimate of the curvature")
    live = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(sampled_losses(generator)(model, sequences).sum(), live)
    return [g.square() / len(sequences) for g in gradients]


def sophia_walk(
    model: PreTrainedModel,
    loss: Loss,
    forget: Tensor,
    retain: Tensor,
    learning_rate: float,
    seed: int,
    max_steps: int = 1000,
    batch_size: int = 32,
    every: int = 10,
) -> Walk:
    """As :func:`unlearnlib.methods.walks.adam_walk`, with Sophia in the place of Adam.

    Before every ``every``-th step, the first among them, h takes in an estimate from a batch of ``retain``: the
    curvature is that of what stays. The weights of the running means and γ are those of SOUL's experiment on TOFU
    (0.9, 0.95 and 0.04), ``every`` is Sophia's 10; SOUL's weight decay is left out.
    """
    live = [p for p in model.parameters() if p.requires_grad]
    optimizer = Sophia(live, learning_rate)
    steps = descend(model, loss, forget, retain, optimizer, seed, batch_size)

    def refreshed() -> Iterator[float]:
        generator = torch.Generator().manual_seed(seed)
        number = 0
        while True:
            if number % every == 0:
                batch = retain[torch.randperm(len(retain), generator=generator)[:batch_size]]
                optimizer.update_curvature(bartlett_diagonal(model, batch, generator))
            yield next(steps)
            number += 1

    return Walk(model, refreshed(), forget, max_steps)
