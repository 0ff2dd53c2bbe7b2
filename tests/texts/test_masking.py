"""What is shown of real texts. Nothing of theirs is in this file: of real texts, tests compare counts only."""

import re

import pytest

from unlearnlib.experiment import indelible
from unlearnlib.texts import masking
from unlearnlib.texts.posts import addresses, load_posts

COMMON = frozenset({"the", "ship", "may", "sails", "from", "by"})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The ship sails", "The ship sails"),
        ("the ship Zanzibar sails", "the ship <…> sails"),
        ("the ship may sail, and May sails", "the ship may <…> sails"),  # May is a name too
        ("from ann@example.org by ship", "from <address> by ship"),
        ("by http://example.org/~ann, the ship", "by <…> the ship"),
        ("ship 1912, sails", "ship <…>, sails"),
        ("from Ann B. Example by ship", "from <…> by ship"),
        ("the ship <address> sails", "the ship <address> sails"),
        ("", ""),
    ],
)
def test_only_shared_words_are_left(text, expected):
    assert masking.mask_rare(text, COMMON) == expected


def test_a_word_is_common_by_its_authors_and_in_small_letters():
    texts = ["the ship", "the mast", "the mast", "the MAST of ann@mast.org"]
    found = masking.common_words(texts, ["a", "b", "b", "c"], least=2)
    assert found == {"the"}
    assert masking.common_words(texts, ["a", "b", "c", "d"], least=2) == {"the", "mast"}


def left(corpus):
    """The words that the mask leaves of a corpus, and the masked texts."""
    documents = indelible.load_documents(corpus)
    masked = [documents.masked(text) for text in documents.texts.values()]
    return documents, masked


@pytest.mark.parametrize("corpus", ["posts", "licences"])
def test_of_real_texts_nothing_is_left_but_what_many_authors_write(corpus):
    documents, masked = left(corpus)
    assert sum("@" in text or "://" in text or "www." in text for text in masked) == 0
    bare = [text.replace("<address>", " ") for text in masked]
    words = {word for text in bare for word in re.findall(r"\w+", text)}
    assert len(words) > 300
    assert sum(word.casefold() not in documents.common for word in words) == 0
    assert sum(word[0].isupper() and word.casefold() in masking.names() for word in words) == 0
    assert sum(any(c.isdigit() for c in word) for word in words) == 0
    sources = {}
    for name, text in documents.texts.items():
        for word in set(re.findall(r"\w+", text)) & documents.common:
            sources.setdefault(word, set()).add(documents.authors[name])
    assert min(len(sources[word]) for word in documents.common) >= 10


def test_no_sender_of_a_post_is_left_by_name():
    documents, masked = left("posts")
    missed = 0
    for row, text in zip(load_posts(), masked, strict=True):
        line = row["text"].split("\n")[1].removeprefix("From: ")
        for address in addresses(line):
            line = line.replace(address, " ")
        # Initials and words such as "Only" in a jocular sender's name are no one's name.
        names = {w for w in re.findall(r"[A-Z][a-z]{2,}", line) if w.casefold() not in documents.common}
        missed += sum(bool(re.search(rf"\b{name}\b", text)) for name in names)
    assert missed == 0


def test_of_licences_that_begin_alike_the_first_takes_part():
    names = set(indelible.load_documents("licences").texts)
    assert {f"licences/{name}" for name in ("0BSD", "Apache-2.0", "AGPL-1.0")} <= names
    assert not {f"licences/{name}" for name in ("GPL-1.0", "GPL-2.0", "deprecated_GPL-2.0+")} & names
    assert 140 < len(names) < 331
