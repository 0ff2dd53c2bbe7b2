import inspect

import pytest

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
