"""Whether model, memory and disk allow an erasure request, as far as can be told before a weight is loaded."""

import contextlib
import os
import shutil
from pathlib import Path

import psutil
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.peft_utils import find_adapter_config_file

from unlearnlib.curvature.capture import find_layers
from unlearnlib.curvature.column_pass import least_numbers
from unlearnlib.curvature.per_sequence_gradients import GRADIENT_BYTES
from unlearnlib.losses import MOST_SEQUENCES, batches
from unlearnlib.models import loading
from unlearnlib.own.methods import BATCH_SIZE
from unlearnlib.own.report import PROBED
from unlearnlib.own.request import DESCENTS, KRONECKER, Request
from unlearnlib.own.targets import FEWEST
from unlearnlib.own.texts import Material, read_material


def check_request(request: Request, device: torch.device) -> tuple[Material, int]:
    """Read and check everything that can be checked before a weight is loaded.

    The rest is for :mod:`unlearnlib.own.rehearsal`. Returns the material, and the estimate of the memory needed in
    bytes. Raises what the functions of this module and of :mod:`unlearnlib.own.texts` raise.
    """
    model, tokenizer = outline(request.model), load_tokenizer(request.model)
    check_model(request, model, tokenizer)
    material = read_material(tokenizer, request.files, request.secrets, request.length)
    needed = needed_bytes(request, model, len(material.estimation))
    check_room(request, model, needed, device)
    if request.strength == "estimate" and len(material.holdout) < FEWEST:
        raise ValueError(
            f"{Path(request.holdout_file).name} makes {len(material.holdout)} sequences, and an estimate of the "
            f"target needs {FEWEST}: give more texts that the model has never seen, or a smaller length"
        )
    return material, needed


def outline(source: str) -> PreTrainedModel:
    """The model of a folder or hub id without its weights, on the ``meta`` device, to be checked beforehand.

    Raises OSError if it cannot be found or read, ValueError for an adapter, for pickled or quantized weights, or
    for an architecture that transformers does not know.
    """
    if Path(source).is_file():
        raise OSError(f"{source} is a file: give the folder of a model that save_pretrained wrote")
    if Path(source).is_dir():
        _check_folder(Path(source))
    try:
        config = loading.load_config(source)
    except OSError as error:
        if Path(source).is_dir():
            raise OSError(f"the configuration of {source} cannot be read: {error}") from error
        raise OSError(
            f"there is no model {source!r}: it is no folder with a model and no hub id in reach"
        ) from error
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{source} needs program code of its own, which is never run here: only architectures that "
            "transformers itself has can be used"
        ) from error
    name, _, revision = source.partition("@")
    on_hub = not Path(source).is_dir() and source != loading.SMOLLM2
    if on_hub and find_adapter_config_file(name, revision=revision or "main"):
        raise _adapted(source)
    if getattr(config, "quantization_config", None):
        raise ValueError(
            f"the weights of {source} are quantized and cannot be edited: give the model they came from"
        )
    try:
        return loading.architecture(config.to_dict())
    except ValueError as error:
        raise ValueError(f"the architecture {config.model_type!r} of {source} cannot be used: {error}") from error


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model. Raises OSError if it has none, ValueError if no token of it ends a text."""
    missing = f"there is no tokenizer with the model {source}: save the one it was trained with in its folder"
    try:
        tokenizer = loading.load_tokenizer(source)
    except (OSError, ValueError) as error:
        raise OSError(missing) from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes of some folders without one
        raise OSError(missing)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {source} has no token that ends a text: set its eos_token and save it")
    return tokenizer


def _check_folder(folder: Path) -> None:
    try:
        names = {path.name for path in folder.iterdir()}
    except OSError as error:
        raise OSError(f"the folder {folder} cannot be read: {error}") from error
    if "adapter_config.json" in names:
        raise _adapted(folder)
    if "config.json" not in names:
        raise OSError(f"{folder} has no config.json: it is no folder that save_pretrained wrote")
    if not names & {"model.safetensors", "model.safetensors.index.json"}:
        raise ValueError(
            f"{folder} has no weights in safetensors: loading pickled ones can run code. Where you trust them, "
            "load the model and save it with save_pretrained, which writes safetensors"
        )


def _adapted(source: str | Path) -> ValueError:
    return ValueError(
        f"{source} has an adapter: merge it into its model (merge_and_unload of peft), save the result with "
        "save_pretrained, and give that folder"
    )


def check_model(request: Request, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check outlines of the model and of the reference against the request. Raises ValueError."""
    number = entries(tokenizer)
    if number > _rows(model):
        raise ValueError(
            f"the tokenizer of {request.model} has {number} entries, the model's table {_rows(model)} "
            "rows: they do not belong together"
        )
    outlines = {"model": model}
    if request.reference is not None:
        other, outlines["reference"] = load_tokenizer(request.reference), outline(request.reference)
        if other.get_vocab() != tokenizer.get_vocab() or number > _rows(outlines["reference"]):
            raise ValueError(
                f"the reference {request.reference} has another vocabulary than the model: they cannot be compared"
            )
    for name, found in outlines.items():
        context = getattr(found.config.get_text_config(), "max_position_embeddings", None)
        if context is not None and request.length > context:
            raise ValueError(
                f"length {request.length} is more than the {name}'s context of {context}: make it smaller"
            )
        if found.get_output_embeddings() is None:
            raise ValueError(f"the {name} has no layer that makes predictions of the next token")


