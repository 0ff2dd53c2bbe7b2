"""Private training beside unlearning: cases with secrets, the settings of both, and the time they take."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from unlearnlib.cost import Meter
from unlearnlib.curvature.kronecker import kfac
from unlearnlib.experiment.case import Case
from unlearnlib.experiment.report import Report
from unlearnlib.losses import mean_loss
from unlearnlib.measures.exposure import candidates, exposure
from unlearnlib.methods.dp_sgd import PrivateRun, load_private, train_private
from unlearnlib.methods.first_order import ascent_direction
from unlearnlib.methods.fisher_updates import removal_direction
from unlearnlib.methods.matching import Line, best_setting
from unlearnlib.methods.privacy import Privacy
from unlearnlib.models.training import load_trained, train
from unlearnlib.texts.planting import Secret, box_secrets, planted_heads
from unlearnlib.texts.sequences import encode

EVERY = 8
"""At the head of every so many sequences stands a secret, in all three sets."""

RANKED = 128
"""Among how many numbers a secret is ranked, itself one of them."""


@dataclass(frozen=True)
class PlantedCase(Case):
    """A case with secret numbers in its sequences; ``secrets`` are those of the forget set."""

    secrets: tuple[Secret, ...]

    @classmethod
    def plant(cls, case: Case) -> "PlantedCase":
        """The same case with what is in a box at the head of every :data:`EVERY` th sequence, each box once."""
        sets = {name: getattr(case.splits, name) for name in ("forget", "retain", "holdout")}
        numbers = [-(-len(rows) // EVERY) for rows in sets.values()]
        secrets = box_secrets(sum(numbers), case.seed)
        heads = iter([encode(case.tokenizer, secret.prefix + secret.number) for secret in secrets])
        planted = {
            name: planted_heads(rows, list(itertools.islice(heads, number)), EVERY)
            for (name, rows), number in zip(sets.items(), numbers, strict=True)
        }
        splits = replace(case.splits, **planted)
        return cls(case.profile, case.seed, case.tokenizer, splits, tuple(secrets[: numbers[0]]))

    def exposure(self, model: PreTrainedModel) -> float:
        """The mean exposure in bits of ``secrets``, each among :data:`RANKED` numbers."""
        bits = [
            exposure(model, self.tokenizer, s.prefix, s.number, candidates(s.number, RANKED - 1, self.seed))
            for s in self.secrets
        ]
        return sum(bits) / len(bits)

    def cut_short(self, epochs: int) -> PreTrainedModel:
        """The original, had its training ended after so many epochs (its schedule being as much shorter)."""
        run = self.runs()["original"]
        return load_trained(replace(run, training=replace(run.training, epochs=epochs)))

    def private_run(self, privacy: Privacy, learning_rate: float) -> PrivateRun:
        """Private training on forget and retain sequences, otherwise as the original's."""
        run = self.runs()["original"]
        training = replace(run.training, learning_rate=learning_rate)
        return PrivateRun(run.source, run.sequences, training, self.seed, privacy)


def best_rate(case: PlantedCase, privacy: Privacy, rates: Sequence[float]) -> float:
    """The learning rate of private training with the smallest loss on the validation sequences.

    Of models that are trained without these. Where there is one rate only, nothing is trained.
    """
    if len(rates) == 1:
        return rates[0]

    def validation_loss(rate: float) -> float:
        others = torch.cat([case.splits.forget, case.estimation])
        run = replace(case.private_run(privacy, rate), sequences=others)
        return mean_loss(load_private(run), case.validation)

    return min(rates, key=validation_loss)


def best_damping(report: Report, dampings: Iterable[float]) -> float:
    """The λ of Fisher Removal over K-FAC with the smallest validation loss at matched forgetting."""
    case, model = report.case, report.case.original()
    forget = case.splits.forget
    delta, factors = ascent_direction(model, forget), kfac(model, case.estimation, seed=case.seed)
    return best_setting(
        report.sweep(dampings, lambda damping: Line(model, removal_direction(factors, delta, damping), forget))
    )


def unlearn(
    report: Report, damping: float, measure: Callable[[str, PreTrainedModel], object]
) -> tuple[float, float]:
    """Bring Fisher Removal over K-FAC, and one step of ascent, to matched forgetting, and ``measure`` both there.

    Returns the seconds that the factors took, and those of Fisher Removal with its search for the strength.
    Raises ValueError if one of the two does not get there.
    """
    case, model = report.case, report.case.original()
    forget = case.splits.forget
    with Meter(model.device) as building:
        factors = kfac(model, case.estimation, seed=case.seed)
    with Meter(model.device) as request:
        delta = ascent_direction(model, forget)
        removal = Line(model, removal_direction(factors, delta, damping), forget)
        matches = {"kfac": removal.to(report.target)}
    measure("kfac", model)
    matches["gradient_ascent"] = Line(model, delta, forget, removal.start).to(report.target)
    measure("gradient_ascent", model)
    short = [method for method, match in matches.items() if not match.reached]
    if short:
        raise ValueError(f"{' and '.join(short)} did not reach the retrained model's forget loss")
    return building.cost.seconds, request.cost.seconds


def epoch_seconds(case: PlantedCase) -> tuple[float, float]:
    """How long an epoch of ordinary and one of private training take, the latter without noise."""
    run = case.runs()["original"]
    once = replace(run.training, epochs=1)
    model = case.original()
    with Meter(model.device) as plain:
        train(model, run.sequences, once, seed=0)
    model = case.original()
    with Meter(model.device) as private:
        train_private(model, PrivateRun(run.source, run.sequences, once, 0, Privacy(None)))
    return plain.cost.seconds, private.cost.seconds
