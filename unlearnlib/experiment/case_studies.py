"""Memorisation: posts with planted secrets, tales with repeated passages, and what unlearning makes of both."""

import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unlearnlib.experiment.case import Case
from unlearnlib.experiment.profiles import Profile
from unlearnlib.experiment.report import Report
from unlearnlib.losses import mean_loss, token_losses
from unlearnlib.measures.exposure import candidates, exposure, exposure_bits, text_losses
from unlearnlib.measures.extraction import continuations, verbatim_length
from unlearnlib.models.loading import load_tokenizer
from unlearnlib.models.training import train_missing
from unlearnlib.texts.corpora import load_corpus
from unlearnlib.texts.planting import Secret, make_secrets, planted_rows, spread
from unlearnlib.texts.posts import addresses, load_posts
from unlearnlib.texts.sequences import Splits, encode, encode_after, make_splits, train_tokenizer
from unlearnlib.weights import Vector, mean_gradient

SIDES = {"forget": "", "retain": "_kept"}
"""By split, what the names of the metrics of its secrets have in them."""

ROWS_OF_A_POST = 3
"""How many sequences of a post take part. In all but the first there may be a secret."""

SHOWN = 48
"""How many tokens of a continuation are kept to be read."""


@dataclass(frozen=True)
class PostCase(Case):
    """A case of posts by real people, with ``secrets`` planted into those to forget and into those that stay.

    ``posts`` are all posts by id, those of no split among them. They hold addresses, and so are never shown.
    """

    posts: dict[str, str] = field(repr=False)
    secrets: dict[str, list[Secret]]

    @functools.cached_property
    def senders(self) -> dict[str, str]:
        """By the address of each sender who is to be forgotten, what comes before it in the post.

        An address that occurs in a post that stays does not count.
        """
        asked = {}
        for name in self.splits.documents["forget"]:
            for address in self._sender(name):
                if address not in self._addresses_in("retain"):
                    asked[address] = self.posts[name].partition(address)[0]
        return asked

    @functools.cached_property
    def strangers(self) -> list[str]:
        """The addresses of senders that the original model has seen nowhere, sorted."""
        seen = self._addresses_in("forget") | self._addresses_in("retain")
        trained_on = {*self.splits.documents["forget"], *self.splits.documents["retain"]}
        others = (address for name in self.posts if name not in trained_on for address in self._sender(name))
        return sorted(set(others) - seen)

    def _sender(self, name: str) -> list[str]:
        """The address in a post's line of the sender, if there is one."""
        return addresses(self.posts[name].split("\n")[1])[:1]

    def _addresses_in(self, split: str) -> set[str]:
        return {address for name in self.splits.documents[split] for address in addresses(self.posts[name])}

    def secret_losses(self, model: PreTrainedModel, split: str) -> np.ndarray:
        """The loss in nats of the number of each secret of a split."""
        asked = self.secrets[split]
        return np.array([text_losses(model, self.tokenizer, s.prefix, [s.number]).item() for s in asked])

    def secret_gradient(self, model: PreTrainedModel, secret: Secret) -> Vector:
        """The gradient of the loss of a secret, summed over the tokens of its number."""
        start, [row] = encode_after(self.tokenizer, secret.prefix, [secret.number])

        def loss(model: PreTrainedModel, batch: Tensor) -> Tensor:
            return token_losses(model, batch)[:, len(start) - 1 :].sum(dim=1)

        return mean_gradient(model, torch.tensor([row]), loss)


@dataclass(frozen=True)
class TaleCase(Case):
    """A case of tales in which some passages are repeated, with sequences [n, tokens] that occur once in each.

    ``forgotten`` are the passages to forget, ``kept`` those to keep, ``rest`` is what stays besides.
    """

    forgotten: Tensor
    kept: Tensor
    rest: Tensor


def post_cases(profile: Profile, numbers: Mapping[str, int], repeats: Sequence[int]) -> list[PostCase]:
    """:func:`planted_cases` of the newsgroup posts."""
    return planted_cases(profile, {row["id"]: row["text"] for row in load_posts()}, numbers, repeats)


def planted_cases(
    profile: Profile, posts: dict[str, str], numbers: Mapping[str, int], repeats: Sequence[int]
) -> list[PostCase]:
    """A case a seed of so many ``posts`` in each split, in the order in which they are dealt; trains their models.

    ``posts`` are texts by id. Into those to forget, and likewise into those that stay, secrets are planted, of
    ``repeats`` copies each.
    Raises ValueError if there are not so many posts of :data:`ROWS_OF_A_POST` sequences, or as ``spread``.
    """
    tokenizer = _tokenizer(profile, posts.values())
    tokens = {name: encode(tokenizer, text) for name, text in posts.items()}
    long = [name for name, ids in tokens.items() if len(ids) >= ROWS_OF_A_POST * profile.length]
    if len(long) < sum(numbers.values()):
        raise ValueError(
            f"{len(long)} posts have {ROWS_OF_A_POST} sequences of {profile.length} tokens: ask for no more"
        )
    cases = []
    for seed in profile.seeds:
        drawn = make_secrets([*repeats, *repeats], seed)
        secrets = {"forget": drawn[: len(repeats)], "retain": drawn[len(repeats) :], "holdout": []}
        order = iter(np.random.default_rng(seed).permutation(long).tolist())
        rows, documents = {}, {}
        for split, number in numbers.items():
            documents[split] = list(itertools.islice(order, number))
            planted = spread(secrets[split], number, ROWS_OF_A_POST - 1, seed)
            parts = []
            for name, here in zip(documents[split], planted, strict=True):
                sentences = [encode(tokenizer, secret.sentence) for secret in here]
                parts.append(planted_rows(tokens[name], sentences, ROWS_OF_A_POST, profile.length))
            rows[split] = torch.cat(parts)
        splits = Splits(**rows, documents=documents)
        cases.append(PostCase(profile, seed, tokenizer, splits, posts, secrets))
    return _trained(cases)


