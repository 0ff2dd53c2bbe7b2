"""What may be concluded: tables of results, intervals, and rules that are fixed in advance."""

from unlearnlib.verdicts.results import (
    REFERENCE,
    REFERENCE_PROFILE,
    bootstrap_interval,
    compare_with_reference,
    format_table,
    mean_text,
    method_label,
    read_results,
    summarise,
    write_results,
)
from unlearnlib.verdicts.rules import (
    INCONCLUSIVE,
    NOT_REPRODUCED,
    NOT_RUN,
    REPRODUCED,
    Rule,
    combine,
    conclude,
    effect_text,
    verdict,
    weakest,
)

__all__ = [
    "INCONCLUSIVE",
    "NOT_REPRODUCED",
    "NOT_RUN",
    "REFERENCE",
    "REFERENCE_PROFILE",
    "REPRODUCED",
    "Rule",
    "bootstrap_interval",
    "combine",
    "compare_with_reference",
    "conclude",
    "effect_text",
    "format_table",
    "mean_text",
    "method_label",
    "read_results",
    "summarise",
    "verdict",
    "weakest",
    "write_results",
]
