"""DP-SGD: training with differential privacy (Abadi et al. 2016).

A step draws its batch by Poisson sampling, clips the gradient of every sequence to length C, adds them up, adds
noise of standard deviation σC to every coordinate and divides by the expected batch size. What that promises is in
:mod:`unlearnlib.methods.privacy`.

Weights, noise and batches come from ordinary pseudo-random numbers, so that a seed gives the same model again. A
model that is to protect people needs random numbers that nobody can repeat.
"""

import dataclasses
import functools
import inspect
import math
from pathlib import Path
from typing import Any

import opacus
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from unlearnlib import cache, cost
from unlearnlib.curvature import capture, per_sequence_gradients
from unlearnlib.losses import check_length, sequence_losses
from unlearnlib.methods.privacy import ORDERS, Privacy, noise_multiplier
from unlearnlib.models import loading, training
from unlearnlib.models.training import Training
from unlearnlib.weights import Vector, parameters, random_vector


@dataclasses.dataclass(frozen=True)
class PrivateRun:
    """All that decides a privately trained model; compare :class:`unlearnlib.models.training.Run`.

    Of ``training``, ``batch_size`` is the *expected* size of a batch and ``max_gradient_norm`` the length C to
    which the gradient of each sequence is clipped.
    Raises ValueError if there are no sequences, or fewer than a batch should have, or for a way of training that
    is not available here.
    """

    source: str | dict[str, Any]
    sequences: Tensor = dataclasses.field(repr=False)
    training: Training
    seed: int
    privacy: Privacy

    def __post_init__(self) -> None:
        if len(self.sequences) == 0:
            raise ValueError("there is nothing to train on: the set of sequences is empty")
        if self.training.batch_size > len(self.sequences):
            raise ValueError(
                f"batches of {self.training.batch_size} cannot be drawn from {len(self.sequences)} sequences: "
                "choose smaller batches"
            )
        if self.training.bfloat16 or self.training.checkpointing:
            raise ValueError("private training knows neither bfloat16 nor checkpointing: leave both off")

    @property
    def rate(self) -> float:
        """q: the probability with which a sequence is in a batch."""
        return self.training.batch_size / len(self.sequences)

    @property
    def steps(self) -> int:
        """The number of steps: as many as fit in the epochs, with batches of the expected size."""
        return -(-self.training.epochs * len(self.sequences) // self.training.batch_size)

    @functools.cached_property
    def noise(self) -> float:
        """σ: the smallest noise multiplier, nearly, that keeps the promise; 0 if none was made."""
        if self.privacy.epsilon is None:
            return 0.0
        return noise_multiplier(self.privacy, self.rate, self.steps)

    @functools.cached_property
    def folder(self) -> Path:
        """Where the finished model lives, or will: code, library versions, data and settings make its name."""
        run = training.Run(self.source, self.sequences, self.training, self.seed)
        description = run.description | {
            "privacy": dataclasses.asdict(self.privacy),
            "private_code": cache.json_hash("".join(map(inspect.getsource, CODE))),
            "orders": ORDERS,
            "opacus": opacus.__version__,
        }
        return cache.cache_folder() / "models" / cache.json_hash(description)[:32]


def clipped_sum(model: PreTrainedModel, batch: Tensor, length: float) -> tuple[Vector, Tensor]:
    """The sum over the batch [n, tokens] of every sequence's own gradient, clipped to ``length``; and losses [n].

    g min(1, C/‖g‖), where g is of the mean token loss in nats. The batch may be empty. Raises as
    :func:`unlearnlib.curvature.per_sequence_gradients.each_gradient`.
    """
    live = parameters(model)
    total, seen = {name: torch.zeros_like(p) for name, p in live.items()}, [torch.empty(0)]

    def loss(model: PreTrainedModel, part: Tensor) -> Tensor:
        losses = sequence_losses(model, part)
        seen.append(losses.detach().cpu())
        return losses

    for part in per_sequence_gradients.gradient_batches(model, batch, whole=True) if len(batch) else ():
        gradients = per_sequence_gradients.gradients_by_name(model, part, loss)
        lengths = torch.stack([g.flatten(start_dim=1).norm(dim=1) for g in gradients.values()]).norm(dim=0)
        factors = (length / lengths).clamp(max=1)
        for name, g in gradients.items():
            total[name] += torch.einsum("n,n...->...", factors, g)
    return total, torch.cat(seen)


def train_private(model: PreTrainedModel, run: PrivateRun) -> list[float]:
    """Train ``model`` in place with DP-SGD; return the mean loss of each batch in nats, NaN if it was empty.

    The optimizer and its schedule are those of :func:`unlearnlib.models.training.train`, which see only noised
    gradients: by post-processing they cost no privacy. Nothing is drawn from the global random numbers. The
    losses themselves are not private, and must not be published with the model.

    Raises ValueError for sequences too long for the model, and what :func:`clipped_sum` raises.
    """
    settings, sequences, live = run.training, run.sequences, parameters(model)
    check_length(model, sequences.shape[1])
    seeds = torch.randint(2**62, (2,), generator=torch.Generator().manual_seed(run.seed)).tolist()
    batches, noises = (torch.Generator().manual_seed(seed) for seed in seeds)
    adam = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, max_lr=settings.learning_rate, total_steps=run.steps)
    mean_losses = []
    model.train()
    for _ in tqdm(range(run.steps), desc="private training", unit="step", mininterval=1.0):
        drawn = torch.rand(len(sequences), generator=batches) < run.rate
        gradient, losses = clipped_sum(model, sequences[drawn], settings.max_gradient_norm)
        if run.noise > 0:
            noise = random_vector(live, noises)
            for name, value in gradient.items():
                value.add_(noise[name], alpha=run.noise * settings.max_gradient_norm)
        for name, p in live.items():
            p.grad = gradient[name] / settings.batch_size
        adam.step()
        schedule.step()
        mean_losses.append(losses.mean().item() if len(losses) else math.nan)
    model.zero_grad(set_to_none=True)
    model.eval()
    return mean_losses


# What a private model depends on besides training.CODE: a change to any of these trains every one again.
CODE = (PrivateRun, noise_multiplier, clipped_sum, train_private, random_vector, capture, per_sequence_gradients)


def load_private(run: PrivateRun, device: torch.device | str | None = None) -> PreTrainedModel:
    """The model of ``run``, from the cache where it is whole, else trained now."""
    with cache.lock(run.folder):
        if not training.intact(run.folder):
            model = loading.load_model(run.source, seed=run.seed)  # on the device that is in the folder's name
            clock = cost.clock(model.device)
            started = clock()
            losses = train_private(model, run)
            training.store(model, run.folder, {"losses": losses, "seconds": clock() - started})
    return loading.load_model(run.folder, device=device)
