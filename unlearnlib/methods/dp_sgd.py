"""DP-SGD: training with differential privacy (Abadi et al. 2016), put together from the parts of Opacus.

A step draws its batch by Poisson sampling, clips the gradient of every sequence to length C, adds them up, adds
noise of standard deviation σC to every coordinate and divides by the expected batch size. An accountant turns σ,
the sampling rate q and the number of steps into (ε, δ). Neighbouring data sets differ by one sequence.

Weights, noise and batches come from ordinary pseudo-random numbers, so that a seed gives the same model again. A
model that is to protect people needs random numbers that nobody can repeat.
"""

import copy
import dataclasses
import functools
import inspect
import json
import math
import warnings
from pathlib import Path
from typing import Any

import opacus
import torch
from opacus.accountants import PRVAccountant, RDPAccountant
from opacus.accountants.utils import get_noise_multiplier
from opacus.grad_sample import GradSampleHooks
from opacus.optimizers import DPOptimizer
from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from unlearnlib import cache, cost
from unlearnlib.losses import check_length, sequence_losses
from unlearnlib.methods.first_order import ascent_direction
from unlearnlib.models import loading, training
from unlearnlib.models.training import Training
from unlearnlib.weights import Vector, difference, norm, parameters

# Rényi orders among which the accountant looks for the one that gives the smallest ε.
_ORDERS = [1.01, 1.02, 1.05, *RDPAccountant.DEFAULT_ALPHAS, 128, 256, 512]


@dataclasses.dataclass(frozen=True)
class Privacy:
    """The promise: ``epsilon`` and ``delta`` for one sequence. Without ``epsilon`` there is clipping but no noise.

    Raises ValueError if ε is not positive and finite or δ not between 0 and 1.
    """

    epsilon: float | None
    delta: float = 1e-5

    def __post_init__(self) -> None:
        if self.epsilon is not None and not (self.epsilon > 0 and math.isfinite(self.epsilon)):
            raise ValueError(f"epsilon must be positive and finite, not {self.epsilon}: None means no noise")
        if not 0 < self.delta < 1:
            raise ValueError(f"delta must lie between 0 and 1, not {self.delta}: take it well below 1/n")


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
            "orders": _ORDERS,
            "opacus": opacus.__version__,
        }
        return cache.cache_folder() / "models" / cache.json_hash(description)[:32]


