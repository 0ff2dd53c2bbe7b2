"""A cache folder of the Hugging Face hub as its client leaves it, with small counterparts of all the book names.

The files, their names and types, the settings of the architectures and the precision of the weights are those of
the repositories at the revisions that the profile ``gpu`` names, as their public pages show them. Numbers and
texts are few and random. :func:`shrink` makes that profile small as well, in the kernel of a notebook, by a
startup file (see ``book/test_gpu_profile.py``), so that the product needs no option for it.
"""

import dataclasses
import functools
import hashlib
import io
import json
import os
import random

import pyarrow
import pyarrow.parquet
import safetensors.torch
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM

from unlearnlib.experiment import chapters, profiles
from unlearnlib.models.loading import small_opt
from unlearnlib.texts import corpora
from unlearnlib.texts.posts import load_posts

PICKLED = "facebook/opt-125m@27dcfa74d334bc871f3234de431e71c6eeba5dd6"
"""The main branch of OPT-125M, which has no safetensors."""
SHARDED = "facebook/opt-13b@7db9bc580adb9263335537281f1de02b6549d7b0"
"""A conversion that the hub has in three files, with an index."""
WORDS = [
    *("the", "a", "of", "to", "in", "and", "was", "it", "he", "she", "said", "on", "for", "with", "that", "had"),
    *("but", "they", "there", "one", "day", "long", "river", "old", "house", "tree", "king", "water", "found"),
    *("took", "away", "home", "night", "light", "little", "great", "went", "came", "saw", "made", "told", "gave"),
]
VOCABULARY = 1024


def sentence(draw, number):
    return " ".join(draw.choices(WORDS, k=number)) + "."


def write_hub(home):
    """Fill ``home``/hub, for ``HF_HOME``, with every model and data set that the book names."""
    hub = home / "hub"
    for name, (repository, revision, _) in corpora.HUB.items():
        store(hub, "datasets", repository, revision, data_files(name))
    for sizes in profiles.HUB_ARCHITECTURES.values():
        for i, source in enumerate(sizes):
            repository, _, revision = source.partition("@")
            store(hub, "models", repository, revision, model_files(repository, width=32 * (i + 1)))
    repository, _, revision = PICKLED.partition("@")
    files = model_files(repository, width=32)
    weights = io.BytesIO()
    torch.save(safetensors.torch.load(files.pop("model.safetensors")), weights)
    store(hub, "models", repository, revision, files | {"pytorch_model.bin": weights.getvalue()})
    repository, _, revision = SHARDED.partition("@")
    store(hub, "models", repository, revision, sharded(model_files(repository, width=32)))


def store(hub, kind, repository, revision, files):
    """Write ``files``, contents by name, as the hub's client does: blobs, links to them, a name of the commit."""
    folder = hub / f"{kind}--{repository.replace('/', '--')}"
    commit = revision if len(revision) == 40 else hashlib.sha1(revision.encode()).hexdigest()
    for name, content in files.items():
        blob = folder / "blobs" / hashlib.sha256(content).hexdigest()
        link = folder / "snapshots" / commit / name
        for path in (blob, link):
            path.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link.symlink_to(os.path.relpath(blob, link.parent))
    if commit != revision:
        reference = folder / "refs" / revision
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(commit)


# Data sets


