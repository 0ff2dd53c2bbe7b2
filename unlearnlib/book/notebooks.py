"""Run the book's notebooks by papermill, in parallel, and only those whose inputs changed.

A notebook's executed copy is put into ``_build/<profile>/notebooks`` once it has run to its end. What
papermill wrote on the way, and what its process printed, stays in ``_build/<profile>/logs``. A notebook that
fails, or takes longer than any should, stops; the others run.
"""

import contextlib
import os
import platform
import re
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import nbformat
import papermill
import psutil
import yaml

from unlearnlib.cache import atomic_file, file_hash, json_hash

# GiB of memory to reckon with for each notebook that runs at a time, by profile. At cpu chapter 07 takes 18, those
# beside it no more than 2. A notebook of the gpu profile has the machine to itself.
MEMORY = {"quick": 5.0, "cpu": 11.0, "gpu": float("inf")}
THREADS = 1  # per notebook: over more threads, sums come out in another order, and so do the numbers
# Logits take some MiB. By default glibc gives so much back to the system at once, only to ask for it again, which
# costs a training step one sixth of its time. Other C libraries do not know these variables.
MEMORY_POOL = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**29)}
PROGRESS_SECONDS = 30.0
# A notebook that takes so long, several times what it takes on a slow machine, hangs and is stopped; by profile.
LIMIT_SECONDS = {"quick": 3600.0, "cpu": 8 * 3600.0, "gpu": 24 * 3600.0}

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


@dataclass(frozen=True)
class Job:
    """One notebook to run at one profile: what goes in, and the hash of all that matters."""

    source: Path
    build: Path
    parameters: dict[str, str]
    key: str

    @property
    def output(self) -> Path:
        """Where the executed notebook goes when it has run to its end."""
        return self.build / "notebooks" / self.source.name

    @property
    def draft(self) -> Path:
        """Where papermill writes, cell by cell."""
        return self.build / "logs" / self.source.name

    @property
    def log(self) -> Path:
        """What the process printed."""
        return self.draft.with_suffix(".log")


@dataclass
class Run:
    """A notebook being executed by a process of its own."""

    job: Job
    process: subprocess.Popen
    log: IO[bytes]
    started: float

    @property
    def seconds(self) -> float:
        """How long it has been running."""
        return time.monotonic() - self.started


def listed_notebooks(root: Path) -> list[Path]:
    """Return the notebooks that ``_toc.yml`` lists, in its order, as paths under ``root``.

    Raises FileNotFoundError where a listed notebook or ``_toc.yml`` itself does not exist.
    """
    toc = yaml.safe_load((root / "_toc.yml").read_text(encoding="utf-8"))
    paths = [root / f"{name}.ipynb" for name in _files(toc) if name.startswith("notebooks/")]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"_toc.yml lists notebooks that do not exist: {', '.join(missing)}")
    return paths


def plan(root: Path, profile: str, only: Sequence[str] = ()) -> list[Job]:
    """Return a job for each listed notebook, or for those named in ``only`` (file names without ending).

    Raises ValueError for an unknown profile, an unknown name in ``only``, or a notebook that lacks a
    parameter the runner sets: papermill itself would only warn, and run it with other settings.
    """
    if profile not in MEMORY:
        raise ValueError(f"unknown profile {profile!r}: choose one of {', '.join(MEMORY)}")
    notebooks = {path.stem: path for path in listed_notebooks(root)}
    unknown = set(only) - notebooks.keys()
    if unknown:
        raise ValueError(f"no notebook {', '.join(sorted(unknown))}: choose from {', '.join(notebooks)}")
    build = root / "_build" / profile
    parameters = {"profile": profile, "results": f"../_build/{profile}/results"}
    shared = _shared_inputs(root)
    jobs = []
    for source in (notebooks[name] for name in dict.fromkeys(only or notebooks)):
        _check_parameters(source, parameters)
        jobs.append(Job(source, build, parameters, json_hash([shared, parameters, file_hash(source)])))
    return jobs


def is_done(job: Job) -> bool:
    """Tell whether the executed notebook exists, can be read and was made from these very inputs."""
    try:
        notebook = _notebook(job.output)
        nbformat.validate(notebook)
        return notebook.metadata.unlearnlib.key == job.key
    except Exception:  # missing, cut short, not a notebook: whatever it is, it has to be made again
        return False


