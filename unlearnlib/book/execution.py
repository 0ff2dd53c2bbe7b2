"""Execute a notebook by papermill in a process of its own: how far it is, what it failed of, how to stop it.

Its executed copy is put into ``_build/<profile>/notebooks`` once it has run to its end. What papermill wrote on
the way, and what its process printed, stays in ``_build/<profile>/logs``.
"""

import contextlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
from nbformat import NotebookNode

from unlearnlib.book.notebooks import Job
from unlearnlib.cache import atomic_file

LIBRARY = Path(__file__).parents[2]
"""Where a notebook finds the library: the one whose hash is in the key."""


class Execution:
    """A notebook being executed. It is to be stopped, or finished once it has ended."""

    def __init__(self, job: Job) -> None:
        """Start papermill in the notebook's folder, with relative paths: none of this machine's gets written."""
        folder = job.notebook.parent
        command = [sys.executable, "-m", "papermill", job.notebook.name, os.path.relpath(job.draft, folder)]
        command += ["--kernel", "python3", "--log-output", "--no-progress-bar", "--autosave-cell-every", "0"]
        for name, value in job.parameters.items():
            command += ["-r" if isinstance(value, str) else "-p", name, str(value)]
        job.draft.unlink(missing_ok=True)
        self.job = job
        self.started = time.monotonic()
        self.stopped = ""
        with open(job.log, "wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env=os.environ | job.environment | {"PYTHONPATH": str(LIBRARY)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches only us, and we stop it
            )

    @property
    def seconds(self) -> float:
        """How long it has been running."""
        return time.monotonic() - self.started

    @property
    def ended(self) -> bool:
        """Whether it has ended, well or not."""
        return self.process.poll() is not None

    def progress(self) -> str:
        """The cell under way and, where it draws one, its progress bar: the last in the log of what it prints."""
        started = started_cells(self.job)
        if not started:
            return "starting"
        printed = self.job.log.read_text(encoding="utf-8", errors="replace").rpartition("Executing Cell")[2]
        bars = re.findall(r"([^\r\n]*?): +(\d+%)\|[^\r\n|]*\| *(\S+)", printed)
        bar = " {}: {} ({})".format(*bars[-1]) if bars else ""
        return f"at cell {len(started)} ({_first_line(started[-1])}){bar}"

    def finish(self) -> str | None:
        """Put the executed notebook where it belongs, signed by its key; or return what made it fail.

        That is why it was stopped, or the cell and the exception that ended it, or else the last thing printed.
        """
        if self.process.returncode == 0:
            executed = nbformat.read(self.job.draft, as_version=4)
            hide_parameters(executed)
            executed.metadata["unlearnlib"] = {"key": self.job.key}
            with atomic_file(self.job.output) as temporary:
                nbformat.write(executed, temporary)
            return None
        if self.stopped:
            return self.stopped
        started = started_cells(self.job)
        if not started:
            return _last_line(self.job.log)
        errors = [output for output in started[-1].get("outputs", []) if output.output_type == "error"]
        reason = f"{errors[0].ename}: {errors[0].evalue}" if errors else _last_line(self.job.log)
        return f"cell {len(started)} ({_first_line(started[-1])}) {reason}"

    def stop(self, why: str = "") -> None:
        """End papermill, its kernel, which sits in a session of its own, and whatever the kernel started."""
        self.stopped = why
        if not self.ended:
            papermill = psutil.Process(self.process.pid)
            for process in [*papermill.children(recursive=True), papermill]:
                with contextlib.suppress(psutil.NoSuchProcess):  # it has ended by itself meanwhile
                    process.kill()
            self.process.wait()


def started_cells(job: Job) -> list[NotebookNode]:
    """Return the notebook's own cells as far as papermill got; the last one runs, or made it stop."""
    added = {"injected-parameters", "papermill-error-cell-tag"}
    try:
        cells = nbformat.read(job.draft, as_version=4).cells
    except Exception:  # not written yet, or read in the middle of a write
        return []
    own = [cell for cell in cells if not added & set(tags(cell))]
    return [cell for cell in own if cell.metadata.get("papermill", {}).get("start_time")]


def hide_parameters(executed: NotebookNode) -> None:
    """Tag the cells of parameters: a page shows what the run had, and not the notebook's defaults."""
    for cell in executed.cells:
        if "parameters" in tags(cell):
            cell.metadata.tags.append("remove-cell")
        if "injected-parameters" in tags(cell):
            cell.metadata.tags.append("hide-input")


def tags(cell: NotebookNode) -> list[str]:
    """The tags of a cell."""
    return cell.metadata.get("tags", [])


def _first_line(cell: NotebookNode) -> str:
    return (cell.source.strip().splitlines() or [""])[0]


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "ended without a word"