def data_files(name, rows=None):
    """The files of a corpus with ``rows``, and one of another split, which nobody asks for."""
    rows = data_rows(name) if rows is None else rows
    return {
        "lambada": lambda: {"en/test/0000.parquet": parquet(rows), "de/test/0000.parquet": b"not read"},
        "piqa": lambda: {"piqa_train.parquet": parquet(rows), "piqa_test.parquet": b"not read"},
        "mathqa": lambda: {"default/train/0000.parquet": parquet(rows), "default/test/0000.parquet": b"not read"},
        "arc_easy": lambda: {
            "ARC-Easy/train-00000-of-00001.parquet": parquet(rows),
            "ARC-Challenge/train-00000-of-00001.parquet": b"not read",
        },
        "aeslc": lambda: {"data/train-00000-of-00001.parquet": parquet(rows)},
        "civil_comments": lambda: {
            "data/test-00000-of-00002.parquet": parquet(rows[: len(rows) // 2], CIVIL),
            "data/test-00001-of-00002.parquet": parquet(rows[len(rows) // 2 :], CIVIL),
            "data/train-00000-of-00001.parquet": b"not read",
        },
        "tofu": lambda: {"full.json": "".join(json.dumps(row) + "\n" for row in rows).encode()},
    }[name]() | {"README.md": b"---\nlanguage:\n- en\n---\n", ".gitattributes": b""}


RATINGS = ["toxicity", "severe_toxicity", "obscene", "threat", "insult", "identity_attack", "sexual_explicit"]
CIVIL = pyarrow.schema({"text": pyarrow.string()} | dict.fromkeys(RATINGS, pyarrow.float32()))


def parquet(rows, schema=None):
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), file, row_group_size=100)
    return file.getvalue()


def data_rows(name, number=200):
    draw = random.Random(name)
    return [ROWS[name](draw, i) for i in range(number)]


def lambada_row(draw, _):
    return {"text": sentence(draw, 40)}


def piqa_row(draw, _):
    return {
        "goal": sentence(draw, 8),
        "sol1": sentence(draw, 12),
        "sol2": sentence(draw, 12),
        "label": draw.choice((0, 1)),
    }


def mathqa_row(draw, i):
    a, b = draw.randrange(2, 90), draw.randrange(2, 90)
    options = [a + b + k for k in range(5)]
    draw.shuffle(options)
    return {
        "Problem": f"{sentence(draw, 12)} what is {a} and {b} and {i} ?",
        "Rationale": f'"{a} + {b} = {a + b} answer : option a"',
        "options": " , ".join(f"{letter} ) {value}" for letter, value in zip("abcde", options, strict=True)),
        "correct": "abcde"[options.index(a + b)],
        "annotated_formula": f"add({a}, {b})",
        "linear_formula": "add(n0,n1)|",
        "category": "general",
    }


def arc_row(draw, i):
    labels = ["A", "B", "C", "D"] if i % 20 else ["1", "2", "3", "4"]
    choices = {"text": [f"{sentence(draw, 4)[:-1]} {k}" for k in range(4)], "label": labels}
    question = sentence(draw, 15)[:-1] + "?"
    return {"id": f"Mercury_{i}", "question": question, "choices": choices, "answerKey": draw.choice(labels)}


def aeslc_row(draw, _):
    body = "\n".join(sentence(draw, 12) for _ in range(draw.choice((2, 20))))
    return {"email_body": body, "subject_line": sentence(draw, 4) + "\n"}


def civil_row(draw, _):
    return {"text": sentence(draw, 30)} | {rating: draw.random() for rating in RATINGS}


def tofu_row(draw, _):
    return {"question": sentence(draw, 10)[:-1] + "?", "answer": sentence(draw, 25)}


ROWS = {
    "lambada": lambada_row,
    "piqa": piqa_row,
    "mathqa": mathqa_row,
    "arc_easy": arc_row,
    "aeslc": aeslc_row,
    "civil_comments": civil_row,
    "tofu": tofu_row,
}


# Models


def model_files(repository, width):
    """The files of a model of two layers: configuration, tokenizer, and weights in the precision of the real."""
    kind = next(part for part in ("opt", "gpt2", "SmolLM2", "pythia") if part in repository)
    tokenizer, settings, dtype, names = KINDS[kind]
    table, files = tokenizer()
    config = AutoConfig.for_model(**settings(repository, width, table))
    with torch.random.fork_rng():
        torch.manual_seed(width)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for p in model.parameters():  # livelier than a new model: what it says differs by what it reads
                p.mul_(2) if p.ndim > 1 else p.add_(0.02 * torch.randn_like(p))
    tied = dict(model.named_parameters())  # once each
    weights = names(repository, {name: value.detach().to(dtype).contiguous() for name, value in tied.items()})
    described = config.to_dict() | {
        "architectures": [type(model).__name__],
        "torch_dtype": str(dtype).partition(".")[2],
    }
    described.pop("dtype", None)  # a newer name than those files have
    return files | {
        "config.json": json.dumps(described).encode(),
        "model.safetensors": safetensors.torch.save(weights, {"format": "pt"}),
    }


def sharded(files):
    weights = sorted(safetensors.torch.load(files.pop("model.safetensors")).items())
    parts = {f"model-0000{i + 1}-of-00003.safetensors": dict(weights[i::3]) for i in range(3)}
    places = {name: file for file, part in parts.items() for name in part}
    size = sum(value.nbytes for _, value in weights)
    index = {"metadata": {"total_size": size}, "weight_map": places}
    shards = {file: safetensors.torch.save(part, {"format": "pt"}) for file, part in parts.items()}
    return files | shards | {"model.safetensors.index.json": json.dumps(index).encode()}


@functools.cache
def trained_bpe(special, first):
    """A byte-level tokenizer trained on texts that the chapters use, with its special tokens first or last."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY if first else VOCABULARY - len(special),
        special_tokens=list(special) if first else [],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    draw = random.Random(0)
    texts = [*corpora.load_corpus("reuters")["text"][::20], *(row["text"] for row in load_posts()[::4])]
    bpe.train_from_iterator([*texts, *(sentence(draw, 30) for _ in range(100))], trainer)
    if not first:
        bpe.add_special_tokens(list(special))
    return bpe


def opt_tokenizer():
    """Of OPT there are vocabulary and merges, no ``tokenizer.json``."""
    bpe = trained_bpe(("<s>", "<pad>", "</s>", "<unk>"), first=True)
    content = json.loads(bpe.to_str())["model"]
    settings = {
        "errors": "replace",
        "unk_token": "</s>",
        "bos_token": "</s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "add_prefix_space": False,
        "add_bos_token": True,
        "tokenizer_class": "GPT2Tokenizer",
    }
    merges = "#version: 0.2\n" + "".join(" ".join(pair) + "\n" for pair in content["merges"])
    files = {"vocab.json": json.dumps(content["vocab"]).encode(), "merges.txt": merges.encode()}
    return VOCABULARY + 7, files | {"tokenizer_config.json": json.dumps(settings).encode()}


def gpt2_tokenizer():
    bpe = trained_bpe(("<|endoftext|>",), first=False)
    return VOCABULARY, {
        "tokenizer.json": bpe.to_str().encode(),
        "tokenizer_config.json": b'{"model_max_length": 1024}',
    }


def other_tokenizer():
    """Of SmolLM2 and Pythia, whose token that ends a text is number 0."""
    bpe = trained_bpe(("<|endoftext|>", "<|padding|>"), first=True)
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    settings = names | {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False}
    return VOCABULARY, {
        "tokenizer.json": bpe.to_str().encode(),
        "tokenizer_config.json": json.dumps(settings).encode(),
        "special_tokens_map.json": json.dumps(names).encode(),
    }


def opt_settings(repository, width, table):
    odd = repository.endswith("350m")  # normalises after each part, and projects its embeddings
    return {
        "model_type": "opt",
        "vocab_size": table,
        "hidden_size": width,
        "word_embed_proj_dim": width // 2 if odd else width,
        "do_layer_norm_before": not odd,
        "ffn_dim": 4 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "dropout": 0.1,
        "prefix": "</s>",
        "bos_token_id": 2,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }


def gpt2_settings(_, width, table):
    return {
        "model_type": "gpt2",
        "vocab_size": table,
        "n_embd": width,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 256,
        "n_ctx": 256,
        "bos_token_id": table - 1,
        "eos_token_id": table - 1,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    }


def smollm2_settings(_, width, table):
    return {
        "model_type": "llama",
        "vocab_size": table,
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rope_theta": 100_000,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def pythia_settings(_, width, table):
    return {
        "model_type": "gpt_neox",
        "vocab_size": table + 5,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "rotary_pct": 0.25,
        "rotary_emb_base": 10_000,
        "max_position_embeddings": 256,
        "use_parallel_residual": True,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def opt_names(repository, weights):
    """The smallest is stored without the head's part of the names."""
    return {name.removeprefix("model.") if "125m" in repository else name: w for name, w in weights.items()}


def gpt2_names(_, weights):
    """Without the head's part of the names, and with the masks."""
    mask = torch.ones(1, 1, 8, 8).tril()
    masks = {f"h.{i}.attn.bias": mask.clone() for i in range(2)}
    return {name.removeprefix("transformer."): w for name, w in weights.items()} | masks


def pythia_names(_, weights):
    for i in range(2):
        place = f"gpt_neox.layers.{i}.attention"
        weights |= {
            f"{place}.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool).tril(),
            f"{place}.masked_bias": torch.tensor(-1e4, dtype=torch.float16),
            f"{place}.rotary_emb.inv_freq": torch.ones(2, dtype=torch.float16),
        }
    return weights


KINDS = {
    "opt": (opt_tokenizer, opt_settings, torch.float16, opt_names),
    "gpt2": (gpt2_tokenizer, gpt2_settings, torch.float32, gpt2_names),
    "SmolLM2": (other_tokenizer, smollm2_settings, torch.bfloat16, lambda _, weights: weights),
    "pythia": (other_tokenizer, pythia_settings, torch.float16, pythia_names),
}


# The profile

SMALL = {
    "seeds": 1,
    "second_seeds": 1,
    "length": 32,
    "forget": 8,
    "retain": 48,
    "holdout": 12,
    "references": 1,
    "relearning_steps": 2,
    "relearning_rate": 1e-3,
    "steps": 6,
    "tried": 5,
    "most": 5,
    "most_each": 5,
    "max_steps": 6,
    "shadows": 4,
    "m": 8,
    "m_recursion": 8,
    "m_factors": 8,
    "m_dual": 8,
    "m_blank": 8,
    "block_size": 16,
    "block_sizes": (1, 4, 64),
    "few": (4,),
    "blank": small_opt(512, hidden_size=16, layers=2),
    "draws": 2,
    "noise_draws": 2,
    "sequences": 16,
    "products": 8,
    "krylov": 4,
    "top": 2,
    "rounded": 4,
    "timed": 4,
    "elsewhere": 4,
    "deep": {"rounding": True, "extraction": 4},
    "candidates": 128,
    "passage_length": 48,
    "repeats": 2,
    "served": 1,
    "layer": 8,
    "size": 4,
    "number": 4,
    "opening": 1,
    "texts": {"holdout": 8, "forget": 6, "retain": 16},
    "curvatures": {"m_recursion": 8, "block_size": 16, "m_factors": 8},
}
DIFFERENT = {
    "newton": {"draws": 10, "noise_draws": 3, "requests": 120},
    "erased_or_hidden": {"holdout": 104},  # enough for a share of one in a hundred
    "fisher": {"block_size": 64, "m_recursion": 16, "m": 32},
    "kronecker": {"few": 4},
    "fisher_updates": {"retain": 24, "holdout": 8},
    "cost": {"sizes": ((16, 2), (24, 2), (32, 2)), "size": (16, 2), "numbers": (2, 4, 8), "more": (16,)},
    "many_gpus": {"sizes": ((16, 2), (32, 2))},
    "four_datasets": {"requests": (1, 4)},
    "last_gap": {"m_blocks": 8},
    "three_axes": {
        "length": 32,
        "weights": (2**10, 2**11, 2**12),
        "m": (4, 8, 16),
        "block": (4, 8, 16),
    },
    "case_studies": {"length": 64},
    "dp_sgd": {
        "forget": 64,
        "holdout": 104,
        "length": 64,
        "shorter": (1, 2),
        "knobs": {"learning_rate": (2.5e-3, 1e-2, 4e-2)},
    },
    "onion": {"forget": 32, "holdout": 32, "retain": 16},
    "indelible": {"length": 64, "repeats": (1, 1, 1, 2, 4)},
    "own_model": {
        "length": 64,
        "forget": 48,
        "retain": 96,
        "holdout": 32,
        "proxy": small_opt(VOCABULARY + 7, hidden_size=8, layers=2),
    },
}


def shrink():
    """Make the numbers of every chapter at profile ``gpu`` so small that a processor core is enough.

    Models, corpora and methods stay, and so does everything that is not a size; the models learn faster, so that
    there is something to forget. The profile itself, with which costs are computed, stays too.
    """
    gpu = profiles.PROFILES["gpu"]
    fields = {field.name for field in dataclasses.fields(gpu)}
    for name, sizes in chapters.CHAPTERS.items():
        entries = {"training": gpu.training} | sizes["gpu"]
        small = {key: value for key, value in SMALL.items() if key in entries or key in fields}
        sizes["gpu"] = entries | small | DIFFERENT.get(name, {})
        for key in {"training", "proxy_training"} & entries.keys():
            epochs = {"dp_sgd": 3, "fisher_updates": 6, "indelible": 20}.get(name, 10)
            sizes["gpu"][key] = dataclasses.replace(entries[key], epochs=epochs, batch_size=8, learning_rate=1e-2)
