"""Every exercise says how hard it is, and has a hint and a solution that says what follows."""

import re
from pathlib import Path

import pytest
from helpers import chapter_prose

CHAPTERS = sorted((Path(__file__).parents[2] / "notebooks").glob("[0-9]*.ipynb"))
OPTIONS = r"(?::[^\n]*\n)*"
EXERCISE = re.compile(
    r"`{3,}\{exercise-start\} ([^\n]*)\n:label: (\S+)\n" + OPTIONS + r"`{3,}\n(.*?)`{3,}\{exercise-end\}",
    re.DOTALL,
)
SOLUTION = re.compile(
    r"`{3,}\{solution-start\} (\S+)\n" + OPTIONS + r"`{3,}\n(.*?)`{3,}\{solution-end\}", re.DOTALL
)
HINT = re.compile(r":::\{admonition\} Hint\n:class: dropdown tip\n.+?\n:::\s*$", re.DOTALL)


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_exercises_can_be_done_from_the_book_alone(path):
    prose = chapter_prose(path)
    exercises = {label: (title, text) for title, label, text in EXERCISE.findall(prose)}
    solutions = dict(SOLUTION.findall(prose))
    assert exercises
    assert len(exercises) == prose.count("{exercise-start}")
    assert solutions.keys() == exercises.keys()
    lacking = {
        "stars at the end of its title": [
            label for label, (title, _) in exercises.items() if not re.search(r" ★{1,3}$", title)
        ],
        "a folded hint at its end": [label for label, (_, text) in exercises.items() if not HINT.search(text)],
        "what follows": [label for label, text in solutions.items() if "**What follows.**" not in text],
    }
    assert not {what: labels for what, labels in lacking.items() if labels}
    assert any(title.endswith("★★") for title, _ in exercises.values()), "none changes the chapter's code"
