"""What is measured on a model: accuracy, divergence from another model, membership."""

import math
from dataclasses import dataclass

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from unlearnlib.losses import batched, log_probabilities


@dataclass(frozen=True)
class Reading:
    """What a model makes of some sequences, on the CPU.

    ``losses`` of every token in nats, and ``hits``, whether it is the model's most likely one, both
    [n, tokens - 1]. Where there is a reference, ``kl`` [n] is KL(reference ‖ model) of every sequence in nats,
    averaged over its tokens but the last, after which nothing is predicted.
    """

    losses: Tensor
    hits: Tensor
    kl: Tensor | None = None

    @classmethod
    def joined(cls, readings: list["Reading"]) -> "Reading":
        """What was read of several sets of sequences as that of one; without divergences."""
        return cls(torch.cat([one.losses for one in readings]), torch.cat([one.hits for one in readings]))

    @property
    def loss(self) -> float:
        """The mean loss in nats a token."""
        return self.losses.double().mean().item()

    @property
    def accuracy(self) -> float:
        """The share of tokens that are the most likely ones (memorisation accuracy, Jang et al. 2023)."""
        return self.hits.double().mean().item()

    @property
    def divergence(self) -> float:
        """KL(reference ‖ model) in nats, averaged over tokens and sequences.

        In the spirit of the readouts of Golatkar et al. (2020), with the retrained model as reference.
        """
        return self.kl.double().mean().item()


def read(model: PreTrainedModel, sequences: Tensor, reference: PreTrainedModel | None = None) -> Reading:
    """All that one pass over ``sequences`` [n, tokens] tells of a model, and of its distance to a reference."""

    def columns(model: PreTrainedModel, batch: Tensor) -> Tensor:
        targets, q = batch[:, 1:].to(model.device), log_probabilities(model, batch)
        found = [-q.gather(2, targets[..., None])[..., 0], (q.argmax(dim=2) == targets).to(q)]
        if reference is not None:
            p = log_probabilities(reference, batch)
            found.append(F.kl_div(q, p, log_target=True, reduction="none").sum(dim=2).mean(dim=1, keepdim=True))
        return torch.cat(found, dim=1)

    predicted = sequences.shape[1] - 1
    losses, hits, *kl = batched(columns, model, sequences).split(predicted, dim=1)
    return Reading(losses.contiguous(), hits.bool(), *(divergences[:, 0] for divergences in kl))


def membership(members: Reading, others: Reading) -> dict[str, float]:
    """How well the two attacks of the book tell ``members`` from ``others``: areas under the ROC curve.

    ``membership_auc`` is that of the loss (Yeom et al. 2018), ``membership_auc_min_k`` that of Min-K%.
    """
    return {
        "membership_auc": membership_auc(-members.losses.mean(dim=1), -others.losses.mean(dim=1)),
        "membership_auc_min_k": membership_auc(min_k_scores(members.losses), min_k_scores(others.losses)),
    }


def mean_kl(reference: PreTrainedModel, model: PreTrainedModel, sequences: Tensor) -> float:
    """KL(reference ‖ model) in nats between next-token distributions, averaged over tokens and sequences."""
    return read(model, sequences, reference).divergence


def min_k_scores(token_losses: Tensor, share: float = 0.2) -> Tensor:
    """Min-K% score of each row (Shi et al. 2024): mean log-probability of its least likely tokens.

    ``token_losses`` in nats, shape [n, tokens]; the ``share`` (K%) of the tokens with the highest loss count,
    rounded down as in the authors' code, but at least one. A higher score speaks for membership. Shape [n].
    """
    k = max(1, int(share * token_losses.shape[1]))
    return -token_losses.topk(k, dim=1).values.mean(dim=1)


def membership_auc(members: Tensor, others: Tensor) -> float:
    """Area under the ROC curve of an attack that calls a sequence a member where its score is high.

    0.5 is blind guessing, 1 a perfect attack. Shapes [n] and [m].
    """
    labels = [1] * len(members) + [0] * len(others)
    return float(roc_auc_score(labels, torch.cat([members, others]).numpy()))


def auc_error(auc: float, members: int, others: int) -> float:
    """Standard error of an area under the ROC curve for independent scores (Hanley & McNeil 1982).

    Their formula is 0 where all pairs of a member and another are ranked alike, however few there are. The area
    goes into it as if there had been one more pair, ranked by a coin.
    """
    auc = (auc * members * others + 0.5) / (members * others + 1)
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = auc * (1 - auc) + (members - 1) * (q1 - auc**2) + (others - 1) * (q2 - auc**2)
    return math.sqrt(max(variance, 0.0) / (members * others))


def loss_correlation(losses: Tensor, reference: Tensor) -> float:
    """Pearson correlation of two models' losses on the same sequences, both of shape [n] in nats.

    Equal means say little of which sequences are hard: this compares them one by one. At least 2 sequences.
    """
    return float(torch.corrcoef(torch.stack([losses, reference]).double())[0, 1])