def needed_bytes(request: Request, model: PreTrainedModel, estimation: int) -> int:
    """Estimate from above of the memory in use at the request's peak, in bytes, with all numbers in float32.

    ``model`` may be an outline; ``estimation`` sequences go into the curvature. Two moments can be the peak: a
    pass over sequences, with what a batch leaves for its backward pass, and the search for the strength. A batch
    is what :func:`unlearnlib.losses.batches` takes; the probe and the steps of Adam have sizes of their own.
    """
    matrices, inner = _matrices(model)
    vocabulary, width = model.get_output_embeddings().weight.shape
    d, tokens = loading.parameter_count(model), request.length - 1
    # What one token leaves: the inputs and outputs of the layers, and logits, probabilities and their gradients.
    token = 1.25 * sum(map(sum, inner)) + 6 * vocabulary
    most = torch.empty(MOST_SEQUENCES, request.length, device="meta")
    at_a_time = len(batches(model, most)[0])
    batch, probe = at_a_time * tokens * token, PROBED // 2 * tokens * token
    factors = _factor_numbers(model)
    # Kept during the pass, of the probe with its five copies of the weights at least; kept in the search.
    passing, search = 5 * d + max(probe, batch), 5 * d
    if request.method in KRONECKER:
        passing, search = 6 * d + max(probe, batch + factors), 9 * d + 2 * factors
    elif request.method == "fisher_diagonal":  # and a matrix's gradients of single sequences, twice if it is tied
        largest = 2 * max(a * b for a, b in matrices)
        passing, search = passing + d + min(at_a_time * largest, max(GRADIENT_BYTES // 4, largest)), 7 * d
    elif request.method == "fisher_dual":  # all sequences at once, but of the blocks only one
        blocks = model.config.get_text_config().num_hidden_layers
        held = estimation * tokens * (blocks * width + 2 * sum(map(sum, inner)) / blocks)
        least = 0
        with contextlib.suppress(NotImplementedError):  # such a layer is for the rehearsal to refuse
            least = least_numbers(model, find_layers(model), estimation, tokens)
        passing, search = max(passing, 7 * d + max(2**24, 2 * least) + held), 9 * d
    elif request.method in DESCENTS:  # the graphs of two batches at once; and Adam's two averages
        step = 2 * BATCH_SIZE * tokens * token
        kept = 2 * d if request.method == "newton" else 0  # the model before, and Δ
        passing = max(passing, 7 * d + kept + step)
        search = 9 * d + kept  # and the weights to which each trial returns
    return int(4 * max(passing, search + at_a_time * tokens * 4 * vocabulary))


def _matrices(model: PreTrainedModel) -> tuple[list[torch.Size], list[torch.Size]]:
    """The shapes of all matrices of weights, and of those that have no row or column for each word."""
    shapes = [
        m.weight.shape for m in model.modules() if getattr(m, "weight", None) is not None and m.weight.ndim == 2
    ]
    vocabulary = len(model.get_output_embeddings().weight)
    return shapes, [shape for shape in shapes if vocabulary not in shape]


def _factor_numbers(model: PreTrainedModel) -> int:
    """How many numbers the Kronecker factors of all matrices have."""
    return sum(a * a + b * b for a, b in _matrices(model)[1]) + model.get_output_embeddings().weight.shape[1] ** 2


def available_bytes(device: torch.device) -> int:
    """Memory that is free on the device, in bytes; processes of one launcher that share it have a part each."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def check_room(request: Request, model: PreTrainedModel, needed: int, device: torch.device) -> None:
    """Raise MemoryError or OSError if memory, or the disk for what is written, is too small, with both numbers."""
    free = available_bytes(device)
    if needed > free:
        raise MemoryError(
            f"{request.method} on this model needs about {needed / 2**30:.1f} GiB of memory, and "
            f"{free / 2**30:.1f} GiB are free: take a machine with more, a length below {request.length}, or "
            "gradient_ascent, which needs least"
        )
    d = loading.parameter_count(model)
    written = {"output": (request.output, 4 * d)}
    if request.factors is not None:  # with eigenvalues, a matrix of its shape for each
        written["folder of factors"] = (request.factors, 4 * (d + _factor_numbers(model)))
    for name, (path, size) in written.items():
        places = (Path(path).resolve(), *Path(path).resolve().parents)
        place = next(folder for folder in places if folder.is_dir())
        disk = shutil.disk_usage(place).free
        more = size - sum(file.stat().st_size for file in Path(path).glob("*"))
        if more > disk:
            raise OSError(
                f"the {name} needs {more / 2**30:.1f} GiB of disk and {place} has {disk / 2**30:.1f} GiB free"
            )


def entries(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many rows a table needs for the tokenizer's numbers, of which some may be left out."""
    return max(tokenizer.get_vocab().values()) + 1


def _rows(model: PreTrainedModel) -> int:
    return model.get_input_embeddings().weight.shape[0]
