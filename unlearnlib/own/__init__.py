"""Unlearn your own model: an erasure request, from files of texts to a model folder with its report."""

from unlearnlib.own.checks import available_bytes, check_request
from unlearnlib.own.command_line import parser
from unlearnlib.own.demonstration import write_demonstration
from unlearnlib.own.fulfilment import fulfil
from unlearnlib.own.methods import build_curvature, unlearn
from unlearnlib.own.report import CANDIDATES, HEADINGS, number_text
from unlearnlib.own.request import STRENGTHS, Request
from unlearnlib.own.targets import beyond_difficulty, difficulties, estimate_targets
from unlearnlib.own.texts import read_material
from unlearnlib.texts.files import read_texts

__all__ = [
    "CANDIDATES",
    "HEADINGS",
    "STRENGTHS",
    "Request",
    "available_bytes",
    "beyond_difficulty",
    "build_curvature",
    "check_request",
    "difficulties",
    "estimate_targets",
    "fulfil",
    "number_text",
    "parser",
    "read_material",
    "read_texts",
    "unlearn",
    "write_demonstration",
]
