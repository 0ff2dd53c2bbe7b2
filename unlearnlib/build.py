"""Make the book: run its notebooks, then render them and the prose (``python -m unlearnlib.build``)."""

import argparse
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from unlearnlib.cache import atomic_file, file_hash, json_hash, lock
from unlearnlib.notebooks import MEMORY, listed_notebooks, run_notebooks


class BuildError(Exception):
    """The book could not be made; the message says which chapter, cell or page is at fault."""


def make_book(root: Path, profile: str) -> Path:
    """Run every notebook that is not up to date, render the book, and return its first page.

    Raises BuildError where a notebook fails or a page has a warning, and ValueError for an unknown profile or
    a notebook without the runner's parameters.
    """
    with lock(root / "_build" / "book"):
        execute(root, profile)
        return render(root, profile)


def execute(root: Path, profile: str, only: Sequence[str] = ()) -> None:
    """Run the notebooks, or those named in ``only``. Raises BuildError if any of them fails."""
    failures = run_notebooks(root, profile, only, say=_say)
    if failures:
        raise BuildError("\n".join(["these notebooks failed:", *failures]))


def render(root: Path, profile: str) -> Path:
    """Render the executed notebooks and the prose, unless nothing changed; return the first page.

    Every warning is an error. Raises BuildError with the warnings.
    """
    build = root / "_build" / profile
    staged = _stage(root, build)
    site, signature = build / "site", build / "site.key"
    index = site / "_build" / "html" / "index.html"
    key = json_hash({path.relative_to(staged).as_posix(): file_hash(path) for path in _all_files(staged)})
    if index.is_file() and signature.is_file() and signature.read_text() == key:
        _say("pages: nothing changed")
        return index
    _say("pages: rendering")
    signature.unlink(missing_ok=True)
    shutil.rmtree(site, ignore_errors=True)  # else pages of chapters since removed would stay
    _run_jupyter_book(staged, site, build / "logs" / "pages.log")
    with atomic_file(signature) as temporary:
        temporary.write_text(key)
    return index


def _stage(root: Path, build: Path) -> Path:
    """Lay out what Jupyter Book reads: as in the repository, but with the executed notebooks."""
    staged = build / "site-source"
    shutil.rmtree(staged, ignore_errors=True)
    shutil.copytree(root / "book", staged / "book")
    for name in ("_config.yml", "_toc.yml", "requirements.txt"):
        shutil.copy2(root / name, staged / name)
    (staged / "notebooks").mkdir()
    for notebook in listed_notebooks(root):
        shutil.copy2(build / "notebooks" / notebook.name, staged / "notebooks")
    return staged


def _all_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _run_jupyter_book(staged: Path, site: Path, log: Path) -> None:
    jupyter_book = Path(sys.executable).with_name("jupyter-book")
    command = [jupyter_book, "build", staged, "--all", "-n", "-W", "--keep-going", "--path-output", site]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    printed = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)  # without its colours
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(printed)
    if done.returncode:
        words = ("WARNING", "ERROR", "CRITICAL", "Error")
        complaints = [line for line in printed.splitlines() if any(word in line for word in words)]
        raise BuildError("\n".join(["rendering failed:", *(complaints or [printed]), f"(log: {log})"]))


def _say(message: str) -> None:
    print(message, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the book in the current folder. The exit code is 0 only if everything worked."""
    parser = argparse.ArgumentParser(prog="python -m unlearnlib.build", description=main.__doc__)
    parser.add_argument("--profile", default="quick", choices=MEMORY, help="settings (default: quick)")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NOTEBOOK", help="run just these, and render nothing"
    )
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what we started is stopped as on Ctrl-C
    root = Path.cwd()
    try:
        if options.only:
            with lock(root / "_build" / "book"):
                execute(root, options.profile, options.only)
        else:
            _say(f"The book is at {make_book(root, options.profile)}")
    except (BuildError, ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing unfinished was kept", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