def run_notebooks(
    root: Path, profile: str, only: Sequence[str] = (), say: Callable[[str], None] = print
) -> dict[str, str]:
    """Execute every notebook that is not done; return what failed: by notebook the cell and the exception.

    A failure does not stop the other notebooks. An interruption stops everything started here. Ends with a table
    of the minutes that each notebook took, now or when it was run.
    Raises ValueError and FileNotFoundError as :func:`plan` does.
    """
    jobs = plan(root, profile, only)
    waiting = deque(job for job in jobs if not is_done(job))
    at_once = _notebooks_at_once(profile)
    say(f"{len(jobs)} notebooks at profile {profile}: {len(waiting)} to run, {at_once} at a time")
    for folder in ("logs", "notebooks", "results"):
        (root / "_build" / profile / folder).mkdir(parents=True, exist_ok=True)
    running: list[Run] = []
    failures: dict[str, str] = {}
    last_progress = time.monotonic()
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                say(f"{waiting[0].source.stem}: started")
                running.append(_start(waiting.popleft()))
            time.sleep(0.1)
            for run in list(running):
                late = run.seconds > LIMIT_SECONDS[profile]
                if late:
                    _stop(run)
                if run.process.poll() is not None:
                    failures |= _finish(run, say, late)
                    running.remove(run)
            if time.monotonic() - last_progress > PROGRESS_SECONDS:
                last_progress = time.monotonic()
                for run in running:
                    say(f"{run.job.source.stem}: {_progress(run.job)}, {run.seconds:.0f} s")
    finally:
        for run in running:
            _stop(run)
    say(timetable(jobs))
    return failures


def timetable(jobs: Sequence[Job]) -> str:
    """The minutes that each of ``jobs`` took when it was run to its end, and their sum, a line each."""
    minutes = {
        job.source.stem: _notebook(job.output).metadata.papermill.duration / 60 for job in jobs if is_done(job)
    }
    rows = [*minutes.items(), ("together", sum(minutes.values()))]
    return "\n".join(["minutes a chapter took, on one core:", *(f"{value:7.1f}  {name}" for name, value in rows)])


def _files(node: object) -> list[str]:
    """Return every ``file`` in a table of contents, in reading order."""
    if isinstance(node, list):
        return [name for item in node for name in _files(item)]
    if isinstance(node, dict):
        return [node["file"], *_files(list(node.values()))] if "file" in node else _files(list(node.values()))
    return []


def _shared_inputs(root: Path) -> dict[str, str]:
    """Return what every notebook depends on: library, packages, reference results, kind of machine."""
    files = [*root.glob("unlearnlib/**/*.py"), *root.glob("requirements.txt"), *root.glob("book/results/*.csv")]
    inputs = {path.relative_to(root).as_posix(): file_hash(path) for path in files}
    return inputs | {"python": platform.python_version(), "machine": f"{sys.platform} {platform.machine()}"}


def _check_parameters(source: Path, parameters: dict[str, str]) -> None:
    unknown = parameters.keys() - papermill.inspect_notebook(str(source)).keys()
    if unknown:
        names = ", ".join(sorted(unknown))
        raise ValueError(f"{source.name} has no parameter {names}: define it in the cell tagged 'parameters'")