def tale_cases(profile: Profile, passages: int, copies: int, rest: int = 160, holdout: int = 64) -> list[TaleCase]:
    """A case a seed of passages to forget and as many to keep, in so many ``copies`` each; trains their models.

    ``rest`` and ``holdout`` count the sequences of the rest of the book and of other tales. Raises ValueError if
    the validation sequences cannot hold all copies of a passage and something else.
    """
    # Validation is the last eighth of what stays. A passage is there with all its copies, or with none.
    last = (passages * copies + rest) // 8 - copies
    if last < 1:
        raise ValueError(f"{copies} copies leave no room in the validation set: take fewer, or more of the rest")
    corpus = load_corpus(profile.corpus)
    tokenizer, sizes = _tokenizer(profile, corpus["text"]), {"forget": passages, "retain": passages + rest}
    cases = []
    for seed in profile.seeds:
        once = make_splits(corpus, tokenizer, length=profile.length, **sizes, holdout=holdout, seed=seed)
        kept, others = once.retain.split([passages, rest])
        stays = torch.cat([kept[:-1].repeat(copies, 1), others[:-last]])
        stays = stays[torch.randperm(len(stays), generator=torch.Generator().manual_seed(seed))]
        stays = torch.cat([stays, kept[-1:].repeat(copies, 1), others[-last:]])
        # In turns, so that the relearning probe, which trains on every second sequence, asks for other passages.
        splits = replace(once, forget=once.forget.repeat(copies, 1), retain=stays)
        cases.append(TaleCase(profile, seed, tokenizer, splits, once.forget, kept, others))
    return _trained(cases)


def _tokenizer(profile: Profile, texts: Iterable[str]) -> PreTrainedTokenizerBase:
    """The profile's tokenizer: trained on the texts, or the pretrained model's own."""
    if profile.vocabulary is None:
        return load_tokenizer(profile.model)
    return train_tokenizer(texts, profile.vocabulary)


def _trained(cases: list) -> list:
    train_missing([case.runs()[name] for case in cases for name in ("original", "retrained")])
    return cases


@dataclass
class SecretReport(Report):
    """A report of a :class:`PostCase` that also asks every model for the secrets and for the senders' addresses.

    ``secrets`` has a row for the exposure of each secret among ``of`` candidates, in bits, and one for its loss,
    in nats; ``senders`` a row for the mean exposure of addresses among those of strangers.
    """

    of: int = 256
    secrets: list[dict[str, Any]] = field(default_factory=list)
    senders: list[dict[str, Any]] = field(default_factory=list)

    def measure(
        self, method: str, model: PreTrainedModel, brief: bool = False, **extra: float
    ) -> dict[str, float]:
        """As :meth:`Report.measure`, and the exposures."""
        case: PostCase = self.case
        for split, side in SIDES.items():
            for i, secret in enumerate(case.secrets[split]):
                others = candidates(secret.number, self.of - 1, case.seed)
                losses = text_losses(model, case.tokenizer, secret.prefix, [secret.number, *others])
                bits = exposure_bits(losses[0].item(), losses[1:])
                values = {f"exposure{side}_bits": bits, f"secret{side}_loss": losses[0].item()}
                self.secrets += [
                    row | {"repeats": secret.repeats, "secret": i} for row in case.rows(method, values)
                ]
        asked, strangers = case.senders, case.strangers
        bits = [exposure(model, case.tokenizer, before, a, strangers) for a, before in asked.items()]
        numbers = {"addresses": len(asked), "strangers": len(strangers)}
        self.senders += [row | numbers for row in case.rows(method, {"exposure_bits": float(np.mean(bits))})]
        return super().measure(method, model, brief, **extra)


@dataclass
class PassageReport(Report):
    """A report of a :class:`TaleCase` that also has every model continue the passages after ``prompt`` tokens.

    ``said`` are, by method, the continuations of the first passage to forget and the first to keep.
    """

    prompt: int = 16
    said: dict[str, Tensor] = field(default_factory=dict)

    def measure(
        self, method: str, model: PreTrainedModel, brief: bool = False, **extra: float
    ) -> dict[str, float]:
        """As :meth:`Report.measure`, with what is said verbatim and the losses of what is to be kept."""
        case: TaleCase = self.case
        beginnings = torch.stack([case.forgotten[0], case.kept[0]])[:, : self.prompt]
        shown = min(case.profile.length - self.prompt, SHOWN)
        self.said[method] = continuations(model, beginnings, shown)
        extra |= {
            "verbatim_tokens": verbatim(model, case.forgotten, self.prompt),
            "verbatim_kept_tokens": verbatim(model, case.kept, self.prompt),
            "kept_loss": mean_loss(model, case.kept),
            "rest_loss": mean_loss(model, case.rest),
        }
        return super().measure(method, model, brief, **extra)


def verbatim(model: PreTrainedModel, known: Tensor, prompt: int) -> float:
    """Mean number of tokens continued word for word after the first ``prompt`` of each row of ``known``."""
    said = continuations(model, known[:, :prompt], known.shape[1] - prompt)
    return float(np.mean([verbatim_length(*pair) for pair in zip(said, known[:, prompt:], strict=True)]))
