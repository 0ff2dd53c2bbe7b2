"""The experiments: profiles, cases of one seed, and the report that measures methods on them."""

from unlearnlib.experiment.case import Case, make_cases, model_name, shared_documents
from unlearnlib.experiment.chapters import chapter
from unlearnlib.experiment.comparison import choose_settings, follow_methods, measure_references
from unlearnlib.experiment.contenders import Contender, contenders_on
from unlearnlib.experiment.curvatures import curvature_builders
from unlearnlib.experiment.earnings import earnings_news
from unlearnlib.experiment.inverse_fisher_time import inverse_fisher_seconds
from unlearnlib.experiment.many_processes import in_processes, shared_updates
from unlearnlib.experiment.profiles import Profile, architectures, corpus_names, get_profile, on_second_corpus
from unlearnlib.experiment.report import SHARES, Report, frontier_table, results_table, sweeps_table
from unlearnlib.experiment.request_series import RequestSeries, broken_down
from unlearnlib.experiment.request_sets import RequestCase, requests_of_sizes
from unlearnlib.experiment.shadows import Shadows
from unlearnlib.experiment.streaming_cost import streaming_cost_of_smollm2

__all__ = [
    "SHARES",
    "Case",
    "Contender",
    "Profile",
    "Report",
    "RequestCase",
    "RequestSeries",
    "Shadows",
    "architectures",
    "broken_down",
    "chapter",
    "choose_settings",
    "contenders_on",
    "corpus_names",
    "curvature_builders",
    "earnings_news",
    "follow_methods",
    "frontier_table",
    "get_profile",
    "in_processes",
    "inverse_fisher_seconds",
    "make_cases",
    "measure_references",
    "model_name",
    "on_second_corpus",
    "requests_of_sizes",
    "results_table",
    "shared_documents",
    "shared_updates",
    "streaming_cost_of_smollm2",
    "sweeps_table",
]
