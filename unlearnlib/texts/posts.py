"""200 real newsgroup posts of 1993, for what a model memorises of real people; their addresses are never shown.

The posts are a small part of 20 Newsgroups (probably of Lang 1995; no licence is stated), which is among the test
data in the wheel of gensim, as an old pickle. The pickle is taken apart and never loaded: loading one runs code.
"""

import email
import pickletools
import re
import zlib
from typing import Any

from unlearnlib.texts.wheels import GENSIM, read_member

MASK = "<address>"
_PART = r"[^\s<>()\[\]{}\"',;:|\\@]+"
_ADDRESS = re.compile(rf"(?:{_PART}@)+{_PART}(?<=\w)")
# Before the present form of addresses there was the path of machines to a user, such as host!relay!user.
_PATH = re.compile(r"[\w.%-]+(?:![\w.%-]+)+")
_AT = re.compile(r"[^\s<>]* ?@ ?[^\s<>]*")


def load_posts() -> list[dict[str, Any]]:
    """The posts in the order of their source, rows of ``id`` (such as ``posts/00042``), ``group`` and ``text``.

    ``text`` is the subject, the sender and the body. The subject is first, so that something leads to the sender's
    address; the other headers are dropped, and so are empty lines and repeated blanks.
    Raises DownloadError if the wheel of gensim is not on this computer and cannot be fetched.
    """
    pickled = zlib.decompress(read_member(GENSIM, "gensim/test/test_data/mini_newsgroup"))
    return [
        {"id": f"posts/{i:05d}"} | _row(raw)
        for i, raw in enumerate(text for code, text, _ in pickletools.genops(pickled) if code.name == "UNICODE")
    ]


def addresses(text: str) -> list[str]:
    """The e-mail addresses in ``text``, in order of first appearance; message ids look the same and count too."""
    return list(dict.fromkeys(_ADDRESS.findall(text)))


def mask_addresses(text: str) -> str:
    """``text`` with ``<address>`` in place of every e-mail address. Whatever is shown of a post goes through this.

    No at sign is left: one that is in no address takes its neighbours with it, for addresses get broken or spaced.
    Names of people stay, so show no more of a real post than is needed.
    """
    for pattern in (_ADDRESS, _PATH, _AT):
        text = pattern.sub(MASK, text)
    return text


def _row(raw: str) -> dict[str, str]:
    post = email.message_from_string(raw)
    lines = [f"Subject: {post['Subject']}", f"From: {post['From']}"]
    lines = [" ".join(line.split()) for line in [*lines, *post.get_payload().split("\n")]]
    return {"group": post["Newsgroups"].partition(",")[0].strip(), "text": "\n".join(filter(None, lines))}
