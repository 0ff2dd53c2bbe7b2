"""What the pages of the book are made with: figures, numbers in the prose, and the runs behind them."""

from unlearnlib.book.figures import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    label_decades,
    method_style,
    plot_frontier,
    plot_relearning,
    show_source,
    use_style,
)
from unlearnlib.book.moving import show_moving
from unlearnlib.book.prose import expect, tell

__all__ = [
    "BLACK",
    "BLUE",
    "GREEN",
    "ORANGE",
    "PURPLE",
    "RED",
    "SKY",
    "expect",
    "label_decades",
    "method_style",
    "plot_frontier",
    "plot_relearning",
    "show_moving",
    "show_source",
    "tell",
    "use_style",
]
