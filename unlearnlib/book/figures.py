"""One look for every figure: colour-blind safe, the same colour and marker for a method in all chapters."""

import inspect
from collections.abc import Callable, Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from cycler import cycler
from IPython.display import Markdown
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator
from matplotlib_inline.backend_inline import set_matplotlib_formats

from unlearnlib.verdicts.results import interval, method_label

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
    "gradient_ascent:kl": {"color": BLUE, "marker": "s", "linestyle": "--"},
    "gradient_ascent:repaired": {"color": RED, "marker": "<", "linestyle": "--"},
    "npo": {"color": SKY, "marker": "X"},
    "npo:retain": {"color": SKY, "marker": "P", "linestyle": "--"},
    "simnpo": {"color": PURPLE, "marker": "p"},
    "rmu": {"color": ORANGE, "marker": "s"},
    "soul": {"color": PURPLE, "marker": "D"},
    "newton_cg": {"color": GREEN, "marker": "p"},
    "newton_cg:hessian": {"color": SKY, "marker": "d"},
    "newton_cg:natural": {"color": ORANGE, "marker": "X"},
    "newton_descent": {"color": RED, "marker": "d"},
    "newton": {"color": RED, "marker": "d"},
    "fisher_recursion": {"color": ORANGE, "marker": "<"},
    "fisher_dual": {"color": BLUE, "marker": ">"},
    "fisher_diagonal": {"color": SKY, "marker": "v"},
    "fisher_diagonal:expected": {"color": SKY, "marker": "x", "linestyle": "--"},
    "fisher_diagonal:sampled": {"color": SKY, "marker": "x", "linestyle": "--"},
    "kfac": {"color": GREEN, "marker": "^"},
    "kfac:held": {"color": GREEN, "marker": "*", "linestyle": "--"},
    "kfac:damped": {"color": GREEN, "marker": "s", "linestyle": "--"},
    "kfac:refreshed": {"color": ORANGE, "marker": "p"},
    "kfac:stale": {"color": GREEN, "marker": "v", "linestyle": "--"},
    "kfac:difference": {"color": BLACK, "marker": "P"},
    "kfac:difference-stale": {"color": BLACK, "marker": "X", "linestyle": "--"},
    "kfac:joint": {"color": SKY, "marker": "d"},
    "ekfac": {"color": PURPLE, "marker": "h"},
    "fisher_forgetting": {"color": PURPLE, "marker": "h"},
    "fisher_forgetting:recursion": {"color": RED, "marker": "h", "linestyle": "--"},
    "dp_sgd": {"color": PURPLE, "marker": "D"},
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


def label_decades(ax: Axes, which: str = "y") -> None:
    """Write plain numbers at 1, 2 and 5 of every decade of a logarithmic axis, "x" or "y"."""
    axis = {"x": ax.xaxis, "y": ax.yaxis}[which]
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(LogLocator(subs=(2, 5)))
    axis.set_minor_formatter("{x:g}")


def plot_frontier(ax: Axes, table: pd.DataFrame, methods: Sequence[str]) -> None:
    """Draw a table of :func:`unlearnlib.experiment.report.frontier_table`: mean over the seeds, bands of 95 %.

    Each method's line starts at the original model (square) and would, were it perfect, run along the bottom to
    the retrained one (star). Points that not every seed reached are left out.
    """
    seeds = table["seed"].nunique()
    points = table.pivot_table(index=["method", "share", "seed"], columns="metric", values="value")
    origin = points.loc["original"]
    ax.axvline(0, color="black", linewidth=1, linestyle=":")
    for method in methods:
        x, mean, low, high = [], [], [], []
        for _, point in pd.concat([origin, points.loc[method]]).groupby("share"):
            if len(point) == seeds:
                x.append(point["forget_excess"].mean())
                mean.append(point["holdout_excess"].mean())
                ends = interval(point["holdout_excess"])
                low.append(ends[0])
                high.append(ends[1])
        style = method_style(method)
        ax.plot(x, mean, label=method_label(method), **{"markersize": 6} | style)
        ax.fill_between(x, low, high, color=style["color"], alpha=0.12, linewidth=0)
    start = origin.mean()
    ax.plot(start["forget_excess"], start["holdout_excess"], linestyle="none", **_named("original"))
    ax.plot(0, 0, linestyle="none", **_named("retrained"))
    ax.set_xlabel("forget loss above the retrained model's (nats)")
    ax.set_ylabel("holdout loss above\nthe retrained model's (nats)")
    ax.legend(fontsize=9)


def plot_relearning(ax: Axes, curves: dict[str, list[list[float]]]) -> None:
    """Draw relearning curves, by method a curve a seed, as their means."""
    for method, found in curves.items():
        style = method_style(method) | {"markersize": 6}
        ax.plot(np.mean(found, axis=0), label=method_label(method), markevery=5, **style)
    ax.set_xlabel("step of relearning on the other half")
    ax.set_ylabel("forget loss on the unseen half\n(nats per token)")


def _named(method: str) -> dict:
    return {"label": method_label(method), **method_style(method)}


def show_source(*functions: Callable) -> Markdown:
    """Show the source of library functions as it is in the module, so that a chapter never holds a copy."""
    return Markdown("```python\n" + "\n\n".join(map(inspect.getsource, functions)) + "```")
