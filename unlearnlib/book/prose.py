"""Numbers for the sentences of a chapter: named once, in the cell that has computed them."""

import re
from collections.abc import Mapping

from myst_nb import glue


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
