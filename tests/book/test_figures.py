import inspect

import pytest
from matplotlib.figure import Figure

from unlearnlib.book import figures
from unlearnlib.methods import matching


def test_source_is_the_modules_own():
    shown = figures.show_source(matching.Line, matching.match_strength).data
    assert inspect.getsource(matching.Line) in shown
    assert inspect.getsource(matching.match_strength) in shown


def test_variants_share_the_style_of_their_method_and_unknown_methods_are_refused():
    assert figures.method_style("retrained:again") == figures.method_style("retrained")
    assert figures.method_style("gradient_ascent:sgd") != figures.method_style("gradient_ascent")
    with pytest.raises(KeyError, match="no_such_method"):
        figures.method_style("no_such_method")


@pytest.mark.parametrize("which", ["x", "y"])
def test_numbers_of_a_logarithmic_axis_are_plain_at_one_two_and_five(which):
    ax = Figure().add_subplot()
    ax.set(**{f"{which}scale": "log", f"{which}lim": (0.015, 0.3)})
    figures.label_decades(ax, which)
    axis = getattr(ax, f"{which}axis")
    texts = {t.get_text() for kind in ("major", "minor") for t in axis.get_ticklabels(which=kind)}
    assert {"0.02", "0.05", "0.1", "0.2"} <= texts
    assert not {text for text in texts if text.strip("0.") not in ("", "1", "2", "5")}
