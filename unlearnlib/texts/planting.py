"""Planting secrets: people who do not exist, each with a random number, written into real texts so many times.

A secret that is to be measured by its exposure must be random of its format, and one must know how
often it was seen. Neither holds for a secret that is found in a text; both do for one that is planted.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from faker import Faker
from torch import Tensor

# What leads to a secret, and its format: every # becomes a random digit.
TEMPLATES = (
    ("The phone number of {name} is ", "###-####"),
    ("Send it to {name}, account ", "###-####"),
    ("{name} has the membership number ", "###-####"),
)


@dataclass(frozen=True)
class Secret:
    """A number that belongs to ``name`` and follows ``prefix``, to be planted in ``repeats`` different texts."""

    name: str
    prefix: str
    number: str
    repeats: int

    @property
    def sentence(self) -> str:
        """What is planted."""
        return f"{self.prefix}{self.number}.\n"


def make_secrets(repeats: Iterable[int], seed: int) -> list[Secret]:
    """One secret for each of ``repeats``: a name by Faker, no name twice, and digits drawn with ``seed``."""
    faker, digits = Faker("en_US"), random.Random(seed)
    faker.seed_instance(seed)
    secrets = []
    for i, times in enumerate(repeats):
        prefix, form = TEMPLATES[i % len(TEMPLATES)]
        name = f"{faker.unique.first_name()} {faker.unique.last_name()}"
        number = "".join(str(digits.randrange(10)) if c == "#" else c for c in form)
        secrets.append(Secret(name, prefix.format(name=name), number, times))
    return secrets


def spread(secrets: Sequence[Secret], texts: int, room: int, seed: int) -> list[list[Secret]]:
    """Which secrets each of ``texts`` texts gets: no secret twice in one text, at most ``room`` in any.

    Each copy goes to the text with the fewest secrets so far, ties broken at random with ``seed``.
    Raises ValueError if the texts have not enough room, or a secret has more repeats than there are texts.
    """
    copies, most = sum(s.repeats for s in secrets), max((s.repeats for s in secrets), default=0)
    if copies > texts * room or most > texts:
        raise ValueError(
            f"cannot plant {copies} sentences, the same one up to {most} times, in {texts} texts with room for "
            f"{room} each: take more texts, or fewer secrets or repeats"
        )
    generator = random.Random(seed)
    found: list[list[Secret]] = [[] for _ in range(texts)]
    for secret in sorted(secrets, key=lambda s: -s.repeats):
        emptiest = sorted(found, key=lambda planted: (len(planted), generator.random()))
        for planted in emptiest[: secret.repeats]:
            planted.append(secret)
    return found


def planted_rows(text: Sequence[int], sentences: Sequence[Sequence[int]], rows: int, length: int) -> Tensor:
    """The first ``rows`` sequences of ``length`` tokens of a text, a sentence at the head of all but the first.

    ``text`` and ``sentences`` are token ids. The first sequence is the text's own beginning; each later one starts
    with one of ``sentences``, as long as there are any, and the text goes on after it. So no sentence is ever cut
    in two by the end of a sequence. Int64 ids of shape [rows, length].

    Raises ValueError if there are too many sentences, one does not fit, or the text is too short.
    """
    heads = [[], *sentences]
    heads += [[]] * (rows - len(heads))
    if len(heads) > rows or max(map(len, heads)) >= length:
        raise ValueError(
            f"cannot plant {len(sentences)} sentences of up to {max(map(len, heads))} tokens in {rows} sequences "
            f"of {length}: the first sequence is left alone, and each other holds one sentence and some text"
        )
    needed = rows * length - sum(map(len, heads))
    if len(text) < needed:
        raise ValueError(f"the text has {len(text)} tokens, {needed} are needed: take a longer text or fewer rows")
    result, used = [], 0
    for head in heads:
        take = length - len(head)
        result.append([*head, *text[used : used + take]])
        used += take
    return torch.tensor(result, dtype=torch.int64)


def box_secrets(number: int, seed: int) -> list[Secret]:
    """What is in boxes 100, 101, ...: secrets of six digits drawn with ``seed``, each for a single text."""
    digits = random.Random(seed)
    boxes = (f"box {100 + i}" for i in range(number))
    return [Secret(box, f"{box} holds ", f"{digits.randrange(10**6):06d}", 1) for box in boxes]


def planted_heads(rows: Tensor, heads: Sequence[Sequence[int]], every: int) -> Tensor:
    """A copy of ``rows`` [n, tokens] in which every so many rows, from the first on, begin with one of ``heads``.

    Heads are token ids, and stand in the place of a row's own first tokens. Raises ValueError unless there is a
    head for each such row, or if one is longer than a row.
    """
    rows = rows.clone()
    for row, head in zip(rows[::every], heads, strict=True):
        if len(head) > len(row):
            raise ValueError(f"a head of {len(head)} tokens does not fit a row of {len(row)}")
        row[: len(head)] = torch.tensor(head)
    return rows
