"""Figures that move: charts of Vega-Lite with a slider. On paper and where no script runs they stand still."""

import base64
import html
import json

import altair as alt
import vl_convert
from IPython.display import display

from unlearnlib.book.figures import BLUE, GREEN, ORANGE, PURPLE, RED, SKY

VERSION = ".".join(alt.VEGALITE_VERSION.split(".")[:2])
STYLE = {
    "background": "white",
    "font": "sans-serif",
    "axis": {"gridOpacity": 0.3, "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal"},
    "legend": {"labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal", "orient": "bottom"},
    "mark": {"color": BLUE},
    "range": {"category": [BLUE, RED, GREEN, ORANGE, PURPLE, SKY]},
    "text": {"fontSize": 12},
    "title": {"anchor": "start", "fontSize": 12, "fontWeight": "normal"},
    "view": {"stroke": None},
}


def show_moving(chart: alt.TopLevelMixin, describes: str) -> None:
    """Show ``chart``, which readers move by the sliders bound to its parameters.

    ``describes`` says what is to be seen, for those who cannot see it. The page carries a picture of the chart at
    its first setting, and the script ``book.js`` puts the chart in its place. Jupyter draws the chart itself.
    """
    specification = chart.to_dict()
    specification["config"] = specification.get("config", {}) | STYLE
    picture = vl_convert.vegalite_to_svg(specification, vl_version=VERSION)
    source = base64.b64encode(picture.encode()).decode()
    said = html.escape(describes, quote=True)
    data = json.dumps(specification).replace("</", "<\\/")  # what it says does not end the script
    page = (
        f'<div class="moving-figure" role="group" aria-label="{said}">'
        f'<img class="still" alt="{said}" src="data:image/svg+xml;base64,{source}">'
        f'<div class="live"><div class="sliders"></div><div class="chart"></div></div>'
        f'<script type="application/json">{data}</script></div>'
    )
    bundle = {"text/html": page, "text/plain": describes}
    bundle[f"application/vnd.vegalite.v{VERSION.partition('.')[0]}+json"] = specification
    display(bundle, raw=True)


def script() -> str:
    """The script that draws the charts, Vega with all it needs, to be served with the pages.

    Its names are kept to itself: Sphinx's scripts have some of the same.
    """
    return f"(() => {{{vl_convert.javascript_bundle(vl_version=VERSION)}}})();"