def noise_multiplier(privacy: Privacy, rate: float, steps: int) -> float:
    """The σ with which ``steps`` steps at sampling rate q keep the promise, to within 1 % of its ε."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Optimal order", UserWarning)  # see spent_epsilon
        return get_noise_multiplier(
            target_epsilon=privacy.epsilon,
            target_delta=privacy.delta,
            sample_rate=rate,
            steps=steps,
            accountant="rdp",
            epsilon_tolerance=0.01 * privacy.epsilon,
            alphas=_ORDERS,
        )


def spent_epsilon(noise: float, rate: float, steps: int, delta: float, size: int = 1) -> float:
    """ε at ``delta`` after ``steps`` steps, for ``size`` sequences together (Mironov et al. 2019, by Opacus).

    For more than one sequence: a batch holds at least one of them with probability 1 - (1 - q)^size, and then
    they move the sum of the clipped gradients by no more than size × C. Every order of Rényi divergence gives a
    valid bound, so that one at the end of the list (of which Opacus warns) may at most be loose.
    Raises ValueError for a size below one.
    """
    _check_group(size)
    accountant = RDPAccountant()
    accountant.history = [(noise / size, 1 - (1 - rate) ** size, steps)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Optimal order", UserWarning)
        return accountant.get_epsilon(delta, alphas=_ORDERS)


def tighter_epsilon(noise: float, rate: float, steps: int, delta: float) -> float:
    """ε at ``delta`` after ``steps`` steps, for one sequence, from the distribution of the privacy loss itself.

    By the PRV accountant of Opacus, to within 0.01. It shows by how much :func:`spent_epsilon` is too large, and
    cannot take its place: what is known of groups is about Rényi divergences.
    """
    accountant = PRVAccountant()
    accountant.history = [(noise, rate, steps)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Optimal order", UserWarning)  # of a first guess by Rényi divergences
        warnings.filterwarnings("ignore", "divide by zero", RuntimeWarning)  # log(1 - q) of full batches
        return float(accountant.get_epsilon(delta, eps_error=0.01))


def group_guarantee(privacy: Privacy, size: int) -> tuple[float, float]:
    """ε and δ that hold for ``size`` sequences together, from those for one alone, whatever the mechanism.

    (kε, δ (e^{kε} - 1)/(e^ε - 1)), derived in the chapter. A δ of 1 or more promises nothing.
    Raises ValueError for a size below one, or if nothing was promised to begin with.
    """
    _check_group(size)
    epsilon = privacy.epsilon
    if epsilon is None:
        raise ValueError("without noise nothing is promised to one sequence, and so nothing to more: set epsilon")
    try:
        factor = math.expm1(size * epsilon) / math.expm1(epsilon)
    except OverflowError:
        factor = math.inf
    return size * epsilon, privacy.delta * factor


def _check_group(size: int) -> None:
    if size < 1:
        raise ValueError(f"a group has at least one sequence, not {size}")


def auc_bound(epsilon: float, delta: float) -> float:
    """1 - e^{-ε}(1/2 - δ): the largest mean AUC of an attack on the membership of one sequence.

    Proved in the chapter, for a sequence and a stranger that only membership tells apart.
    """
    return 1 - math.exp(-epsilon) * (0.5 - delta)


def sequence_gradients(model: PreTrainedModel, sequences: Tensor) -> Vector:
    """The gradient of each sequence's loss by Opacus' hooks: by parameter, shape [n, *parameter].

    ``model`` is left as it was.
    """
    training_mode = model.training
    hooks = GradSampleHooks(model.train())
    try:
        _backward(model, sequences)
        return {name: p.grad_sample for name, p in parameters(model).items()}
    finally:
        hooks.cleanup()
        model.zero_grad(set_to_none=True)
        model.train(training_mode)


def check_supported(model: PreTrainedModel, sequences: Tensor) -> None:
    """Raise ValueError unless Opacus' gradients of two of the ``sequences`` are those of autograd.

    Opacus catches input and output gradients at each layer. Where a layer is given something else than a batch,
    such as positions that all sequences share, it fails in one way or another, or is wrong without a word.
    """
    sample, model = sequences[:2], copy.deepcopy(model)
    try:
        found = sequence_gradients(model, sample)
        right = all(_agree(found, i, ascent_direction(model, sample[i : i + 1])) for i in range(len(sample)))
    except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(_UNSUPPORTED.format(model.config.model_type)) from error
    if not right:
        raise ValueError(_UNSUPPORTED.format(model.config.model_type))


_UNSUPPORTED = (
    "Opacus does not give the gradients of single sequences of this {} model, so that it cannot be trained "
    "privately: take a model whose layers all see the batch, such as one of the Llama type"
)


def _agree(found: Vector, i: int, expected: Vector) -> bool:
    """Whether the gradients ``found`` of sequence i are the ``expected`` ones, but for rounding."""
    if any(found[name].shape[1:] != g.shape or len(found[name]) <= i for name, g in expected.items()):
        return False
    return norm(difference({name: g[i] for name, g in found.items()}, expected)) <= 1e-3 * norm(expected)


def train_private(model: PreTrainedModel, run: PrivateRun) -> list[float]:
    """Train ``model`` in place with DP-SGD; return the mean loss of each batch in nats, NaN if it was empty.

    The optimizer and its schedule are those of :func:`unlearnlib.models.training.train`, which see only noised
    gradients: by post-processing they cost no privacy. Nothing is drawn from the global random numbers. The
    losses themselves are not private, and must not be published with the model.

    Raises ValueError for a model that Opacus cannot train or sequences too long for it.
    """
    settings, sequences = run.training, run.sequences
    check_length(model, sequences.shape[1])
    check_supported(model, sequences)
    seeds = torch.randint(2**62, (2,), generator=torch.Generator().manual_seed(run.seed)).tolist()
    sampler = UniformWithReplacementSampler(
        num_samples=len(sequences),
        sample_rate=run.rate,
        steps=run.steps,
        generator=torch.Generator().manual_seed(seeds[0]),
    )
    adam = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, max_lr=settings.learning_rate, total_steps=run.steps)
    optimizer = DPOptimizer(
        adam,
        noise_multiplier=run.noise,
        max_grad_norm=settings.max_gradient_norm,
        expected_batch_size=settings.batch_size,
        generator=torch.Generator(model.device).manual_seed(seeds[1]),
    )
    hooks = GradSampleHooks(model.train())
    hooks.forbid_grad_accumulation()
    losses = []
    try:
        for indices in tqdm(sampler, desc="private training", unit="step", mininterval=1.0):
            optimizer.zero_grad()
            losses.append(_backward(model, sequences[indices]))
            optimizer.step()
            schedule.step()
    finally:
        hooks.cleanup()
        model.zero_grad(set_to_none=True)
    model.eval()
    return losses


def _backward(model: PreTrainedModel, sequences: Tensor) -> float:
    """Leave the gradient of each sequence in ``grad_sample`` of the parameters; return their mean loss."""
    if len(sequences) == 0:  # Poisson sampling draws nobody now and then: all that is left is noise
        for p in parameters(model).values():
            p.grad_sample = p.new_zeros((0, *p.shape))
        return math.nan
    loss = sequence_losses(model, sequences).mean()
    with warnings.catch_warnings():
        # Token ids have no gradient, which is as it should be; what is read is the gradient of the output.
        warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
        loss.backward()
    return loss.item()


# What a private model depends on besides training.CODE: a change to any of these trains every one again.
CODE = (PrivateRun, noise_multiplier, train_private, _backward)


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


def private_record(run: PrivateRun) -> dict[str, Any]:
    """What was noted when the model of ``run`` was trained: ``losses`` (nats, by step) and ``seconds``."""
    load_private(run)
    return json.loads((run.folder / "training.json").read_text())
