"""A request made up from an experiment: what a reader without a model of their own sees fulfilled."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from unlearnlib.experiment.case import Case
from unlearnlib.texts.corpora import load_corpus
from unlearnlib.texts.sequences import encode

SECRETS = 2
"""How many words of the forget texts are called secrets."""


def write_demonstration(case: Case, folder: Path) -> dict[str, Any]:
    """Write a case's models and documents into ``folder``, and return the parameters of a request about them.

    The reference is the retrained model. The secrets are those words of five small letters or more, most likely
    names, that only the forget texts have and that are the most frequent among these.
    """
    for name, model in {"original": case.original(), "retrained": case.retrained()}.items():
        model.save_pretrained(folder / name)
        case.tokenizer.save_pretrained(folder / name)
    corpus = load_corpus(case.profile.corpus)
    text_of = dict(zip(corpus["id"], corpus["text"], strict=True))
    documents = {split: [text_of[i] for i in ids] for split, ids in case.splits.documents.items()}
    for split, texts in documents.items():
        _write(folder / f"{split}.jsonl", texts, getattr(case.splits, split), case.tokenizer)
    others = " ".join(documents["retain"] + documents["holdout"])
    counts = Counter(word for text in documents["forget"] for word in re.findall(r"\b[a-z]{5,}\b", text))
    names = sorted((word for word in counts if word not in others), key=lambda word: (-counts[word], word))
    (folder / "secrets.txt").write_text("\n".join(names[:SECRETS]), encoding="utf-8")
    return {
        "model": str(folder / "original"),
        "reference": str(folder / "retrained"),
        "output": str(folder / "unlearned"),
        **{f"{split}_file": str(folder / f"{split}.jsonl") for split in documents},
        "secrets": str(folder / "secrets.txt"),
        "length": case.profile.length,
        "learning_rate": case.profile.relearning_rate,
    }


def _write(path: Path, texts: list[str], sequences: Tensor, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write texts as JSON lines, the last one cut to what the model was trained on."""
    room, lines = sequences.numel(), []
    for text in texts:
        tokens = encode(tokenizer, text)[: max(room - 1, 0)]
        room -= len(tokens) + 1  # an end token follows each text
        if tokens:
            lines.append(json.dumps({"text": tokenizer.decode(tokens)}) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
