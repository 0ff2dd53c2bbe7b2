"""Settings and fixtures shared by all tests."""

import os
from pathlib import Path

# Before torch is imported: one thread, as in the notebooks, so that results do not depend on the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def book_site() -> Path:
    """The folder of the rendered book at profile quick, the same that ``make book`` makes."""
    from unlearnlib.book.build import make_book

    return make_book(ROOT, "quick").parent
