"""An erasure request: what may be asked, and whether model, memory and disk allow it; no weight is loaded yet."""

import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unlearnlib import cache, models
from unlearnlib.capture import find_layers
from unlearnlib.own_texts import Material, load_tokenizer, read_material
from unlearnlib.streaming import least_numbers

STRENGTHS = {
    "gradient_ascent": "step length along the gradient of the forget loss",
    "gradient_difference": "steps of Adam",
    "fisher_diagonal": "step length along (F + λI)⁻¹Δ, F the diagonal of the empirical Fisher",
    "fisher_dual": "step length along (F + λI)⁻¹Δ, F the whole empirical Fisher",
    "kfac": "step length along (C + λI)⁻¹Δ, C by K-FAC",
    "ekfac": "step length along (C + λI)⁻¹Δ, C by EK-FAC",
    "fisher_forgetting": "step length along (C + λI)⁻¹Δ, C by K-FAC, from weights with noise",
}
"""The methods, and the unit in which each one's strength is a number."""

WITHOUT_LAYERS = ("gradient_ascent", "gradient_difference", "fisher_diagonal")


@dataclass(frozen=True)
class Request:
    """What shall be forgotten, by which model, and how.

    ``model`` and ``reference`` are folders or hub ids, the files as :func:`read_texts` reads them, ``secrets`` a
    list or a file of one a line, and ``output`` a folder that does not exist yet. ``strength`` is a number in the
    unit of ``STRENGTHS``, or ``"match"``: then the forget loss is brought to ``target_loss`` nats, or where that
    is None to the loss of ``reference``. Texts are cut into sequences of ``length`` tokens. ``damping`` is λ; None
    has it chosen on the validation part of the retained texts. ``noise`` is the length of Fisher Forgetting's
    noise as a share of the length of the weights, ``learning_rate`` is for gradient difference and the probe.

    Raises ValueError for settings that cannot be, FileExistsError if the output exists.
    """

    model: str
    forget_file: str
    retain_file: str
    output: str
    holdout_file: str | None = None
    secrets: str | Sequence[str] = ()
    method: str = "kfac"
    strength: float | str = "match"
    reference: str | None = None
    target_loss: float | None = None
    length: int = 64
    damping: float | None = None
    noise: float = 1e-2
    learning_rate: float = 2e-5
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("model", "forget_file", "retain_file", "output"):
            if not getattr(self, name):
                raise ValueError(f"{name} is missing: every request needs a model, two files and an output folder")
        if self.method not in STRENGTHS:
            raise ValueError(f"unknown method {self.method!r}: choose one of {', '.join(STRENGTHS)}")
        if self.strength == "match":
            if self.reference is None and self.target_loss is None:
                raise ValueError("strength 'match' needs a reference model or a target_loss in nats, or a number")
        elif self.target_loss is not None:
            raise ValueError("target_loss is for strength 'match': leave one of the two out")
        elif not _positive(self.strength):
            raise ValueError(f"the strength must be 'match' or a positive number, not {self.strength!r}")
        elif self.method == "gradient_difference" and self.strength != int(self.strength):
            raise ValueError(f"the strength of gradient_difference is a number of steps, not {self.strength!r}")
        for name in ("target_loss", "damping", "noise", "learning_rate"):
            if not (getattr(self, name) is None or _positive(getattr(self, name))):
                raise ValueError(f"{name} must be a positive number, not {getattr(self, name)!r}")
        if self.length < 2:
            raise ValueError(f"sequences of length {self.length} predict nothing: take 2 tokens or more")
        self.check_output()

    @property
    def files(self) -> dict[str, str | None]:
        """The files of texts, by what is in them."""
        return {"forget": self.forget_file, "retain": self.retain_file, "holdout": self.holdout_file}

    def public(self) -> dict[str, Any]:
        """The settings as JSON values: of files the name and hash, of folders the name, of secrets nothing."""
        settings = {name: value for name, value in asdict(self).items() if not name.endswith("_file")}
        del settings["secrets"], settings["output"]
        for name in ("model", "reference"):
            if settings[name] and Path(settings[name]).is_dir():
                settings[name] = Path(settings[name]).resolve().name
        files = {split: Path(path) for split, path in self.files.items() if path}
        return settings | {
            "files": {split: {"name": path.name, "sha256": cache.file_hash(path)} for split, path in files.items()}
        }

    def check_output(self) -> None:
        """Raise FileExistsError if the output exists, ValueError if it lies within a model's folder."""
        output = Path(self.output).resolve()
        if output.exists():
            raise FileExistsError(f"the output {self.output} exists and is never overwritten: name a new folder")
        for source in filter(None, (self.model, self.reference)):
            if Path(source).is_dir() and Path(source).resolve() in output.parents:
                raise ValueError(f"the output {self.output} lies within {source}, which must not change: move it")


def prepare(request: Request, device: torch.device) -> tuple[Material, int]:
    """Read and check everything that can be checked before a weight is loaded.

    Returns the material, and the estimate of the memory needed in bytes. Raises what the functions of this module
    and of :mod:`unlearnlib.own_texts` raise.
    """
    model, tokenizer = outline(request.model), load_tokenizer(request.model)
    check_model(request, model, tokenizer)
    material = read_material(tokenizer, request.files, request.secrets, request.length)
    needed = needed_bytes(request, model, len(material.estimation))
    check_room(request, model, needed, device)
    return material, needed


