"""Run one chapter over values of its parameters, each combination through papermill, and lay results side by side.

A combination has a folder of its own in ``_build/sweeps/<chapter>/<profile>``, and is not run again unless
something that it depends on has changed: what :mod:`unlearnlib.book.notebooks` looks at, and the files given.
"""

import argparse
import ast
import itertools
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import papermill

from unlearnlib.book.notebooks import PROFILES, Job, plan
from unlearnlib.book.schedule import run_jobs
from unlearnlib.cache import atomic_file, file_hash, json_hash
from unlearnlib.experiment.chapters import chapter
from unlearnlib.experiment.profiles import corpus_names
from unlearnlib.experiment.sizes import CHAPTERS
from unlearnlib.models.loading import load_config
from unlearnlib.texts.corpora import CORPORA
from unlearnlib.verdicts.results import COLUMNS

COUNTS = ("seeds", "retain", "last_blocks", "length")
ELSEWHERE = {"profile": "it is an option, --profile", "results": "every combination has a folder of its own"}
Swept = tuple[Job, dict[str, str]]
"""The job of a combination, and its values as results call them."""


def parse_grid(words: Sequence[str]) -> dict[str, list[Any]]:
    """The values of each parameter, from words such as ``corpus=reuters,tales``; numbers and None are no text.

    Raises ValueError for a word of another form, and for a parameter or a value that is there twice.
    """
    grid: dict[str, list[Any]] = {}
    for word in words:
        name, _, values = word.partition("=")
        if not (name and all(values.split(","))):
            raise ValueError(f"{word!r} is no parameter with values: write it as in corpus=reuters,tales")
        if name in grid:
            raise ValueError(f"the parameter {name} is there twice: list all of its values after one {name}=")
        grid[name] = [_value(text) for text in values.split(",")]
        shown = list(map(_shown, grid[name]))
        if len(set(shown)) < len(shown):
            raise ValueError(f"two values of {name} go by one name among {', '.join(shown)}: rename one")
    return grid


def plan_sweep(root: Path, profile: str, name: str, grid: dict[str, list[Any]]) -> list[Swept]:
    """A job for each combination of values. Nothing has been run by then.

    Raises ValueError for an unknown chapter, parameter or value, OSError for a file or model that is not there.
    """
    [job] = plan(root, profile, [name])
    known = papermill.inspect_notebook(str(job.notebook)).keys() - ELSEWHERE.keys()
    for parameter in grid:
        if parameter not in known:
            why = ELSEWHERE.get(parameter, f"{name} has no such parameter")
            raise ValueError(f"cannot sweep over {parameter}: {why}. Choose from {', '.join(sorted(known))}")
    combinations = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    for given in combinations:
        _check(name.partition("_")[2], profile, given)
    return [_swept(root, job, given) for given in combinations]


def collect(runs: Sequence[Swept]) -> pd.DataFrame:
    """All rows of all exhibits of ``runs``, with a column for each parameter: ``swept_corpus`` and so on."""
    tables = [
        pd.read_csv(path).assign(**{f"swept_{name}": value for name, value in shown.items()})
        for job, shown in runs
        for path in sorted((job.build / "results").glob("*.csv"))
    ]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=COLUMNS)


def side_by_side(table: pd.DataFrame) -> pd.DataFrame:
    """An exhibit's means over seeds: a row for metric, method and settings, a column for each combination."""
    swept = [column for column in table if column.startswith("swept_")]
    rows = [column for column in table if column not in (*COLUMNS, *swept) and table[column].notna().any()]
    # A chapter may compare corpora or models within a run.
    rows += [column for column in ("corpus", "model") if (table.groupby(swept)[column].nunique() > 1).any()]
    whole = table.assign(**{column: table[column].astype(object).fillna("") for column in rows})
    wide = whole.pivot_table(index=["metric", "method", *rows], columns=swept, values="value", sort=False)
    return wide.rename_axis(columns=[name.removeprefix("swept_") for name in swept])


