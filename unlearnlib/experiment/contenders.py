"""The methods that are compared, in one place: what each reads, its knobs, and the path it takes with a setting."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from unlearnlib.experiment.case import Case
from unlearnlib.experiment.report import Report
from unlearnlib.methods.first_order import (
    Loss,
    adam_walk,
    ascent_direction,
    ascent_loss,
    descend,
    gradient_difference_loss,
    kl_retain_loss,
    npo_loss,
)
from unlearnlib.methods.fisher_updates import Build, removal_direction
from unlearnlib.methods.matching import Line, Path, Walk
from unlearnlib.methods.tuning import MOST, Knobs
