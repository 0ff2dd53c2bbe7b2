"""The texts of an erasure request: read, cut into sequences of tokens, and checked against each other.

No error, warning or note repeats a text. They name the file and the number of the line, text or secret.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from unlearnlib import models
from unlearnlib.sequences import pack

PASSAGE = 32
"""Tokens in a row that two texts must have in common to share a passage."""


@dataclass(frozen=True)
class Material:
    """What a request asks for, as token sequences [n, tokens], and what was noticed in reading it.

    ``holdout`` is None where there is none. Of each secret, ``secrets`` has three texts: what is before it in the
    forget file up to a white space, what stands between that and the secret, and the secret.
    """

    tokenizer: PreTrainedTokenizerBase
    forget: Tensor
    retain: Tensor
    holdout: Tensor | None
    secrets: list[tuple[str, str, str]]
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """The number of sequences of each kind."""
        splits = {"forget": self.forget, "retain": self.retain, "holdout": self.holdout}
        return {name: len(rows) for name, rows in splits.items() if rows is not None}

    @property
    def validation(self) -> Tensor:
        """The last eighth of the retain sequences, 256 at most: λ is chosen, and damage measured, on these."""
        return self.retain[-max(1, len(self.retain) // 8) :][-256:]

    @property
    def estimation(self) -> Tensor:
        """Up to 512 of the other retain sequences: curvature is estimated on these."""
        return self.retain[: -max(1, len(self.retain) // 8)][:512]


def read_texts(path: str | Path) -> list[str]:
    """The texts of a file, UTF-8: JSON lines with a field "text", or plain, with blank lines between texts.

    It is JSON lines if its name ends in .jsonl, .json or .ndjson; blank lines are passed over. Raises
    FileNotFoundError, or ValueError with the number of the line or text that is wrong.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: give the path of a file of texts")
    raw = path.read_bytes()
    try:
        content = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ValueError(f"line {line} of {path.name} is not UTF-8: convert the file's encoding") from None
    lines = content.replace("\r\n", "\n").split("\n")
    if path.suffix.lower() in (".jsonl", ".json", ".ndjson"):
        texts = [_json_text(line, i, path.name) for i, line in enumerate(lines, 1) if line.strip()]
    else:
        texts = [text.strip() for text in re.split(r"\n\s*\n", "\n".join(lines)) if text.strip()]
        if texts and texts[0].startswith('{"'):
            raise ValueError(f"{path.name} looks like JSON lines: let its name end in .jsonl")
    if not texts:
        raise ValueError(f"{path.name} holds no texts")
    return texts


def _json_text(line: str, number: int, name: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, TypeError, KeyError):
        text = None
    if not isinstance(text, str):
        raise ValueError(f'line {number} of {name} is no JSON object with a string "text": one object a line')
    if not text.strip():
        raise ValueError(f"the text in line {number} of {name} is empty: remove the line")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"the text in line {number} of {name} has half a character (a lone surrogate)") from None
    return text


def read_material(
    tokenizer: PreTrainedTokenizerBase,
    files: dict[str, str | None],
    secrets: str | Sequence[str],
    length: int,
) -> Material:
    """Read the files "forget", "retain" and "holdout" (or None), and cut their texts into sequences.

    ``secrets`` are a list, or a file of one a line. Raises FileNotFoundError, or ValueError naming file and text:
    for a text in two files, or a file with less than a sequence of ``length`` tokens (retain needs two).
    """
    texts = {split: read_texts(path) for split, path in files.items() if path}
    names = {split: Path(files[split]).name for split in texts}
    plain = {split: [" ".join(text.split()) for text in found] for split, found in texts.items()}
    _refuse_shared(names, plain, "text")
    notes, warnings, documents, rows = [], [], {}, {}
    for split, found in texts.items():
        documents[split] = _tokens(tokenizer, found, names[split])
        rows[split] = _sequences(documents[split], tokenizer.eos_token_id, length, whole=split == "forget")
        if len(rows[split]) < (2 if split == "retain" else 1):
            raise ValueError(
                f"{names[split]} has too few tokens for sequences of {length}: give more text, or a smaller length"
            )
        longer = sum(len(document) > length for document in documents[split])
        notes.append(
            f"{names[split]}: {len(found)} texts make {len(rows[split])} sequences of {length} tokens; "
            f"{longer} of the texts are longer than a sequence and are cut"
        )
    _refuse_shared(names, {split: list(map(tuple, found.tolist())) for split, found in rows.items()}, "sequence")
    warnings += _passage_warnings(documents["forget"], documents["retain"])
    unknown = (rows["forget"] == tokenizer.unk_token_id).double().mean().item() if tokenizer.unk_token else 0.0
    if unknown and tokenizer.unk_token != tokenizer.eos_token:
        warnings.append(
            f"the tokenizer does not know {unknown:.1%} of the tokens to be forgotten: is it the right one?"
        )
    places = _find_secrets(secrets, texts, tokenizer, length, warnings)
    return Material(tokenizer, rows["forget"], rows["retain"], rows.get("holdout"), places, notes, warnings)


