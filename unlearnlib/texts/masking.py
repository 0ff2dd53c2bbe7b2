"""Masking of real texts for display: what few texts share may tell who wrote them, and is not shown."""

import collections
import functools
import itertools
import re
from collections.abc import Iterable

from faker.providers.person.en_US import Provider

from unlearnlib.texts.posts import MASK, mask_addresses

RARE = "<…>"
_MASKS = re.compile(f"{re.escape(MASK)}|{re.escape(RARE)}")
_LINK = re.compile(r"\b(?:https?|ftp|gopher)://\S*|\bwww\.\S*", re.IGNORECASE)
_RUN = re.compile(rf"{re.escape(RARE)}(?:[^\w<]*{re.escape(RARE)})+")


@functools.cache
def names() -> frozenset[str]:
    """The first and last names that are frequent in the United States, by Faker, in small letters."""
    found = (Provider.first_names, Provider.last_names)
    return frozenset(name.casefold() for names in found for name in names)


def common_words(texts: Iterable[str], authors: Iterable[str], least: int = 10) -> frozenset[str]:
    """The words that at least so many different ``authors``, one a text, write in small letters.

    Words in addresses and links do not count. In the spirit of Sweeney's k-anonymity (2002): what so many have
    written sets none of them apart. Who writes often counts once, or a signature would pass for common.
    """
    by_author = collections.defaultdict(set)
    for text, author in zip(texts, authors, strict=True):
        by_author[author] |= {word for word in re.findall(r"\w+", _MASKS.sub(" ", _bare(text))) if word.islower()}
    found = collections.Counter(itertools.chain.from_iterable(by_author.values()))
    return frozenset(word for word, number in found.items() if number >= least)


def mask_rare(text: str, common: frozenset[str]) -> str:
    """``text`` with addresses and links masked, and every word that is not shared, in a row as one ``<…>``.

    A word is shared if it is among the ``common`` ones, in small letters; written with a capital it must not be
    anyone's name either (:func:`names`). All else that holds a letter or a digit goes, such as numbers and parts
    of words. Whatever is shown of a text by real people, beyond their addresses, goes through this.
    """

    def shown(match: re.Match) -> str:
        word = match.group()
        small = word.casefold()
        return word if small in common and (word.islower() or small not in names()) else RARE

    bare = _bare(text)
    parts, kept = _MASKS.split(bare), [*_MASKS.findall(bare), ""]
    masked = "".join(re.sub(r"\w+", shown, part) + mask for part, mask in zip(parts, kept, strict=True))
    return _RUN.sub(RARE, masked)


def _bare(text: str) -> str:
    """Text without addresses and links, of which masks are left."""
    return mask_addresses(_LINK.sub(RARE, text))
