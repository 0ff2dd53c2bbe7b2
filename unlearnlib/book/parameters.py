"""The table of all chapters' parameters, read from the notebooks' own cells."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import papermill


def parameters_table(notebooks: Sequence[Path]) -> str:
    """A Markdown table of the parameters of ``notebooks``, in order of first appearance, with who has them.

    What is said of a parameter is the comment behind it in the cell tagged "parameters"; a name with two defaults
    or comments has two rows. A chapter goes by its place among ``notebooks``, from 1.
    """
    having: dict[tuple[str, str, str], list[int]] = {}
    for number, path in enumerate(notebooks, 1):
        for name, parameter in papermill.inspect_notebook(str(path)).items():
            having.setdefault((name, parameter["default"], parameter["help"]), []).append(number)
    lines = ["| Parameter and default | What it is | Chapters |", "|---|---|---|"]
    for (name, default, comment), numbers in having.items():
        chapters = "all" if len(numbers) == len(notebooks) else spans(numbers)
        cells = (f"`{name} = {default}`", comment, chapters)
        lines.append("| {} | {} | {} |".format(*(cell.replace("|", r"\|") for cell in cells)))
    return "\n".join(lines) + "\n"


def spans(numbers: Sequence[int]) -> str:
    """Ascending numbers, with those in a row drawn together: ``1–3, 5``."""
    runs = groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    ends = [(run[0][1], run[-1][1]) for run in (list(pairs) for _, pairs in runs)]
    return ", ".join(f"{first}–{last}" if last > first else str(first) for first, last in ends)
