"""The texts of an erasure request: cut into sequences of tokens, and checked against each other.

No error, warning or note repeats a text. They name the file and the number of the text, sequence or secret.
"""

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from unlearnlib.texts.files import TextFile, read_file, read_texts
from unlearnlib.texts.sequences import pack

PASSAGE = 32
"""Tokens in a row that two texts must have in common to share a passage."""
EIGHTH = 8
"""One retain text, and one retain sequence, in so many is for validation."""
FEW = 8
"""With fewer sequences for validation there is a warning."""
ROLES = {"forget": "to be forgotten", "retain": "to be kept", "holdout": "never seen"}
"""What a file is given for, by its key; other keys are of earlier requests."""


@dataclass(frozen=True)
class Material:
    """What a request asks for, as token sequences [n, tokens], and what was noticed in reading it.

    ``holdout`` is None where there is none. ``forget`` has the sequences of the request and after them those of
    earlier requests that are named with it; ``sets`` are their numbers, by file. Of each secret, ``secrets`` has
    three texts: what is before it in the forget file up to a white space, what stands between that and the secret,
    and the secret. ``hashes`` are the SHA-256 of the files' bytes as they were read, by what is in them.
    ``forget_tokens`` counts the tokens to forget once where two sequences share them; None if none are shared.
    """

    tokenizer: PreTrainedTokenizerBase
    forget: Tensor
    retain: Tensor
    holdout: Tensor | None
    secrets: list[tuple[str, str, str]]
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    hashes: dict[str, str] = field(default_factory=dict)
    sets: dict[str, int] = field(default_factory=dict)
    forget_tokens: int | None = None

    @property
    def share(self) -> float:
        """α = n₋/n₊, by tokens: those of the texts to forget, each once, over those of the texts to keep."""
        return (self.forget_tokens or self.forget.numel()) / self.retain.numel()

    def counts(self) -> dict[str, int]:
        """The number of sequences of each kind."""
        splits = {"forget": self.forget, "retain": self.retain, "holdout": self.holdout}
        return {name: len(rows) for name, rows in splits.items() if rows is not None}

    @property
    def validation(self) -> Tensor:
        """The last eighth of the retain sequences, 256 at most: λ is chosen, and damage measured, on these."""
        return _spread(self.retain[-max(1, len(self.retain) // EIGHTH) :], 256)

    @property
    def estimation(self) -> Tensor:
        """Up to 512 of the other retain sequences: curvature is estimated on these."""
        return _spread(self.retain[: -max(1, len(self.retain) // EIGHTH)], 512)


def _spread(rows: Tensor, most: int) -> Tensor:
    """Evenly spaced ones of the rows, ``most`` of them, or all where there are fewer."""
    number = min(most, len(rows))
    return rows[torch.arange(number) * len(rows) // max(1, number)]


def read_material(
    tokenizer: PreTrainedTokenizerBase,
    files: dict[str, str | None],
    secrets: str | Sequence[str],
    length: int,
) -> Material:
    """Read the files "forget", "retain" and "holdout" (or None), and cut their texts into sequences.

    Files whose key begins with "forget" are of earlier requests: what they hold is forgotten as well.

    Every eighth retain text is moved to the end, so that the validation sequences, the last ones, are of all kinds
    of texts even where the file is sorted. ``secrets`` are a list, or a file of one a line.

    Raises FileNotFoundError, or ValueError naming file and text: for a text in two files, or a file with less than
    a sequence of ``length`` tokens (retain needs two). Files of one name are told apart by
    what they are given for.
    """
    read = {split: read_file(path) for split, path in files.items() if path}
    parts = {split: _Part(file, [" ".join(text.split()) for text in file.texts]) for split, file in read.items()}
    names = [file.name for file in read.values()]

    def role(split: str) -> str:
        """What a file is given for, where another of the same name makes that necessary to say."""
        return f" ({ROLES.get(split, 'of an earlier request')})" if names.count(read[split].name) > 1 else ""

    _refuse_shared(
        {split: part.plain for split, part in parts.items()},
        lambda split, i: parts[split].text_name(i) + role(split),
    )
    notes = _special_notes(tokenizer)
    for split, part in parts.items():
        part.cut(tokenizer, length, spread=split == "retain", whole=split.startswith("forget"))
        if len(part.rows) < (2 if split == "retain" else 1):
            raise ValueError(
                f"{part.file.name} has too few tokens for sequences of {length}: give more text, or a smaller "
                "length"
            )
        longer = sum(len(document) > length for document in part.documents)
        notes.append(
            f"{part.file.name}: {len(part.documents)} texts make {len(part.rows)} sequences of {length} tokens; "
            f"{longer} of the texts are longer than a sequence and are cut"
        )
    asked = [split for split in parts if split.startswith("forget")]
    rows = {split: part.rows for split, part in parts.items()}
    found = {split: list(map(tuple, part.rows.tolist())) for split, part in parts.items()}
    _refuse_shared(found, lambda split, i: parts[split].row_name(i) + role(split))
    warnings = [warning for file in read.values() for warning in file.warnings]
    sets = {split: len(rows[split]) for split in asked}
    tokens = sum(min(parts[split].tokens, rows[split].numel()) for split in asked)
    rows["forget"] = torch.cat([rows[split] for split in asked])
    warnings += _passage_warnings([parts[split] for split in asked], parts)
    unknown = (rows["forget"] == tokenizer.unk_token_id).double().mean().item() if tokenizer.unk_token else 0.0
    if unknown and tokenizer.unk_token != tokenizer.eos_token:
        warnings.append(
            f"the tokenizer does not know {unknown:.1%} of the tokens to be forgotten: is it the right one?"
        )
    texts, hashes = ({split: getattr(file, name) for split, file in read.items()} for name in ("texts", "sha256"))
    texts["forget"] = [text for split in asked for text in texts[split]]
    places = _find_secrets(secrets, texts, tokenizer, length, warnings)
    material = Material(
        tokenizer,
        rows["forget"],
        rows["retain"],
        rows.get("holdout"),
        places,
        notes,
        warnings,
        hashes,
        sets,
        tokens,
    )
    if len(material.validation) < FEW:
        warnings.append(
            f"λ is chosen, and damage measured, on only {len(material.validation)} of the sequences: "
            f"give texts to keep that make {EIGHTH * FEW} sequences or more"
        )
    return material


@dataclass
class _Part:
    """The texts of one file on their way to sequences: ``plain`` has them with single spaces."""

    file: TextFile
    plain: list[str]
    order: list[int] = field(default_factory=list)
    documents: list[list[int]] = field(default_factory=list)
    rows: Tensor = field(default_factory=lambda: torch.empty(0, 0))

    def cut(self, tokenizer: PreTrainedTokenizerBase, length: int, spread: bool, whole: bool) -> None:
        """Tokens of all texts, every eighth at the end if they are to be ``spread``, and the sequences of them."""
        tokens = _tokens(tokenizer, self.file.texts, self.file.name)
        self.order = sorted(range(len(tokens)), key=lambda i: spread and i % EIGHTH == EIGHTH - 1)
        self.documents = [tokens[i] for i in self.order]
        self.rows = _sequences(self.documents, tokenizer.eos_token_id, length, whole)

    @property
    def tokens(self) -> int:
        """How many tokens the texts have, each with the one that ends it."""
        return sum(len(document) + 1 for document in self.documents)

    def text_name(self, text: int) -> str:
        """How an error names a text."""
        return f"text {text + 1} of {self.file.name}"

    def row_name(self, row: int) -> str:
        """How an error names a sequence, so that it can be found in the file."""
        ends = list(itertools.accumulate(len(document) + 1 for document in self.documents))
        start = min(row * self.rows.shape[1], ends[-1] - self.rows.shape[1])  # the last one may start earlier
        text = self.order[next(i for i, end in enumerate(ends) if end > start)]
        return f"sequence {row + 1} of {self.file.name} (it begins in text {text + 1})"


def _sequences(documents: list[list[int]], end: int, length: int, whole: bool) -> Tensor:
    """The texts packed; ``whole``: what is left over at the end makes one more row with the tokens before it."""
    rows = pack(documents, end, length)
    stream = [token for document in documents for token in (*document, end)]
    if whole and len(stream) > length and len(stream) % length:
        rows = torch.cat([rows, torch.tensor([stream[-length:]])])
    return rows


def _passage_warnings(asked: list[_Part], parts: dict[str, _Part]) -> list[str]:
    fates = {
        "retain": "texts that are kept, and these passages will stay",
        "holdout": "the holdout texts, which the model has therefore seen in part",
    }
    numbers = {
        split: sum(_shared_passages(part, parts[split]) for part in asked) for split in fates if split in parts
    }
    total = sum(len(part.documents) for part in asked)
    return [
        f"{number} of {total} texts to be forgotten have {PASSAGE} tokens in a row or "
        f"more, or all where they have fewer, in common with {fates[split]}"
        for split, number in numbers.items()
        if number
    ]


def _shared_passages(forget: _Part, other: _Part) -> int:
    """Number of forget texts that share a passage with the other texts, or are shorter and whole within one."""

    def passages(document: list[int]) -> set[tuple[int, ...]]:
        return set(zip(*(document[i:] for i in range(PASSAGE)), strict=False))

    wanted = [passages(document) for document in forget.documents]
    all_wanted = set().union(*wanted)
    kept = {passage for document in other.documents for passage in passages(document) if passage in all_wanted}
    joined = "\n".join(other.plain)  # a short text is sought as text: its first and last token depend on its place
    texts = zip(wanted, forget.plain, strict=True)  # forget's texts are in their own order
    return sum(not found.isdisjoint(kept) if found else text in joined for found, text in texts)


def _special_notes(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    whole, bare = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    if whole == bare:
        return []
    return [
        "by itself the tokenizer puts special tokens around a text; the sequences have none but the one that ends "
        "a text, after each, as is usual in training on joined texts"
    ]


def _tokens(tokenizer: PreTrainedTokenizerBase, texts: list[str], name: str) -> list[list[int]]:
    documents = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    for i, document in enumerate(documents, 1):
        if not document:
            raise ValueError(f"the tokenizer makes nothing of text {i} of {name}: remove it")
    return documents


def _refuse_shared(items: dict[str, list], describe: Callable[[str, int], str]) -> None:
    for first, second in itertools.combinations(items, 2):
        places = {item: i for i, item in enumerate(items[second])}
        for i, item in enumerate(items[first]):
            if item in places:
                raise ValueError(
                    f"{describe(first, i)} is also {describe(second, places[item])}".rstrip(",")
                    + ": remove it from one of the files"
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
