"""Task accuracy: does a model choose the right answer to a question among a few, by their likelihood?"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import datasets
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unlearnlib.losses import batched, token_losses
from unlearnlib.texts.sequences import encode_after


@dataclass(frozen=True)
class Question:
    """A text that breaks off where its answer begins, what may follow, and which of ``options`` does."""

    prompt: str
    options: tuple[str, ...]
    right: int


def document_questions(corpus: datasets.Dataset, documents: Iterable[str], seed: int) -> list[Question]:
    """The questions that the corpus's documents with the ids ``documents`` ask, in that order.

    The prompt is the text of the document up to its answer: for a number, the steps that lead to it are part of
    that. Where the corpus has ``options``, these are to be chosen from, and else the answer and
    :func:`other_numbers`, three of them, drawn with ``seed``.

    Raises ValueError if the corpus has no answers, or for an id that it does not have.
    """
    if "answer" not in corpus.column_names:
        raise ValueError(
            f"these documents have no answers, only {corpus.column_names}: take a corpus of questions"
        )
    places = {name: place for place, name in enumerate(corpus["id"])}
    generator = random.Random(seed)
    questions = []
    for name in documents:
        if name not in places:
            raise ValueError(f"the corpus has no document {name!r}")
        row = corpus[places[name]]
        prompt = row["text"].removesuffix(row["answer"])
        options = row.get("options") or [*other_numbers(row["answer"], 3, generator), row["answer"]]
        questions.append(Question(prompt, tuple(options), options.index(row["answer"])))
    return questions


def other_numbers(answer: str, number: int, generator: random.Random) -> list[str]:
    """Draw ``number`` distinct numbers with as many digits as ``answer``, none of them equal to it.

    The sign and what follows a decimal point stay as they are. Raises ValueError if ``answer`` is not a number, or
    has too few others.
    """
    whole, point, fraction = answer.partition(".")
    sign, digits = whole[: whole.startswith("-")], whole.removeprefix("-")
    if not digits.isdecimal():
        raise ValueError(f"the answer {answer!r} is not a number: give the question its options")
    lowest = 10 ** (len(digits) - 1) if len(digits) > 1 else 0
    possible = range(lowest, 10 ** len(digits))
    if number > len(possible) - 1:
        raise ValueError(f"there are only {len(possible) - 1} other numbers like {answer!r}, not {number}")
    others = [n for n in generator.sample(possible, number + 1) if n != int(digits)][:number]
    return [f"{sign}{n}{point}{fraction}" for n in others]


def fits(tokenizer: PreTrainedTokenizerBase, question: Question, length: int) -> bool:
    """Whether the longest option leaves room for a token of the prompt within ``length`` tokens.

    Raises ValueError if an option shares a token with the prompt.
    """
    stem, rows = encode_after(tokenizer, question.prompt, question.options)
    return _surplus(rows, length) < len(stem)


def option_losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    length: int,
) -> list[Tensor]:
    """Total negative log-likelihood in nats of each option after its prompt; float64, by question [options].

    The total and not the mean over tokens: it compares the probabilities of the options as they stand, and so
    tends to the shorter one. Prompts are cut at their beginning so that with the longest option they have no more
    than ``length`` tokens. Each option is followed by padding, which a causal model does not see.

    Raises ValueError if an option leaves no room for a prompt, or shares a token with it.
    """
    rows, spans = [], []
    for question in questions:
        stem, full = encode_after(tokenizer, question.prompt, question.options)
        cut = _surplus(full, length)
        if cut >= len(stem):
            raise ValueError(f"the options {question.options} do not fit {length} tokens after a prompt")
        rows += [tokens[cut:] for tokens in full]
        spans += [(len(stem) - cut - 1, len(tokens) - cut - 1) for tokens in full]
    longest = max(map(len, rows))
    padded = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    losses = batched(token_losses, model, padded).double()
    totals = torch.stack([row[start:end].sum() for row, (start, end) in zip(losses, spans, strict=True)])
    return list(totals.split([len(question.options) for question in questions]))


def task_accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], length: int
) -> float:
    """Share of ``questions`` whose right option is likelier than every other (:func:`option_losses`)."""
    found = option_losses(model, tokenizer, questions, length)
    hits = [int(losses.argmin()) == q.right for q, losses in zip(questions, found, strict=True)]
    return sum(hits) / len(hits)


def _surplus(rows: Sequence[Sequence[int]], length: int) -> int:
    """By how many tokens the longest row exceeds ``length``."""
    return max(0, max(map(len, rows)) - length)
