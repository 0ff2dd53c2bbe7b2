"""Draw the picture of the first page and the README from the reference results of chapter 5.

``python -m unlearnlib.book.first_picture`` does so anew, after those results have changed.
"""

import hashlib
from pathlib import Path

from matplotlib import pyplot as plt

from unlearnlib.book.figures import plot_frontier, use_style
from unlearnlib.cache import atomic_file
from unlearnlib.verdicts.results import REFERENCE, read_results

PICTURE = REFERENCE.parent / "_static" / "frontier.svg"
EXHIBIT = "newton_frontier"
METHODS = ("gradient_ascent", "gradient_difference", "newton_cg:hessian", "newton_cg")


def fingerprint() -> str:
    """What the picture says of the table that it was drawn from: the table's name and SHA-256.

    Raises FileNotFoundError where the reference results are not.
    """
    return f"{EXHIBIT} {hashlib.sha256((REFERENCE / f'{EXHIBIT}.csv').read_bytes()).hexdigest()}"


def draw(path: Path = PICTURE) -> Path:
    """Draw the frontier of :data:`METHODS` as an SVG, the same bytes for the same table, with its fingerprint.

    Raises FileNotFoundError where the reference results are not.
    """
    use_style()
    figure, ax = plt.subplots(figsize=(5.0, 3.9))
    plot_frontier(ax, read_results(REFERENCE, EXHIBIT), METHODS)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None, "Description": fingerprint()})
    plt.close(figure)
    return path


if __name__ == "__main__":
    print(f"drawn: {draw()}")
