"""From documents to fixed-length token sequences, split by document into forget, retain and holdout."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import datasets
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

END = "</s>"


@dataclass(frozen=True)
class Splits:
    """Three disjoint sets of sequences, and the ids of the documents each was cut from.

    ``forget``, ``retain`` and ``holdout`` are int64 token ids of shape [sequences, tokens]; ``documents`` maps
    each of these three names to the ids of its documents. Together ``forget`` and ``retain`` are what the
    original model is trained on; ``holdout`` is never trained on.

    Raises ValueError, on construction, if a split is empty or if two splits share a document or a sequence.
    """

    forget: Tensor
    retain: Tensor
    holdout: Tensor
    documents: dict[str, list[str]]

    def __post_init__(self) -> None:
        names = ("forget", "retain", "holdout")
        for name in names:
            if len(getattr(self, name)) == 0:
                raise ValueError(f"the {name} split is empty: ask for at least one sequence in it")
        for i, first in enumerate(names):
            for second in names[i + 1 :]:
                shared = set(self.documents[first]) & set(self.documents[second])
                if shared:
                    raise ValueError(
                        f"{first} and {second} share {len(shared)} document(s), among them {min(shared)!r}: "
                        "a document may be in one split only"
                    )
                if _rows(getattr(self, first)) & _rows(getattr(self, second)):
                    raise ValueError(
                        f"{first} and {second} hold the same sequence of tokens: remove duplicate texts first"
                    )

    @property
    def train(self) -> Tensor:
        """All that the original model sees: the forget sequences, then the retain sequences."""
        return torch.cat([self.forget, self.retain])


def _rows(sequences: Tensor) -> set[bytes]:
    return {row.tobytes() for row in sequences.numpy()}


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with ``vocabulary`` entries, of which ``</s>`` is number 0.

    Byte-level: any text can be encoded, so there is no unknown token. Deterministic in ``texts``.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=END)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The token ids of a text, and none besides."""
    # What is too long for a model is cut later on purpose, so the tokenizer's warning about it would mislead.
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def encode_after(
    tokenizer: PreTrainedTokenizerBase, prefix: str, texts: Sequence[str]
) -> tuple[list[int], list[list[int]]]:
    """The token ids of ``prefix``, and of it and each of ``texts`` together, which begin with the same ids.

    White space that ends the prefix is tokenised with the texts, as the tokenizers of language models expect.
    Raises ValueError if the prefix is empty, or if it and a text share a token.
    """
    if not prefix.rstrip():
        raise ValueError("the prefix is empty: the first token needs something to follow, such as the end token")
    start = encode(tokenizer, prefix.rstrip())
    rows = [encode(tokenizer, prefix + text) for text in texts]
    for text, row in zip(texts, rows, strict=True):
        if row[: len(start)] != start or len(row) == len(start):
            raise ValueError(
                f"the prefix {prefix!r} and the text {text!r} have a token in common or the text has none: "
                "end the prefix at the end of a word"
            )
    return start, rows


def pack(documents: Iterable[list[int]], end: int, length: int) -> Tensor:
    """Join token lists, each followed by the token ``end``, and cut the stream into rows of ``length`` tokens.

    Returns int64 ids of shape [rows, length]; the last tokens that fill no row are dropped. There is no padding,
    so every position of every sequence counts alike in every loss and every curvature.
    """
    stream = [token for document in documents for token in (*document, end)]
    rows = len(stream) // length
    return torch.tensor(stream[: rows * length], dtype=torch.int64).view(rows, length)


def deal(
    order: Iterator[int],
    corpus: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    number: int,
    length: int,
    what: str,
) -> tuple[Tensor, list[int]]:
    """Take documents off ``order``, numbers of rows of ``corpus``, until they make ``number`` sequences.

    Returns the sequences [number, length] and the documents' numbers. What the last document has left over is
    dropped, never passed on, so a document is in one deal only. Raises ValueError, calling the deal ``what``, if
    the documents run out.
    """
    taken: list[int] = []
    documents: list[list[int]] = []
    tokens = 0
    while tokens < number * length:
        index = next(order, None)
        if index is None:
            raise ValueError(
                f"the documents ran out in the {what}, {number:,} sequences of {length} tokens: the "
                f"{len(taken):,} that were left for it make {tokens // length:,}. Ask for fewer or shorter "
                "sequences, or take a corpus or a topic of which there is more"
            )
        taken.append(index)
        documents.append(encode(tokenizer, corpus[index]["text"]))
        tokens += len(documents[-1]) + 1
    return pack(documents, tokenizer.eos_token_id, length)[:number], taken


def make_splits(
    corpus: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    forget: int,
    retain: int,
    holdout: int,
    seed: int,
) -> Splits:
    """Shuffle the documents with ``seed`` and :func:`deal` them to holdout, forget and retain, in that order.

    Raises ValueError if a number or the length is not positive or the corpus has too little text.
    """
    wanted = {"holdout": holdout, "forget": forget, "retain": retain}
    for name, number in (*wanted.items(), ("length", length)):
        if number < 1:
            raise ValueError(f"{name} must be positive, not {number}")
    order = iter(np.random.default_rng(seed).permutation(len(corpus)).tolist())
    sequences: dict[str, Tensor] = {}
    documents: dict[str, list[str]] = {}
    for name, number in wanted.items():
        sequences[name], taken = deal(order, corpus, tokenizer, number, length, f"{name} split")
        documents[name] = corpus[taken]["id"]
    return Splits(**sequences, documents=documents)
