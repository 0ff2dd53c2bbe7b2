"""Run the notebooks that are not done, as many at a time as memory allows, and say how far they are."""

import itertools
import os
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from unlearnlib.book.execution import Execution
from unlearnlib.book.notebooks import THREADS, Job, is_done, plan, timetable

# GiB of memory to reckon with for each notebook that runs at a time, by profile. A notebook of the gpu profile has
# the machine to itself. Those at cpu take 2, but for the large ones, of which one at a time runs.
MEMORY = {"quick": 5.0, "cpu": 11.0, "gpu": float("inf")}
LARGE = {"cpu": ("06_fisher", "10_real_model")}
# A notebook that takes so long, several times what it takes on a slow machine, hangs and is stopped; by profile.
LIMIT_SECONDS = {"quick": 3600.0, "cpu": 8 * 3600.0, "gpu": 24 * 3600.0}
PROGRESS_SECONDS = 30.0
# The longest of a profile begin first: one that began last would keep a single core busy at the end.
FIRST = {"cpu": ("18_last_gap", "10_real_model")}


def run_notebooks(
    root: Path, profile: str, only: Sequence[str] = (), at_once: int | None = None
) -> dict[str, str]:
    """Execute every notebook that is not done, as :func:`run_jobs` does.

    Raises ValueError and FileNotFoundError as :func:`unlearnlib.book.notebooks.plan` does.
    """
    return run_jobs(plan(root, profile, only), profile, at_once)


def run_jobs(jobs: Sequence[Job], profile: str, at_once: int | None = None) -> dict[str, str]:
    """Execute every job that is not done; return what failed: by the job's name the cell and the exception.

    So many run ``at_once``, or as many as this machine has room for. A failure does not stop the other notebooks.
    An interruption stops everything started here. Ends with a table of the minutes that each notebook took, now or
    when it was run.
    """
    first = FIRST.get(profile, ())
    waiting = sorted((job for job in jobs if not is_done(job)), key=lambda job: job.name not in first)
    at_once = at_once or notebooks_at_once(profile)
    print(f"{len(jobs)} notebooks at profile {profile}: {len(waiting)} to run, {at_once} at a time")
    for job, folder in itertools.product(jobs, ("logs", "notebooks", "results")):
        (job.build / folder).mkdir(parents=True, exist_ok=True)
    running: list[Execution] = []
    failures: dict[str, str] = {}
    last_progress = time.monotonic()
    try:
        while waiting or running:
            while len(running) < at_once and (job := _next(waiting, running, LARGE.get(profile, ()))):
                waiting.remove(job)
                print(f"{job.name}: started")
                running.append(Execution(job))
            time.sleep(0.1)
            for execution in running:
                if execution.seconds > LIMIT_SECONDS[profile]:
                    execution.stop(f"stopped after {execution.seconds / 60:.0f} minutes, {execution.progress()}")
            for execution in [execution for execution in running if execution.ended]:
                name, seconds, failure = execution.job.name, execution.seconds, execution.finish()
                running.remove(execution)
                print(f"{name}: {'FAILED after' if failure else 'done in'} {seconds:.0f} s")
                if failure:
                    failures[name] = failure
            if time.monotonic() - last_progress > PROGRESS_SECONDS:
                last_progress = time.monotonic()
                for execution in running:
                    print(f"{execution.job.name}: {execution.progress()}, {execution.seconds:.0f} s")
    finally:
        for execution in running:
            execution.stop()
    print(timetable(jobs))
    return failures


def _next(waiting: Sequence[Job], running: Sequence[Execution], large: Sequence[str]) -> Job | None:
    """The first job that may start beside those that are running: never a second one of the ``large``."""
    full = any(execution.job.name in large for execution in running)
    return next((job for job in waiting if not (full and job.name in large)), None)


def notebooks_at_once(profile: str) -> int:
    """How many notebooks the processors and the memory of this machine allow at a time."""
    memory = psutil.virtual_memory().total / 2**30
    return max(1, min((os.cpu_count() or 1) // THREADS, int(memory / MEMORY[profile])))
