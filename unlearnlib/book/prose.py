"""The sentences of a chapter: numbers for them, and a check of what they say."""

import re
from collections.abc import Mapping

from IPython.display import Markdown, display
from myst_nb import glue

OTHERWISE = "**Otherwise in this run**"
"""How a correction begins."""


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

    Where it does not hold, the page says so, and with which ``profile``. It is no error: another processor rounds
    otherwise, training amplifies that, and a run is not to end over a sentence. The tests see to it that as good
    as all that the texts say holds in a run of ``quick``.
    """
    if not holds:
        display(Markdown(f"{OTHERWISE} (profile `{profile}`). The text says that {says}. Here it is not so."))
