"""Training with AdamW and a one-cycle schedule: deterministic, resumable, and never the same model twice."""

import dataclasses
import functools
import inspect
import json
import shutil
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import tokenizers
import torch
import transformers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from unlearnlib import cache, cost
from unlearnlib.losses import check_length, logits, sequence_losses, token_losses
from unlearnlib.models import loading


@dataclasses.dataclass(frozen=True)
class Training:
    """How to train: AdamW (Loshchilov & Hutter 2019) under one cycle of learning rates (Smith & Topin 2019).

    ``bfloat16`` multiplies matrices in that format on a CUDA device (``half_precision``).
    ``checkpointing`` keeps less of each forward pass and computes the rest again, for models that fill a GPU.
    """

    epochs: int = 15
    batch_size: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    max_gradient_norm: float = 1.0
    bfloat16: bool = False
    checkpointing: bool = False


@dataclasses.dataclass(frozen=True)
class Run:
    """All that decides a trained model: where it starts, its sequences [n, tokens], how, and the seed.

    The seed draws the initial weights, where ``source`` is a configuration, and the order of the batches.
    With ``last_blocks`` only so many transformer blocks are trained, the last ones.
    """

    source: str | dict[str, Any]
    sequences: Tensor = dataclasses.field(repr=False)
    training: Training
    seed: int
    last_blocks: int | None = None

    @functools.cached_property
    def description(self) -> dict[str, Any]:
        """The run as JSON values: code, library versions and device count as much as data and settings."""
        code = "".join(map(inspect.getsource, CODE))
        versions = {module.__name__: module.__version__ for module in (torch, transformers, tokenizers)}
        part = {} if self.last_blocks is None else {"last_blocks": self.last_blocks}
        return part | {
            "source": self.source,
            "weights": loading.fingerprint(self.source),
            "device": loading.device_name(loading.default_device()),
            "sequences": cache.json_hash(self.sequences.tolist()),
            "training": dataclasses.asdict(self.training),
            "seed": self.seed,
            "code": cache.json_hash(code),
            "versions": versions,
        }

    @property
    def folder(self) -> Path:
        """Where the finished model lives, or will."""
        return cache.cache_folder() / "models" / cache.json_hash(self.description)[:32]


def train(
    model: PreTrainedModel,
    sequences: Tensor,
    training: Training,
    seed: int,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 20.0,
) -> list[float]:
    """Train ``model`` in place on ``sequences`` [n, tokens]; return the loss of every step in nats.

    The order of the batches depends on ``seed`` and the epoch alone. With a ``checkpoint`` path the state is
    written there every ``checkpoint_seconds``, and a run that finds one resumes from it: an interrupted and an
    uninterrupted run end in the same weights, bit for bit. The file is left to be removed once the model is safe.

    Raises ValueError if there are no sequences or they are too long for the model, FloatingPointError if the
    loss stops being finite.
    """
    if len(sequences) == 0:
        raise ValueError("there is nothing to train on: the set of sequences is empty")
    check_length(model, sequences.shape[1])
    steps_per_epoch = -(-len(sequences) // training.batch_size)
    steps = training.epochs * steps_per_epoch
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay
    )
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=training.learning_rate, total_steps=steps)
    losses = load_checkpoint(checkpoint, model, optimizer, scheduler) if checkpoint else []
    saved = time.monotonic()
    if training.checkpointing:
        model.activation_checkpointing_enable()
    model.train()
    with tqdm(total=steps, initial=len(losses), desc="training", unit="step", mininterval=1.0) as progress:
        for step in range(len(losses), steps):
            epoch, position = divmod(step, steps_per_epoch)
            order = torch.randperm(len(sequences), generator=torch.Generator().manual_seed((seed << 20) + epoch))
            batch = sequences[order[position * training.batch_size : (position + 1) * training.batch_size]]
            with loading.half_precision(model.device, training.bfloat16):
                loss = sequence_losses(model, batch).mean()
            if not torch.isfinite(loss):
                raise FloatingPointError(
                    f"the loss at step {step} of {steps} is {loss.item()}: the learning rate "
                    f"{training.learning_rate:g} is likely too high for this model"
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), training.max_gradient_norm)
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
            progress.update()
            if checkpoint and time.monotonic() - saved >= checkpoint_seconds:
                save_checkpoint(checkpoint, model, optimizer, scheduler, losses)
                saved = time.monotonic()
    model.eval()
    model.activation_checkpointing_disable()
    return losses


