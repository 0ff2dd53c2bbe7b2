"""Numbers for the sentences of a chapter: named once, in the cell that has computed them."""

import re
from collections.abc import Mapping

from myst_nb import glue


def tell(values: Mapping[str, object] | None = None, /, **more: object) -> None:
    """Keep ``values`` under their names, for the prose to quote as ``{glue:text}`name:.2f```.

    In names, whatever is no letter, digit, dot or underscore becomes an underscore: ``kfac:held_share`` is quoted
    as ``kfac_held_share``. NumPy's numbers are kept as Python's, which formats know.
    """
    for name, value in {**(values or {}), **more}.items():
        plain = value.item() if hasattr(value, "item") else value
        glue(re.sub(r"[^\w.]", "_", name), plain, display=False)
