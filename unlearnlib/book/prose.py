"""The sentences of a chapter: numbers for them, and a check of what they say."""

import re
from collections.abc import Mapping

from IPython.display import Markdown, display
from myst_nb import glue

WRITTEN_FOR = ("quick",)
"""Profiles at which a text that does not hold ends the run: those that take minutes, and that every test runs."""


def tell(values: Mapping[str, object] | None = None, /, **more: object) -> None:
    """Keep ``values`` under their names, for the prose to quote as ``{glue:text}`name:.2f```.

    In names, whatever is no letter, digit, dot or underscore becomes an underscore: ``kfac:held_share`` is quoted
    as ``kfac_held_share``. NumPy's numbers are kept as Python's, which formats know.
    Raises ValueError if two names become one.
    """
    told: dict[str, object] = {}
    for name, value in [*(values or {}).items(), *more.items()]:
        quoted = re.sub(r"[^\w.]", "_", name)
        if quoted in told:
            raise ValueError(f"the prose could not tell {name!r} from another that becomes {quoted!r}: rename one")
        told[quoted] = value.item() if hasattr(value, "item") else value
    for name, value in told.items():
        glue(name, value, display=False)


def expect(profile: str, says: str, holds: bool) -> None:
    """Check what the text says of an outcome, such as "K-FAC does less damage than ascent", in this very run.

    Where it does not hold, a profile that the text was written for raises AssertionError: text or code is at
    fault. Any other goes on, for a run of hours is not to end over a sentence, and corrects it on the page. So
    does a run on another corpus or model, or of other seeds or sizes, than the profile's own.
    """
    from unlearnlib.experiment.chapters import as_written  # here: make needs no torch to import this room

    if holds:
        return
    if profile in WRITTEN_FOR and as_written():
        raise AssertionError(f"the text says that {says}; in this run it is not so")
    display(Markdown(f"**Otherwise in this run.** The text says that {says}. Here it is not so."))
