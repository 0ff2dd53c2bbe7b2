"""The newsgroup posts. Real people wrote them: nothing of theirs is in this file.

Nor is it in what a failing test prints: of the real posts, tests compare counts only.
"""

import collections
import functools
import pickle
import re
import zlib

import pytest

from unlearnlib.texts import posts, wheels

HEADERS = "Path: here!there!everywhere\nFrom: ann@example.org (Ann  Example)\nNewsgroups: sci.space,sci.misc\n"
RAW = HEADERS + "Subject: Re: the\n moon\nX: <1@example.org>\n\nDear all,\n\n  two  blanks\tand a tab \n.\n"


@pytest.fixture
def member(monkeypatch):
    """Put the bytes of a pickle in the wheel's place."""
    return lambda pickled: monkeypatch.setattr(posts, "read_member", lambda *_: zlib.compress(pickled))


real = functools.cache(posts.load_posts)  # a fixture's value would be printed when a test fails


def test_what_becomes_of_a_post(member):
    member(pickle.dumps([RAW, RAW.replace("moon", "møøn")], protocol=0))
    first, second = posts.load_posts()
    text = "Subject: Re: the moon\nFrom: ann@example.org (Ann Example)\nDear all,\ntwo blanks and a tab\n."
    assert first == {"id": "posts/00000", "group": "sci.space", "text": text}
    assert second == first | {"id": "posts/00001", "text": text.replace("moon", "møøn")}


SPRUNG = []


class Trap:
    def __reduce__(self):
        return spring, ()


def spring():
    SPRUNG.append(1)


def test_the_pickle_is_never_loaded(member):
    pickled = pickle.dumps([RAW, Trap()], protocol=0)
    pickle.loads(pickled)
    assert SPRUNG == [1]
    member(pickled)
    assert len(posts.load_posts()) == 1
    assert SPRUNG == [1]


def test_the_real_posts():
    # By another way: the pickle's lines, where a text starts with V, or with aV if it is appended to a list.
    pickled = zlib.decompress(wheels.read_member(wheels.GENSIM, "gensim/test/test_data/mini_newsgroup"))
    lines = re.findall(rb"^a?V(.*)$", pickled, flags=re.MULTILINE)
    assert len(real()) == len(lines) == 200
    same = 0
    for row, line in zip(real(), lines, strict=True):
        head, body = line.decode("raw_unicode_escape").split("\n\n", 1)
        same += row["text"].split("\n", 2)[2].split() == body.split()
        same += row["group"] in re.search(r"^Newsgroups: (.*)$", head, flags=re.MULTILINE)[1].split(",")
    assert same == 400
    assert len({row["id"] for row in real()}) == len({row["text"] for row in real()}) == 200
    clean = [not re.search(r"[^\S \n]|  |^\s|\s$|\s\n|\n\s", row["text"]) for row in real()]
    headed = [bool(re.match(r"Subject: \S.*\nFrom: \S", row["text"])) for row in real()]
    assert all(clean)
    assert all(headed)


def test_no_address_is_left():
    assert sum("@" in posts.mask_addresses(row["text"]) for row in real()) == 0
    found = collections.Counter(address for row in real() for address in posts.addresses(row["text"]))
    assert len(found) > 379  # as many addresses are known to be there, and some message ids are quoted
    assert sum(times == 1 for times in found.values()) > 305


@pytest.mark.parametrize(
    ("text", "expected", "found"),
    [
        ("mail ann.b+c@mail.example.org.", "mail <address>.", ["ann.b+c@mail.example.org"]),
        ("(ann@example.org), <bob@b.de>", "(<address>), <<address>>", ["ann@example.org", "bob@b.de"]),
        ("a@b.c says a@b.c", "<address> says <address>", ["a@b.c"]),
        ("user%host@gate.org or x@y@z.org", "<address> or <address>", ["user%host@gate.org", "x@y@z.org"]),
        ("try host!relay!user today!", "try <address> today!", []),
        ('"o\'neil@example.org"', '"o\'<address>"', ["neil@example.org"]),
        ("write to ann @ home; or else", "write to <address> or else", []),
        ("at last, 5!", "at last, 5!", []),
    ],
)
def test_masking(text, expected, found):
    assert posts.mask_addresses(text) == expected
    assert posts.addresses(text) == found
