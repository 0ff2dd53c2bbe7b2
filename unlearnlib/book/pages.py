"""The pages: lay out prose and executed notebooks, failed ones with a note, and render them by Jupyter Book."""

import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat
import yaml
from nbformat import NotebookNode

from unlearnlib.book import moving
from unlearnlib.book.execution import hide_parameters, started_cells, tags
from unlearnlib.book.notebooks import Job, plan
from unlearnlib.book.parameters import parameters_table
from unlearnlib.cache import atomic_file, file_hash, json_hash

GLUED = re.compile(r"{glue:\w+}`([^`:]+)(?::[^`]*)?`")
FAILED = """

:::{{error}}
This chapter could not be computed to its end when the book was made:

~~~~text
{}
~~~~

What it shows was computed before that. Numbers that are missing read "(not computed)".
:::
"""


class BuildError(Exception):
    """The book could not be made; the message says which chapter, cell or page is at fault."""


def render(root: Path, profile: str, failures: dict[str, str]) -> Path:
    """Render the executed notebooks and the prose, unless nothing changed; return the first page.

    ``failures`` are the notebooks that did not run to their end, and why. Without any, every warning is an error:
    raises BuildError with the warnings. A failed notebook lacks figures that the pages refer to.
    """
    build = root / "_build" / profile
    staged = _stage(root, build, plan(root, profile), failures)
    site, signature = build / "site", build / "site.key"
    index = site / "_build" / "html" / "index.html"
    files = {path.relative_to(staged).as_posix(): file_hash(path) for path in _all_files(staged)}
    key = json_hash(files | {"vega": moving.VERSION})
    if index.is_file() and signature.is_file() and signature.read_text() == key:
        print("pages: nothing changed")
        return index
    print("pages: rendering")
    signature.unlink(missing_ok=True)
    shutil.rmtree(site, ignore_errors=True)  # else pages of chapters since removed would stay
    static = staged / "book" / "_static"
    static.mkdir(exist_ok=True)
    (static / "vega.js").write_text(moving.script(), encoding="utf-8")
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
    table = parameters_table([job.notebook for job in jobs])
    (staged / "book" / "parameters.txt").write_text(table, encoding="utf-8")  # which book/papermill.md includes
    (staged / "notebooks").mkdir()
    for job in jobs:
        if job.name in failures:
            nbformat.write(failed_page(job, failures[job.name]), staged / "notebooks" / job.notebook.name)
        else:
            shutil.copy2(job.output, staged / "notebooks")
    return staged


def failed_page(job: Job, reason: str) -> NotebookNode:
    """What to show of a notebook that failed: the reason, all of its prose, and its outputs as far as it got."""
    page = nbformat.read(job.draft if started_cells(job) else job.notebook, as_version=4)
    page.cells = [cell for cell in page.cells if "papermill-error-cell-tag" not in tags(cell)]
    hide_parameters(page)
    outputs = [output for cell in page.cells for output in cell.get("outputs", [])]
    glued = {output.get("metadata", {}).get("scrapbook", {}).get("name") for output in outputs}
    for output in outputs:
        if output.output_type == "error":  # the traceback is in the log, and names folders of this machine
            output.traceback = [f"{output.ename}: {output.evalue}"]
    for cell in page.cells:
        if cell.cell_type == "markdown":
            cell.source = GLUED.sub(lambda use: use[0] if use[1] in glued else "(not computed)", cell.source)
    # Indented by four, what looks like the end of the box or of the block within does not end it.
    note = FAILED.format(re.sub(r"^ {0,3}(?=:::|~~~)", "    ", reason, flags=re.M))
    heading = re.compile(r"^# .*$", re.M)
    prose = (cell for cell in page.cells if cell.cell_type == "markdown")
    title = next((cell for cell in prose if heading.search(cell.source)), None)
    if title is None:
        page.cells.insert(0, nbformat.v4.new_markdown_cell(f"# {job.name}{note}"))
    else:
        title.source = heading.sub(lambda line: line[0] + note, title.source, count=1)
    return page


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
