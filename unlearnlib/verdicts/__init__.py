"""What may be concluded: tables of results, intervals, and rules that are fixed in advance."""

from unlearnlib.verdicts.indelible import harder_to_remove
from unlearnlib.verdicts.leads import Lead, distances, lead
from unlearnlib.verdicts.nearness import nearer_retrained
from unlearnlib.verdicts.results import (
    REFERENCE,
    REFERENCE_PROFILE,
    above_retrained,
    compare_with_reference,
    format_table,
    interval,
    mean_text,
    method_label,
    number_text,
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
    "Lead",
    "Rule",
    "above_retrained",
    "combine",
    "compare_with_reference",
    "conclude",
    "distances",
    "effect_text",
    "format_table",
    "harder_to_remove",
    "interval",
    "lead",
    "mean_text",
    "method_label",
    "nearer_retrained",
    "number_text",
    "read_results",
    "summarise",
    "verdict",
    "weakest",
    "write_results",
]
