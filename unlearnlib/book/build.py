"""Make the book: run its notebooks, then render them and the prose (``python -m unlearnlib.book.build``)."""

import argparse
import contextlib
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nbformat
import yaml

from unlearnlib.book.notebooks import MEMORY, Job, failed_page, plan, run_notebooks
from unlearnlib.cache import Busy, atomic_file, file_hash, json_hash, lock
from unlearnlib.verdicts.results import REFERENCE_PROFILE, disagreements


class BuildError(Exception):
    """The book could not be made; the message says which chapter, cell or page is at fault."""


def make_book(root: Path, profile: str) -> Path:
    """Run every notebook that is not up to date, render the book, and return its first page.

    Raises BuildError where a page has a warning, and after all pages are made where a notebook fails, whose page
    says so, or where results are not those of the reference. Raises ValueError for an unknown profile or a
    notebook without the runner's parameters.
    """
    with _alone(root):
        failures = run_notebooks(root, profile, say=_say)
        failed = f"{_failed(root, profile, failures)}\n" if failures else ""
        try:
            index = render(root, profile, failures)
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
        _say("another build is at work in this folder: waiting for it")
        building.acquire()
    try:
        yield
    finally:
        building.release()


def execute(root: Path, profile: str, only: Sequence[str]) -> None:
    """Run the notebooks named in ``only``. Raises BuildError if any of them fails."""
    failures = run_notebooks(root, profile, only, say=_say)
    if failures:
        raise BuildError(_failed(root, profile, failures))


def _failed(root: Path, profile: str, failures: dict[str, str]) -> str:
    logs = root / "_build" / profile / "logs"
    rows = [f"{name}: {reason} (log: {logs / name}.log)" for name, reason in failures.items()]
    return "\n".join(["these notebooks failed:", *rows])


def render(root: Path, profile: str, failures: dict[str, str]) -> Path:
    """Render the executed notebooks and the prose, unless nothing changed; return the first page.

    ``failures`` are the notebooks that did not run to their end, and why. Without any, every warning is an error:
    raises BuildError with the warnings. A failed notebook lacks figures that the pages refer to.
    """
    build = root / "_build" / profile
    staged = _stage(root, build, plan(root, profile), failures)
    site, signature = build / "site", build / "site.key"
    index = site / "_build" / "html" / "index.html"
    key = json_hash({path.relative_to(staged).as_posix(): file_hash(path) for path in _all_files(staged)})
    if index.is_file() and signature.is_file() and signature.read_text() == key:
        _say("pages: nothing changed")
        return index
    _say("pages: rendering")
    signature.unlink(missing_ok=True)
    shutil.rmtree(site, ignore_errors=True)  # else pages of chapters since removed would stay
    _run_jupyter_book(staged, site, build / "logs" / "pages.log", strict=not failures)
    with atomic_file(signature) as temporary:
        temporary.write_text(key)
    return index


def _stage(root: Path, build: Path, jobs: Sequence[Job], failures: dict[str, str]) -> Path:
    """Lay out what Jupyter Book reads: as in the repository, but with the executed notebooks."""
    staged = build / "site-source"
    shutil.rmtree(staged, ignore_errors=True)
    shutil.copytree(root / "book", staged / "book")
    shutil.copy2(root / "_toc.yml", staged)
    config = yaml.safe_load((root / "_config.yml").read_text(encoding="utf-8"))
    (staged / "_config.yml").write_text(yaml.safe_dump(with_repository(config, root)), encoding="utf-8")
    (staged / "notebooks").mkdir()
    for job in jobs:
        name = job.source.stem
        if name in failures:
            nbformat.write(failed_page(job, failures[name]), staged / "notebooks" / job.source.name)
        else:
            shutil.copy2(job.output, staged / "notebooks")
    return staged


def repository(root: Path) -> tuple[str, str] | None:
    """Web address and branch of the repository that the checkout ``root`` was cloned from, by its remote.

    None without a git remote, or where its address is no host's on the web, such as that of a folder.
    """

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", root, *words], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        address, branch = git("remote", "get-url", "origin"), git("branch", "--show-current")
    except FileNotFoundError:  # no git
        return None
    found = re.fullmatch(
        r"(?:https?://|ssh://)?(?:[^@/]*@)?([\w-]+(?:\.[\w-]+)+)(?::\d+)?[:/](.+?)(?:\.git)?/?", address
    )
    return (f"https://{found[1]}/{found[2]}", branch or "main") if found else None


def with_repository(config: dict[str, Any], root: Path) -> dict[str, Any]:
    """The settings, with buttons to the repository, to Binder and to Colab where there is a repository."""
    found = repository(root)
    if found:
        config["repository"] = {"url": found[0], "branch": found[1]}
        config["html"] |= {"use_repository_button": True, "use_issues_button": True}
        if found[0].startswith("https://github.com/"):  # the launch buttons know no other host
            config["launch_buttons"] = {
                "notebook_interface": "jupyterlab",
                "binderhub_url": "https://mybinder.org",
                "colab_url": "https://colab.research.google.com",
            }
    return config


def _all_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _run_jupyter_book(staged: Path, site: Path, log: Path, strict: bool) -> None:
    jupyter_book = Path(sys.executable).with_name("jupyter-book")
    command = [jupyter_book, "build", staged, "--all", "--path-output", site]
    command += ["-n", "-W", "--keep-going"] if strict else []
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    printed = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)  # without its colours
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(printed)
    if done.returncode:
        words = ("WARNING", "ERROR", "CRITICAL", "Error")
        complaints = [line for line in printed.splitlines() if any(word in line for word in words)]
        raise BuildError("\n".join(["rendering failed:", *(complaints or [printed]), f"(log: {log})"]))


def _say(message: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"  # an old terminal has not the letters of every comment
    print(message.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the book in the current folder. The exit code is 0 only if everything worked."""
    parser = argparse.ArgumentParser(prog="python -m unlearnlib.book.build", description=main.__doc__)
    parser.add_argument("--profile", default="quick", choices=MEMORY, help="settings (default: quick)")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NOTEBOOK", help="run just these, and render nothing"
    )
    options = parser.parse_args(arguments)
    for name in ("SIGTERM", "SIGHUP"):  # so that what we started is stopped as on Ctrl-C
        sign = getattr(signal, name, None)  # not every system has a terminal that hangs up
        if sign is not None and signal.getsignal(sign) != signal.SIG_IGN:  # which nohup asks for
            signal.signal(sign, lambda number, _: sys.exit(128 + number))
    root = Path.cwd()
    try:
        if options.only:
            with _alone(root):
                execute(root, options.profile, options.only)
        else:
            _say(f"The book is at {make_book(root, options.profile)}")
    except (BuildError, ValueError, OSError) as error:  # an OSError is a missing file, or a full disk
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing unfinished was kept", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