def _sequences(documents: list[list[int]], end: int, length: int, whole: bool) -> Tensor:
    """The texts packed; ``whole``: what is left over at the end makes one more row with the tokens before it."""
    rows = pack(documents, end, length)
    stream = [token for document in documents for token in (*document, end)]
    if whole and len(stream) > length and len(stream) % length:
        rows = torch.cat([rows, torch.tensor([stream[-length:]])])
    return rows


def _passage_warnings(forget: list[list[int]], retain: list[list[int]]) -> list[str]:
    def passages(document: list[int]) -> set[tuple[int, ...]]:
        return set(zip(*(document[i:] for i in range(PASSAGE)), strict=False))

    wanted = [passages(document) for document in forget]
    all_wanted = set().union(*wanted)
    kept = {passage for document in retain for passage in passages(document) if passage in all_wanted}
    number = sum(not found.isdisjoint(kept) for found in wanted)
    if not number:
        return []
    return [
        f"{number} of {len(forget)} texts to be forgotten have {PASSAGE} tokens in a row or more in common with "
        "texts that are kept, and these passages will stay"
    ]


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model. Raises OSError if it has none, ValueError if no token of it ends a text."""
    missing = f"there is no tokenizer with the model {source}: save the one it was trained with in its folder"
    try:
        tokenizer = models.load_tokenizer(source)
    except (OSError, ValueError) as error:
        raise OSError(missing) from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes of some folders without one
        raise OSError(missing)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {source} has no token that ends a text: set its eos_token and save it")
    return tokenizer


def _tokens(tokenizer: PreTrainedTokenizerBase, texts: list[str], name: str) -> list[list[int]]:
    documents = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    for i, document in enumerate(documents, 1):
        if not document:
            raise ValueError(f"the tokenizer makes nothing of text {i} of {name}: remove it")
    return documents


def _refuse_shared(names: dict[str, str], items: dict[str, list], what: str) -> None:
    for first, second in (("forget", "retain"), ("forget", "holdout"), ("retain", "holdout")):
        places = {item: i for i, item in enumerate(items.get(second, ()), 1)}
        for i, item in enumerate(items[first], 1):
            if item in places:
                raise ValueError(
                    f"{what} {i} of {names[first]} is also {what} {places[item]} of {names[second]}: "
                    "a text can be in one file only"
                )


def _find_secrets(
    given: str | Sequence[str],
    texts: dict[str, list[str]],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    warnings: list[str],
) -> list[tuple[str, str, str]]:
    """Each secret with what stands before it in the forget texts; at the start of a text, the end token."""
    if isinstance(given, str):
        given = [line.strip() for text in read_texts(given) for line in text.split("\n")]
    found = []
    for i, secret in enumerate(given, 1):
        if not secret.strip():
            raise ValueError(f"secret {i} is empty: remove it")
        if any(secret in text for text in texts["retain"]):
            warnings.append(f"secret {i} is also in texts that are kept, and will stay")
        text = next((text for text in texts["forget"] if secret in text), None)
        if text is None:
            warnings.append(f"secret {i} is not in the texts to be forgotten: nothing makes the model forget it")
            text = secret
        before = text[: text.index(secret)]
        stuck = re.search(r"\S*$", before).group()
        words = re.findall(r"\S+\s*", before.removesuffix(stuck))[-(length // 2) :]
        while words and len(tokenizer("".join(words))["input_ids"]) > length // 2:  # half a sequence is enough
            del words[0]
        found.append(("".join(words) or tokenizer.eos_token, stuck, secret))
    return found
