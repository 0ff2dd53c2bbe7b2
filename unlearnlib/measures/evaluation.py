"""What is measured on a model: accuracy, divergence from another model, membership."""

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from unlearnlib.losses import batched, batches, log_probabilities, logits


def token_accuracy(model: PreTrainedModel, sequences: Tensor) -> float:
    """Share of tokens that are the model's most likely next token (memorisation accuracy, Jang et al. 2023)."""

    def hits(model: PreTrainedModel, batch: Tensor) -> Tensor:
        return logits(model, batch).argmax(dim=2) == batch[:, 1:].to(model.device)

    return batched(hits, model, sequences).double().mean().item()


def compare(
    model: PreTrainedModel, reference: PreTrainedModel, sequences: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """All that one pass of each model over ``sequences`` [n, tokens] tells, on the CPU.

    Returns the model's loss on every token in nats, and whether the token is its most likely one, both of shape
    [n, tokens - 1]; and of every sequence KL(reference ‖ model) in nats, averaged over its tokens but the last,
    after which nothing is predicted, [n].
    """
    parts = []
    with torch.no_grad():
        for batch in batches(model, sequences):
            targets = batch[:, 1:].to(model.device)
            p, q = log_probabilities(reference, batch), log_probabilities(model, batch)
            losses = -q.gather(2, targets[..., None])[..., 0]
            kl = F.kl_div(q, p, log_target=True, reduction="none").sum(dim=2).mean(dim=1)
            parts.append((losses.cpu(), (q.argmax(dim=2) == targets).cpu(), kl.cpu()))
    losses, hits, kl = map(torch.cat, zip(*parts, strict=True))
    return losses, hits, kl


def mean_kl(reference: PreTrainedModel, model: PreTrainedModel, sequences: Tensor) -> float:
    """KL(reference ‖ model) in nats between next-token distributions, averaged over tokens and sequences.

    In the spirit of the readouts of Golatkar et al. (2020), with the retrained model as reference.
    """
    return compare(model, reference, sequences)[2].double().mean().item()


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


def loss_correlation(losses: Tensor, reference: Tensor) -> float:
    """Pearson correlation of two models' losses on the same sequences, both of shape [n] in nats.

    Equal means say little of which sequences are hard: this compares them one by one. At least 2 sequences.
    """
    return float(torch.corrcoef(torch.stack([losses, reference]).double())[0, 1])
