"""The user cache: where it is, and how anything gets into it whole or not at all."""

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import platformdirs


def cache_folder() -> Path:
    """The folder for downloads and trained models: ``$UNLEARNLIB_CACHE``, or else the user's cache folder."""
    chosen = os.environ.get("UNLEARNLIB_CACHE")
    folder = Path(chosen) if chosen else platformdirs.user_cache_path("unlearnlib")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, as hexadecimal text."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_hash(value: Any) -> str:
    """SHA-256 of a JSON-serialisable value, independent of the order of its keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; it takes the name ``path`` only if the block succeeds.

    A process killed inside the block leaves ``path`` as it was, and at worst a stray ``.tmp`` file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; it takes the name ``path`` only if the block succeeds.

    For caches, whose content can be made again: a folder already at ``path`` is replaced. Hold :func:`lock` around
    this where two processes may meet. For what must not be overwritten there is :func:`new_folder`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _flush(file)
        shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; it takes the name ``path`` only if the block succeeds.

    For results: nothing is ever replaced. ``path`` is locked for as long as the block runs, and what killed runs
    have left beside it is removed. Should something come to be at ``path`` in spite of the lock, it stays, and the
    finished folder gets a longer name.

    Raises, before the block, FileExistsError if ``path`` exists, BlockingIOError if another process is making it,
    and OSError if nothing can be written there; after the block FileExistsError, with the longer name.
    """
    missing = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path = path.parent.resolve() / path.name
        _refuse_existing(path)
        temporary = unfinished(path)
        guard = lock(temporary)
        guard.acquire(timeout=0)
    except Busy:
        raise BlockingIOError(f"another run is making {path}: wait for its end, or name another folder") from None
    except OSError as error:
        if error.errno is None:  # our own message
            raise
        raise OSError(f"nothing can be written at {path}: {error}") from error
    try:
        _refuse_existing(path)  # it may have been finished while we came to the lock
        _remove_abandoned(path.parent, temporary)
        temporary.mkdir()
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _flush(file)
        try:
            temporary.rename(path)  # fails if there is a file, or a folder with anything in it
        except OSError as error:
            spare = path.with_name(f"{path.name[:100]}-{uuid.uuid4().hex[:8]}")
            temporary.rename(spare)
            raise FileExistsError(
                f"{path} has come to exist meanwhile and is left as it is: the finished folder is {spare}"
            ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        _unlock(guard)
        with contextlib.suppress(OSError):  # raised for the first one that is not empty
            for folder in missing:
                folder.rmdir()


def unfinished(path: Path) -> Path:
    """The temporary folder of :func:`new_folder` for ``path``, wherever it is asked for."""
    # The name is hashed, since one that is just short enough for the disk would be too long with an ending.
    return path.parent.resolve() / f".unlearnlib-{json_hash(path.name)[:16]}.tmp"


Busy = filelock.Timeout
"""Raised when a lock is taken and there is no time to wait for it."""


def lock(path: Path) -> filelock.FileLock:
    """A lock between processes for whatever lives at ``path``; the operating system frees it if we die."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return filelock.FileLock(f"{path}.lock")


def _refuse_existing(path: Path) -> None:
    """Raise FileExistsError if anything is at ``path``, be it a link that leads nowhere."""
    with contextlib.suppress(FileNotFoundError):
        path.lstat()
        raise FileExistsError(f"the output {path} exists and is never overwritten: name a new folder")


def _remove_abandoned(folder: Path, own: Path) -> None:
    """Remove the temporary folders of :func:`new_folder` in ``folder`` that no living process holds."""
    shutil.rmtree(own, ignore_errors=True)  # its lock is ours
    for held in folder.glob(".unlearnlib-*.tmp.lock"):
        temporary = held.with_suffix("")
        if temporary == own:
            continue
        guard = lock(temporary)
        try:
            guard.acquire(timeout=0)
        except OSError:  # alive, or another user's
            continue
        shutil.rmtree(temporary, ignore_errors=True)
        _unlock(guard)


def _unlock(guard: filelock.FileLock) -> None:
    """Free a lock and remove its file; whoever opened the file before that notices, and makes a new one."""
    with contextlib.suppress(OSError):  # where a file in use cannot be removed
        Path(guard.lock_file).unlink()
    guard.release()


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}-{uuid.uuid4().hex}.tmp")


def _flush(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