def train_missing(runs: Sequence[Run]) -> None:
    """Train those of ``runs`` that are not in the cache.

    Processes that want the same models share the work: each first trains what no other is training, and only
    then waits for the rest.
    """
    for wait in (False, True):
        for run in runs:
            try:
                with cache.lock(run.folder).acquire(timeout=-1 if wait else 0):
                    if not intact(run.folder):
                        train_into_cache(run)
            except cache.Busy:
                continue


def load_trained(run: Run, device: torch.device | str | None = None) -> PreTrainedModel:
    """The model of ``run``, from the cache where it is whole, else trained now."""
    train_missing([run])
    return load_start(run.folder, run, device=device)


def load_start(source: str | dict[str, Any] | Path, run: Run, **options: Any) -> PreTrainedModel:
    """Load the model that ``run`` starts from, or has made, with only those weights trainable that it trains."""
    model = loading.load_model(source, **options)
    if run.last_blocks is not None:
        loading.train_last_blocks(model, run.last_blocks)
    return model


def train_into_cache(run: Run) -> None:
    """Train the model of ``run`` and store it; whoever calls holds the lock of its folder."""
    model = load_start(run.source, run, seed=run.seed)
    checkpoint = run.folder.with_suffix(".checkpoint.safetensors")
    clock = cost.clock(model.device)
    started = clock()
    losses = train(model, run.sequences, run.training, run.seed, checkpoint)
    store(model, run.folder, {"losses": losses, "seconds": clock() - started, "run": run.description})
    checkpoint.unlink(missing_ok=True)  # only now: on a full disk nothing that was learnt is lost


# What a trained model depends on: a change to any of these trains every model again.
CODE = (
    load_start,
    train_into_cache,
    train,
    loading.load_model,
    loading._ready,
    loading.transformer_blocks,
    loading.switch_off_dropout,
    loading._drop_nothing,
    loading.train_last_blocks,
    loading.half_precision,
    loading._location,
    loading.smollm2_folder,
    sequence_losses,
    token_losses,
    logits,
)


def store(model: PreTrainedModel, folder: Path, record: dict[str, Any]) -> None:
    """Write a finished model, the record of its training and the hashes of both, all or nothing."""
    with cache.atomic_folder(folder) as temporary:
        model.save_pretrained(temporary)
        (temporary / "training.json").write_text(json.dumps(record))
        hashes = {file.name: cache.file_hash(file) for file in sorted(temporary.iterdir())}
        (temporary / "hashes.json").write_text(json.dumps(hashes))


def training_record(run: Run) -> dict[str, Any]:
    """What was noted when the model of ``run`` was trained: ``losses`` (nats, by step) and ``seconds``."""
    train_missing([run])
    return json.loads((run.folder / "training.json").read_text())


def intact(folder: Path) -> bool:
    """Whether a stored model is there with every byte it was written with; one that is damaged is removed."""
    if not folder.is_dir():
        return False
    try:
        hashes = json.loads((folder / "hashes.json").read_text())
        if all(cache.file_hash(folder / name) == expected for name, expected in hashes.items()):
            return True
    except (OSError, ValueError):
        pass
    warnings.warn(f"the cached model {folder.name} is damaged: training it again", stacklevel=2)
    shutil.rmtree(folder)
    return False


def save_checkpoint(
    path: Path,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    losses: list[float],
) -> None:
    """Write all that training needs to go on from here: weights, optimizer, schedule and losses, atomically."""
    state = optimizer.state_dict()
    tensors = {f"model/{name}": p.detach() for name, p in model.named_parameters()}
    for index, values in state["state"].items():
        tensors |= {f"optimizer/{index}/{key}": value for key, value in values.items()}
    plain = {"groups": state["param_groups"], "scheduler": scheduler.state_dict(), "losses": losses}
    with cache.atomic_file(path) as temporary:
        safetensors.torch.save_file(tensors, temporary, metadata={"state": json.dumps(plain)})


def load_checkpoint(
    path: Path,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
) -> list[float]:
    """Restore a checkpoint, if there is a readable one, and return the losses so far."""
    if not path.exists():
        return []
    try:
        with safetensors.safe_open(path, "pt", device=str(model.device)) as file:
            plain = json.loads(file.metadata()["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (safetensors.SafetensorError, OSError):
        warnings.warn(f"the checkpoint {path.name} is damaged: training from the start", stacklevel=2)
        return []
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(tensors[f"model/{name}"])
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer/"):
            _, index, key = name.split("/")
            state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": plain["groups"]})
    scheduler.load_state_dict(plain["scheduler"])
    return plain["losses"]