def _notebooks_at_once(profile: str) -> int:
    memory = psutil.virtual_memory().total / 2**30
    return max(1, min((os.cpu_count() or 1) // THREADS, int(memory / MEMORY[profile])))


def _environment(root: Path, profile: str) -> dict[str, str]:
    """Return a notebook's environment variables, fixed where they could change a number or a figure."""
    fixed = {
        "OMP_NUM_THREADS": str(THREADS),
        "MKL_NUM_THREADS": str(THREADS),
        "OPENBLAS_NUM_THREADS": str(THREADS),
        "PYTHONHASHSEED": "0",
        "TOKENIZERS_PARALLELISM": "false",
        **MEMORY_POOL,
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "PYTHONPATH": str(root),  # the library whose hash is in the key
        "JUPYTER_PREFER_ENV_PATH": "1",  # our kernel, not one of the same name in the home folder
    }
    if profile != "gpu":
        fixed |= {name: "1" for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")}
    return os.environ | fixed


def _start(job: Job) -> Run:
    """Start papermill in the notebook's folder, with relative paths: none of this machine's gets written."""
    folder = job.source.parent
    command = [sys.executable, "-m", "papermill", job.source.name, os.path.relpath(job.draft, folder)]
    command += ["--kernel", "python3", "--log-output", "--no-progress-bar", "--autosave-cell-every", "0"]
    for name, value in job.parameters.items():
        command += ["-r", name, value]
    job.draft.unlink(missing_ok=True)
    log = open(job.log, "wb")  # noqa: SIM115 (closed when the run ends)
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=_environment(folder.parent, job.parameters["profile"]),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C reaches only us, and we stop it
    )
    return Run(job, process, log, time.monotonic())


def _finish(run: Run, say: Callable[[str], None], late: bool) -> dict[str, str]:
    """Keep the executed notebook of a process that ended well; return what is wrong with one that did not."""
    run.log.close()
    name = run.job.source.stem
    if run.process.returncode == 0:
        _keep(run.job)
        say(f"{name}: done in {run.seconds:.0f} s")
        return {}
    say(f"{name}: FAILED after {run.seconds:.0f} s")
    stopped = f"stopped after {run.seconds / 60:.0f} minutes, {_progress(run.job)}"
    return {name: stopped if late else _what_failed(run.job)}


def _keep(job: Job) -> None:
    """Sign the executed notebook with its key and put it where :func:`is_done` looks, in one step."""
    notebook = _notebook(job.draft)
    _hide_parameters(notebook)
    notebook.metadata["unlearnlib"] = {"key": job.key}
    with atomic_file(job.output) as temporary:
        nbformat.write(notebook, temporary)


def failed_page(job: Job, reason: str) -> nbformat.NotebookNode:
    """What to show of a notebook that failed: the reason, all of its prose, and its outputs as far as it got."""
    notebook = _notebook(job.draft if _started_cells(job) else job.source)
    notebook.cells = [cell for cell in notebook.cells if "papermill-error-cell-tag" not in _tags(cell)]
    _hide_parameters(notebook)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    glued = {output.get("metadata", {}).get("scrapbook", {}).get("name") for output in outputs}
    for output in outputs:
        if output.output_type == "error":  # the traceback is in the log, and names folders of this machine
            output.traceback = [f"{output.ename}: {output.evalue}"]
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = GLUED.sub(lambda use: use[0] if use[1] in glued else "(not computed)", cell.source)
    # Indented by four, what looks like the end of the box or of the block within does not end it.
    note = FAILED.format(re.sub(r"^ {0,3}(?=:::|~~~)", "    ", reason, flags=re.M))
    heading = re.compile(r"^# .*$", re.M)
    prose = (cell for cell in notebook.cells if cell.cell_type == "markdown")
    title = next((cell for cell in prose if heading.search(cell.source)), None)
    if title is None:
        notebook.cells.insert(0, nbformat.v4.new_markdown_cell(f"# {job.source.stem}{note}"))
    else:
        title.source = heading.sub(lambda line: line[0] + note, title.source, count=1)
    return notebook


def _notebook(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def _tags(cell: nbformat.NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def _hide_parameters(notebook: nbformat.NotebookNode) -> None:
    for cell in notebook.cells:
        tags = _tags(cell)
        if "parameters" in tags:
            tags.append("remove-cell")  # the page shows what the run had, not the notebook's defaults
        if "injected-parameters" in tags:
            tags.append("hide-input")


def _stop(run: Run) -> None:
    """End papermill, its kernel, which sits in a session of its own, and whatever the kernel started."""
    if run.process.poll() is None:
        papermill_process = psutil.Process(run.process.pid)
        for process in [*papermill_process.children(recursive=True), papermill_process]:
            with contextlib.suppress(psutil.NoSuchProcess):  # it has ended by itself meanwhile
                process.kill()
        run.process.wait()
    run.log.close()


def _progress(job: Job) -> str:
    """The cell under way and, where it draws one, its progress bar: the last in the log of what it prints."""
    started = _started_cells(job)
    if not started:
        return "starting"
    printed = job.log.read_text(encoding="utf-8", errors="replace").rpartition("Executing Cell")[2]
    bars = re.findall(r"([^\r\n]*?): +(\d+%)\|[^\r\n|]*\| *(\S+)", printed)
    bar = " {}: {} ({})".format(*bars[-1]) if bars else ""
    return f"at cell {len(started)} ({_first_line(started[-1])}){bar}"


def _what_failed(job: Job) -> str:
    """Name the cell and the exception that ended it, or else the last thing the process printed."""
    started = _started_cells(job)
    if not started:
        return _last_line(job.log)
    errors = [output for output in started[-1].get("outputs", []) if output.output_type == "error"]
    reason = f"{errors[0].ename}: {errors[0].evalue}" if errors else _last_line(job.log)
    return f"cell {len(started)} ({_first_line(started[-1])}) {reason}"


def _started_cells(job: Job) -> list[nbformat.NotebookNode]:
    """Return the notebook's own cells as far as papermill got; the last one runs, or made it stop."""
    added = {"injected-parameters", "papermill-error-cell-tag"}
    try:
        cells = _notebook(job.draft).cells
    except Exception:  # not written yet, or read in the middle of a write
        return []
    own = [cell for cell in cells if not added & set(_tags(cell))]
    return [cell for cell in own if cell.metadata.get("papermill", {}).get("start_time")]


def _first_line(cell: nbformat.NotebookNode) -> str:
    return (cell.source.strip().splitlines() or [""])[0]


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "ended without a word"
