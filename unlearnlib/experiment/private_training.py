"""Private training beside unlearning: cases with secrets, the settings of both, and the time they take."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from unlearnlib.cost import Meter
from unlearnlib.experiment.case import Case
from unlearnlib.experiment.contenders import Contender
from unlearnlib.experiment.report import Report
from unlearnlib.losses import mean_loss
from unlearnlib.measures.exposure import candidates, exposure
from unlearnlib.methods.dp_sgd import PrivateRun, load_private, train_private
from unlearnlib.methods.matching import Path
from unlearnlib.methods.privacy import Privacy
from unlearnlib.methods.tuning import MOST, Choice, Knobs, Worth, search
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
    def plant(cls, case: Case, copies: int = 1) -> "PlantedCase":
        """The same case with what is in a box at the head of every :data:`EVERY` th sequence, each box once.

        With more ``copies`` every box stands in so many sequences of its set, and as many more have one: with 2
        every fourth. Raises ValueError if :data:`EVERY` is not a multiple of ``copies``.
        """
        if copies < 1 or EVERY % copies:
            raise ValueError(f"{copies} copies of a secret do not divide {EVERY}: choose a divisor of it")
        sets = {name: getattr(case.splits, name) for name in ("forget", "retain", "holdout")}
        numbers = [-(-len(rows) // EVERY) for rows in sets.values()]
        secrets = box_secrets(sum(numbers), case.seed)
        heads = iter([encode(case.tokenizer, secret.prefix + secret.number) for secret in secrets])
        planted, every = {}, EVERY // copies
        for (name, rows), number in zip(sets.items(), numbers, strict=True):
            of_set = list(itertools.islice(heads, number)) * copies
            planted[name] = planted_heads(rows, of_set[: -(-len(rows) // every)], every)
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

    def private_run(
        self,
        privacy: Privacy,
        learning_rate: float,
        batch_size: float | None = None,
        epochs: float | None = None,
        sequences: Tensor | None = None,
    ) -> PrivateRun:
        """Private training on ``sequences``, or on forget and retain sequences, otherwise as the original's.

        Batch size and epochs, where they are given, are rounded. A batch is at most everything.
        """
        run = self.runs()["original"]
        rows = run.sequences if sequences is None else sequences
        training = replace(
            run.training,
            learning_rate=learning_rate,
            batch_size=min(max(1, round(batch_size or run.training.batch_size)), len(rows)),
            epochs=max(1, round(epochs or run.training.epochs)),
        )
        return PrivateRun(run.source, rows, training, self.seed, privacy)


def choose_training(case: PlantedCase, privacy: Privacy, knobs: Knobs, most: int = MOST) -> Choice:
    """The setting of private training with the smallest loss on the validation sequences.

    Of models that are trained without these. ``knobs`` are among ``learning_rate``, ``batch_size`` and ``epochs``;
    the search is that of every other method, :func:`unlearnlib.methods.tuning.search`.
    """
    others = torch.cat([case.splits.forget, case.estimation])

    def trial(**setting: float) -> tuple[Worth, dict[str, float]]:
        model = load_private(case.private_run(privacy, **setting, sequences=others))
        loss = mean_loss(model, case.validation)
        return (False, loss), {"validation_loss": loss}

    return search(knobs, trial, most)


def unlearn(report: Report, method: str, contender: Contender, setting: Mapping[str, float]) -> None:
    """Bring a method to matched forgetting; note what is measured there, and the exposure of the secrets."""
    made: list[Path] = []

    def path() -> Path:
        made.append(contender.path(**setting))
        return made[0]

    report.match(method, path, brief=True)
    report.add(method, {"exposure_bits": report.case.exposure(made[0].model)})


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
