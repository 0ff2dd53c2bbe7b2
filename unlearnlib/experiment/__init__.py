"""The experiments: profiles, cases of one seed, and the recorder that measures methods on them."""

from unlearnlib.experiment.case import Case, model_name, prepare
from unlearnlib.experiment.profiles import Profile, architectures, get_profile, on_second_corpus, real_model
from unlearnlib.experiment.report import SHARES, Report, frontier_table, results_table

__all__ = [
    "SHARES",
    "Case",
    "Profile",
    "Report",
    "architectures",
    "frontier_table",
    "get_profile",
    "model_name",
    "on_second_corpus",
    "prepare",
    "real_model",
    "results_table",
]
