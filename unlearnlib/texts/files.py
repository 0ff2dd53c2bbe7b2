"""Files of texts, read once, and refused where they are of another kind than they seem.

No error or warning repeats a text. They name the file and the number of the line.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

JSON_LINES, PLAIN = (".jsonl", ".json", ".ndjson"), (".txt", ".text", ".md", "")
BEGINNINGS = {
    "%PDF-": "PDF",
    "{\\rtf": "RTF",
    "<!doctype html": "HTML",
    "<html": "HTML",
    "<?xml": "XML",
    "version https://git-lfs": "a Git LFS pointer",
}
"""How files begin that would pass for plain text, in lower case but for the names of formats."""


@dataclass(frozen=True)
class TextFile:
    """The texts of a file, its name, the SHA-256 of the bytes that were read, and what may be amiss."""

    name: str
    texts: list[str]
    sha256: str
    warnings: list[str]


def read_texts(path: str | Path) -> list[str]:
    """The texts of a file; raises as :func:`read_file`."""
    return read_file(path).texts


def read_file(path: str | Path) -> TextFile:
    """Read a file of texts, UTF-8: JSON lines with a field "text", or plain, with blank lines between texts.

    The ending of its name tells which (``JSON_LINES``, ``PLAIN``); blank lines among JSON lines are passed over.
    Raises FileNotFoundError, or ValueError with the number of the line that is wrong, or for another format.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: give the path of a file of texts")
    if path.suffix.lower() not in JSON_LINES + PLAIN:
        raise ValueError(
            f"{path.name} ends in {path.suffix}, which is read neither as JSON lines nor as plain text: convert "
            "it to one of them, and let its name end in .jsonl or in .txt"
        )
    raw = path.read_bytes()
    try:
        content = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ValueError(f"line {line} of {path.name} is not UTF-8: convert the file's encoding") from None
    if "\0" in content:
        line = content[: content.index("\0")].count("\n") + 1
        raise ValueError(f"line {line} of {path.name} has a zero byte: it is in UTF-16, or no text. Convert it")
    lines = content.replace("\r\n", "\n").split("\n")
    warnings: list[str] = []
    if path.suffix.lower() in JSON_LINES:
        texts = [_json_text(line, i, path.name) for i, line in enumerate(lines, 1) if line.strip()]
    else:
        _refuse_other_formats(content, path.name)
        texts = [text.strip() for text in re.split(r"\n\s*\n", "\n".join(lines)) if text.strip()]
        if len(texts) == 1 and "\n" in texts[0]:
            number = texts[0].count("\n") + 1
            warnings.append(
                f"the {number} lines of {path.name} are read as a single text: where each is a text of its own, "
                "or a row of a table, put blank lines between the texts"
            )
    if not texts:
        raise ValueError(f"{path.name} holds no texts")
    return TextFile(path.name, texts, hashlib.sha256(raw).hexdigest(), warnings)


def _refuse_other_formats(content: str, name: str) -> None:
    start = content.lstrip()
    for beginning, kind in BEGINNINGS.items():
        if start[: len(beginning)].lower() == beginning.lower():
            raise ValueError(f"{name} is {kind} and no plain text: take the text out of it first")
    if start.startswith(("{", "[")) and (
        _is_json(start) or _is_json(start.partition("\n")[0].rstrip().rstrip(","))
    ):
        raise ValueError(
            f'{name} is JSON: write one object with the field "text" a line, and let its name end in .jsonl'
        )


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _json_text(line: str, number: int, name: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, TypeError, KeyError, RecursionError):
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
