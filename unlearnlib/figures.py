"""One look for every figure: colour-blind safe, the same colour and marker for a method in all chapters."""

import inspect
from collections.abc import Callable

import matplotlib as mpl
from cycler import cycler
from IPython.display import Markdown
from matplotlib_inline.backend_inline import set_matplotlib_formats

# Okabe & Ito's palette, safe for the common kinds of colour blindness; markers tell methods apart without it.
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PURPLE = (
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#F0E442",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
)

METHOD_STYLES = {
    "original": {"color": BLACK, "marker": "s"},
    "retrained": {"color": BLACK, "marker": "*", "markersize": 12},
    "finetuned": {"color": PURPLE, "marker": "P"},
    "noise": {"color": SKY, "marker": "v"},
    "gradient_ascent": {"color": RED, "marker": "o"},
    "gradient_ascent:sgd": {"color": ORANGE, "marker": "^"},
    "gradient_ascent:adam": {"color": GREEN, "marker": "v"},
    "gradient_difference": {"color": BLUE, "marker": "D"},
    "gradient_ascent:kl": {"color": SKY, "marker": "X"},
}


def use_style() -> None:
    """Set the book's figure style. Chapters call it once, at the top."""
    mpl.rcParams.update(
        {
            "axes.prop_cycle": cycler(color=[BLUE, RED, GREEN, ORANGE, PURPLE, SKY, BLACK]),
            "axes.grid": True,
            "axes.spines.right": False,
            "axes.spines.top": False,
            "figure.constrained_layout.use": True,
            "figure.dpi": 100,
            "figure.figsize": (6.4, 4.0),
            "font.size": 11,
            "grid.alpha": 0.3,
            "legend.frameon": False,
            "lines.linewidth": 1.8,
            "savefig.facecolor": "white",
            "svg.fonttype": "path",
            "svg.hashsalt": "unlearnlib",
        }
    )
    set_matplotlib_formats("svg", metadata={"Date": None})


def method_style(method: str) -> dict:
    """Keyword arguments of ``plot`` for a method of the results table; its variants share its colour."""
    return METHOD_STYLES.get(method) or METHOD_STYLES[method.partition(":")[0]]


def source(*functions: Callable) -> Markdown:
    """Show the source of library functions as it is in the module, so that a chapter never holds a copy."""
    return Markdown("```python\n" + "\n\n".join(map(inspect.getsource, functions)) + "```")