def sweep(root: Path, profile: str, name: str, words: Sequence[str], exhibit: str | None = None) -> dict[str, str]:
    """Run what is not done, write all results as one CSV, and print an exhibit; return what failed, and why.

    Raises as :func:`parse_grid` and :func:`plan_sweep`, and ValueError for an exhibit that the chapter lacks.
    """
    grid = parse_grid(words)
    runs = plan_sweep(root, profile, name, grid)
    failures = run_jobs([job for job, _ in runs], profile)
    table = collect([(job, shown) for job, shown in runs if job.name not in failures])
    of_all = _file_name({parameter: ",".join(map(_shown, values)) for parameter, values in grid.items()})
    path = root / "_build" / "sweeps" / name / profile / f"{of_all}.csv"
    with atomic_file(path) as temporary:
        table.to_csv(temporary, index=False)
    exhibits = list(dict.fromkeys(table["exhibit"]))
    if exhibits:
        own = name.partition("_")[2]
        exhibit = exhibit or (own if own in exhibits else exhibits[0])
        if exhibit not in exhibits:
            raise ValueError(f"{name} has no exhibit {exhibit}: choose from {', '.join(exhibits)}")
        print(f"\n{exhibit} (of {', '.join(exhibits)}), means over seeds:\n")
        print(side_by_side(table[table["exhibit"] == exhibit]).to_string(float_format="{:.4g}".format))
    print(f"\nall rows are in {path.relative_to(root)}")
    return failures


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and value not in CORPORA and Path(value).exists()


def _shown(value: Any) -> str:
    """What results call a value: a file by its stem, as the corpus that it is, and a folder by its name."""
    if not _is_path(value):
        return str(value)
    return Path(value).resolve().name if Path(value).is_dir() else Path(value).stem


def _file_name(shown: dict[str, str]) -> str:
    return re.sub(r"[^\w.,=-]+", "_", " ".join(f"{name}={value}" for name, value in shown.items()))


def _check(chapter_name: str, profile: str, given: dict[str, Any]) -> None:
    for key in COUNTS:
        if given.get(key) is not None and not (type(given[key]) is int and given[key] > 0):
            raise ValueError(f"{key} is a positive number, or None, and not {given[key]!r}")
    for key in ("corpus", "corpora"):
        if given.get(key) is not None:
            corpus_names(str(given[key]), *(["posts"] if chapter_name == "indelible" else []))
    if given.get("model") is not None:
        if chapter_name in CHAPTERS:
            chapter(chapter_name, profile, model=given["model"])
        load_config(given["model"])


def _swept(root: Path, job: Job, given: dict[str, Any]) -> Swept:
    """The job of one combination. Papermill runs in the folder of the notebook, which paths are relative to."""
    shown = {name: _shown(value) for name, value in given.items()}
    paths = {name: Path(value).resolve() for name, value in given.items() if _is_path(value)}
    build = root / "_build" / "sweeps" / job.notebook.stem / job.build.name / _file_name(shown)
    places = paths | {"results": build / "results"}
    parameters = job.parameters | given
    parameters |= {name: os.path.relpath(path, job.notebook.parent) for name, path in places.items()}
    files = [file for path in paths.values() for file in [path, *sorted(path.rglob("*"))] if file.is_file()]
    key = json_hash([job.key, parameters, list(map(file_hash, files))])
    label = " ".join(f"{name}={value}" for name, value in shown.items())
    return replace(job, build=build, parameters=parameters, key=key, label=label), shown


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a chapter over values of its parameters. The exit code is 0 only if every combination ran to its end."""
    parser = argparse.ArgumentParser(prog="python -m unlearnlib.book.sweep", description=main.__doc__)
    parser.add_argument("chapter", help="a notebook by its file name without ending, such as 02_gradient_ascent")
    parser.add_argument("over", nargs="+", metavar="PARAMETER=VALUE,VALUE", help="such as corpus=reuters,tales")
    parser.add_argument("--profile", default="quick", choices=PROFILES, help="settings (default: quick)")
    parser.add_argument("--exhibit", help="which table to print (default: the chapter's first)")
    options = parser.parse_args(arguments)
    try:
        failures = sweep(Path.cwd(), options.profile, options.chapter, options.over, options.exhibit)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name, reason in failures.items():
        print(f"error: {name}: {reason}", file=sys.stderr)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
