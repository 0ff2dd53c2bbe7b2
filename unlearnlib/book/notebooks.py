"""The book's notebooks: which there are, what each depends on, and whether it has been run since that changed."""

import platform
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import papermill
from sphinx_external_toc.parsing import parse_toc_yaml

from unlearnlib.book.imports import imported_files
from unlearnlib.cache import file_hash, json_hash
from unlearnlib.verdicts.results import REFERENCE_PROFILE

PROFILES = ("quick", "cpu", "gpu")
THREADS = 1  # per notebook: over more threads, sums come out in another order, and so do the numbers
# Logits take some MiB. By default glibc gives so much back to the system at once, only to ask for it again, which
# costs a training step one sixth of its time. Other C libraries do not know these variables.
MEMORY_POOL = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**29)}
READS_REFERENCE = re.compile(r"\bREFERENCE\b|\bbook/results\b")
"""How code names the committed results. At their own profile every chapter compares itself with them."""


@dataclass(frozen=True)
class Job:
    """One notebook to run at one profile: what goes in, and the hash of all that matters.

    ``label`` tells jobs of the same notebook apart.
    """

    notebook: Path
    build: Path
    parameters: dict[str, Any]
    environment: dict[str, str]
    key: str
    label: str = ""

    @property
    def name(self) -> str:
        """The notebook's file name without its ending, and the label if there is one."""
        return f"{self.notebook.stem} {self.label}".rstrip()

    @property
    def output(self) -> Path:
        """Where the executed notebook goes when it has run to its end."""
        return self.build / "notebooks" / self.notebook.name

    @property
    def draft(self) -> Path:
        """Where papermill writes, cell by cell."""
        return self.build / "logs" / self.notebook.name

    @property
    def log(self) -> Path:
        """What the process printed."""
        return self.draft.with_suffix(".log")


def listed_notebooks(root: Path) -> list[Path]:
    """Return the notebooks that ``_toc.yml`` lists, in its order, as paths under ``root``.

    Raises FileNotFoundError where a listed notebook or ``_toc.yml`` itself does not exist.
    """
    pages = parse_toc_yaml(root / "_toc.yml")
    paths = [root / f"{name}.ipynb" for name in pages if name.startswith("notebooks/")]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"_toc.yml lists notebooks that do not exist: {', '.join(missing)}")
    return paths


def plan(root: Path, profile: str, only: Sequence[str] = ()) -> list[Job]:
    """Return a job for each listed notebook, or for those named in ``only`` (file names without ending).

    Raises ValueError for an unknown profile, an unknown name in ``only``, or a notebook that lacks a
    parameter we set: papermill itself would only warn, and run it with other settings.
    """
    if profile not in PROFILES:
        raise ValueError(f"unknown profile {profile!r}: choose one of {', '.join(PROFILES)}")
    notebooks = {path.stem: path for path in listed_notebooks(root)}
    unknown = set(only) - notebooks.keys()
    if unknown:
        raise ValueError(f"no notebook {', '.join(sorted(unknown))}: choose from {', '.join(notebooks)}")
    parameters = {"profile": profile, "results": f"../_build/{profile}/results"}
    environment = _environment(profile)
    jobs = []
    for notebook in (notebooks[name] for name in dict.fromkeys(only or notebooks)):
        _check_parameters(notebook, parameters)
        key = json_hash([parameters, environment, _inputs(root, notebook, profile)])
        jobs.append(Job(notebook, root / "_build" / profile, parameters, environment, key))
    return jobs


def is_done(job: Job) -> bool:
    """Tell whether the executed notebook exists, can be read and was made from these very inputs."""
    try:
        executed = nbformat.read(job.output, as_version=4)
        nbformat.validate(executed)
        return executed.metadata.unlearnlib.key == job.key
    except Exception:  # missing, cut short, not a notebook: whatever it is, it has to be made again
        return False


def timetable(jobs: Sequence[Job]) -> str:
    """The minutes that each of ``jobs`` took when it was run to its end, and their sum, a line each."""
    executed = {job.name: nbformat.read(job.output, as_version=4) for job in jobs if is_done(job)}
    minutes = {name: notebook.metadata.papermill.duration / 60 for name, notebook in executed.items()}
    rows = [*minutes.items(), ("together", sum(minutes.values()))]
    return "\n".join(["minutes a chapter took, on one core:", *(f"{value:7.1f}  {name}" for name, value in rows)])


def _environment(profile: str) -> dict[str, str]:
    """Return the environment variables that could change a number or a figure, fixed."""
    fixed = {
        "OMP_NUM_THREADS": str(THREADS),
        "MKL_NUM_THREADS": str(THREADS),
        "OPENBLAS_NUM_THREADS": str(THREADS),
        "PYTHONHASHSEED": "0",
        "TOKENIZERS_PARALLELISM": "false",
        **MEMORY_POOL,
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "JUPYTER_PREFER_ENV_PATH": "1",  # our kernel, not one of the same name in the home folder
    }
    if profile != "gpu":
        fixed |= {name: "1" for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")}
    return fixed


def _inputs(root: Path, notebook: Path, profile: str) -> dict[str, str]:
    """Hashes of what ``notebook`` depends on: itself, its modules, packages, reference results, machine."""
    content = nbformat.read(notebook, as_version=4)
    modules = imported_files(content)
    files = {"notebook": notebook, **modules}
    files |= {path.name: path for path in root.glob("requirements.txt")}
    # The room of verdicts reads only what it is asked to.
    code = [cell.source for cell in content.cells if cell.cell_type == "code"]
    code += [path.read_text(encoding="utf-8") for path in modules.values() if path.parent.name != "verdicts"]
    if profile == REFERENCE_PROFILE or any(map(READS_REFERENCE.search, code)):
        files |= {path.name: path for path in root.glob("book/results/*.csv")}
    hashes = {name: file_hash(path) for name, path in files.items()}
    return hashes | {"python": platform.python_version(), "machine": f"{sys.platform} {platform.machine()}"}


def _check_parameters(notebook: Path, parameters: dict[str, str]) -> None:
    unknown = parameters.keys() - papermill.inspect_notebook(str(notebook)).keys()
    if unknown:
        names = ", ".join(sorted(unknown))
        raise ValueError(f"{notebook.name} has no parameter {names}: define it in the cell tagged 'parameters'")
