"""Make the book: run its notebooks, then render them and the prose (``python -m unlearnlib.book.build``)."""

import argparse
import contextlib
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from unlearnlib.book.notebooks import PROFILES
from unlearnlib.book.pages import BuildError, render
from unlearnlib.book.printing import print_pages, require_chromium
from unlearnlib.book.schedule import run_notebooks
from unlearnlib.cache import Busy, lock
from unlearnlib.verdicts.results import REFERENCE_PROFILE, disagreements


def make_book(root: Path, profile: str, pdf: bool = False) -> Path:
    """Run every notebook that is not up to date, render the book, and return its first page, or its ``pdf``.

    Raises BuildError where a page has a warning, and after all pages are made where a notebook fails, whose page
    says so, or where results are not those of the reference; before anything is made where a PDF is wanted and
    there is no Chromium to print it. Raises ValueError for an unknown profile or a notebook without the runner's
    parameters.
    """
    if pdf:
        require_chromium()
    with _alone(root):
        failures = run_notebooks(root, profile)
        failed = f"{_failed(root, profile, failures)}\n" if failures else ""
        try:
            index = render(root, profile, failures)
            index = print_pages(root, profile) if pdf else index
        except BuildError as error:
            raise BuildError(f"{failed}{error}") from None
    if failed:
        raise BuildError(f"{failed}The other chapters are at {index}")
    found = disagreements(root / "_build" / profile / "results") if profile == REFERENCE_PROFILE else []
    if found:
        rows = ["these results do not agree with those in book/results:", *found]
        raise BuildError("\n".join([*rows, f"If that is meant, replace the files. The book is at {index}"]))
    return index


@contextlib.contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Hold the lock of the build folder, or wait for whoever holds it, and say so."""
    building = lock(root / "_build" / "book")
    try:
        building.acquire(timeout=0)
    except Busy:
        print("another build is at work in this folder: waiting for it")
        building.acquire()
    try:
        yield
    finally:
        building.release()


def execute(root: Path, profile: str, only: Sequence[str]) -> None:
    """Run the notebooks named in ``only``. Raises BuildError if any of them fails."""
    failures = run_notebooks(root, profile, only)
    if failures:
        raise BuildError(_failed(root, profile, failures))


def _failed(root: Path, profile: str, failures: dict[str, str]) -> str:
    logs = root / "_build" / profile / "logs"
    rows = [f"{name}: {reason} (log: {logs / name}.log)" for name, reason in failures.items()]
    return "\n".join(["these notebooks failed:", *rows])


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the book in the current folder. The exit code is 0 only if everything worked."""
    parser = argparse.ArgumentParser(prog="python -m unlearnlib.book.build", description=main.__doc__)
    parser.add_argument("--profile", default="quick", choices=PROFILES, help="settings (default: quick)")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NOTEBOOK", help="run just these, and render nothing"
    )
    parser.add_argument("--pdf", action="store_true", help="print the whole book as well, as one PDF")
    options = parser.parse_args(arguments)
    for name in ("SIGTERM", "SIGHUP"):  # so that what we started is stopped as on Ctrl-C
        sign = getattr(signal, name, None)  # not every system has a terminal that hangs up
        if sign is not None and signal.getsignal(sign) != signal.SIG_IGN:  # which nohup asks for
            signal.signal(sign, lambda number, _: sys.exit(128 + number))
    # An old terminal has not the letters of every comment; and what is said is to be read at once.
    sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    root = Path.cwd()
    try:
        if options.only:
            with _alone(root):
                execute(root, options.profile, options.only)
        else:
            print(f"The book is at {make_book(root, options.profile, options.pdf)}")
    except (BuildError, ValueError, OSError) as error:  # an OSError is a missing file, or a full disk
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing unfinished was kept", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