def outline(source: str) -> PreTrainedModel:
    """The model of a folder or hub id without its weights, on the ``meta`` device, to be checked beforehand.

    Raises OSError if it cannot be found, ValueError for pickled or quantized weights or an architecture that
    transformers does not know.
    """
    if Path(source).is_dir() and not any(Path(source).glob("*.safetensors")):
        raise ValueError(
            f"{source} has no weights in safetensors: loading pickled ones can run code. Where you trust them, "
            "load the model and save it with save_pretrained, which writes safetensors"
        )
    try:
        config = models.load_config(source)
    except OSError as error:
        raise OSError(
            f"there is no model {source!r}: it is no folder with a model and no hub id in reach"
        ) from error
    if getattr(config, "quantization_config", None):
        raise ValueError(
            f"the weights of {source} are quantized and cannot be edited: give the model they came from"
        )
    try:
        with torch.device("meta"):
            return models.load_model(config.to_dict(), device="meta")
    except ValueError as error:
        raise ValueError(f"the architecture {config.model_type!r} of {source} cannot be used: {error}") from error


def check_model(request: Request, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check an outline against the request. Raises ValueError, or NotImplementedError for an unknown layer."""
    if len(tokenizer) > _rows(model):
        raise ValueError(
            f"the tokenizer of {request.model} has {len(tokenizer)} entries, the model's table {_rows(model)} "
            "rows: they do not belong together"
        )
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and request.length > context:
        raise ValueError(f"length {request.length} is more than the model's context of {context}: make it smaller")
    if request.reference is not None:
        other = load_tokenizer(request.reference)
        if other.get_vocab() != tokenizer.get_vocab() or len(tokenizer) > _rows(outline(request.reference)):
            raise ValueError(
                f"the reference {request.reference} has another vocabulary than the model: they cannot be compared"
            )
    if request.method not in WITHOUT_LAYERS:
        try:
            find_layers(model)
        except NotImplementedError as error:
            found = str(error).partition(": ")[0]
            raise NotImplementedError(
                f"{request.method} works layer by layer, and {found}: choose {' or '.join(WITHOUT_LAYERS)}"
            ) from error


def needed_bytes(request: Request, model: PreTrainedModel, estimation: int) -> int:
    """Estimate from above of the memory in use at the request's peak, in bytes, with all numbers in float32.

    ``model`` may be an outline; ``estimation`` sequences go into the curvature. Two moments can be the peak: a
    pass over sequences, with what a batch of 32 leaves for its backward pass, and the search for the strength.
    """
    matrices = [
        m.weight.shape for m in model.modules() if getattr(m, "weight", None) is not None and m.weight.ndim == 2
    ]
    vocabulary, width = model.get_output_embeddings().weight.shape
    inner = [shape for shape in matrices if vocabulary not in shape]
    d, tokens = models.parameter_count(model), request.length - 1
    # What one token leaves: the inputs and outputs of the layers, and logits, probabilities and their gradients.
    token = 1.25 * sum(map(sum, inner)) + 6 * vocabulary
    batch, factors = 32 * tokens * token, sum(a * a + b * b for a, b in inner) + width**2
    # Kept during the pass, the relearning probe with its five copies of the weights at least; kept in the search.
    passing, search = 5 * d + batch, 5 * d
    if request.method in ("kfac", "ekfac", "fisher_forgetting"):
        passing, search = passing + factors, 8 * d + 2 * factors
    elif request.method == "fisher_diagonal":
        search = 6 * d
    elif request.method == "fisher_dual":  # all sequences at once, but of the blocks only one
        blocks = model.config.num_hidden_layers
        held = estimation * tokens * (blocks * width + 2 * sum(map(sum, inner)) / blocks)
        least = least_numbers(model, find_layers(model), estimation, tokens)
        passing, search = max(passing, 6 * d + max(2**24, 2 * least) + held), 8 * d
    elif request.method == "gradient_difference":  # the graphs of two batches at once; and Adam's two averages
        passing, search = 6 * d + 2 * batch, 8 * d
    return int(4 * max(passing, search + 64 * tokens * 4 * vocabulary))


def available_bytes(device: torch.device) -> int:
    """Memory that is free on the device, in bytes."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def check_room(request: Request, model: PreTrainedModel, needed: int, device: torch.device) -> None:
    """Raise MemoryError or OSError if memory, or the disk at the output, is too small, with both numbers."""
    free = available_bytes(device)
    if needed > free:
        raise MemoryError(
            f"{request.method} on this model needs about {needed / 2**30:.1f} GiB of memory, and "
            f"{free / 2**30:.1f} GiB are free: take a machine with more, a length below {request.length}, or "
            "gradient_ascent, which needs least"
        )
    place = next(folder for folder in Path(request.output).resolve().parents if folder.is_dir())
    disk, size = shutil.disk_usage(place).free, 4 * models.parameter_count(model)
    if size > disk:
        raise OSError(
            f"the output needs {size / 2**30:.1f} GiB of disk and {place} has {disk / 2**30:.1f} GiB free"
        )


def _rows(model: PreTrainedModel) -> int:
    return model.get_input_embeddings().weight.shape[0]


def _positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0 and math.isfinite(value)
