"""What is measured on a model: loss, accuracy, divergence from another model, membership."""

from collections.abc import Callable

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel


def check_length(model: PreTrainedModel, tokens: int) -> None:
    """Raise ValueError if sequences of ``tokens`` tokens do not fit the model's context."""
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and tokens > context:
        raise ValueError(
            f"sequences of {tokens} tokens do not fit the model's context of {context}: cut them shorter"
        )


def logits(model: PreTrainedModel, sequences: Tensor) -> Tensor:
    """Logits of every next token, shape [n, tokens - 1, vocabulary]; the last token predicts nothing."""
    check_length(model, sequences.shape[1])
    return model(input_ids=sequences[:, :-1].to(model.device), use_cache=False).logits


def log_probabilities(model: PreTrainedModel, sequences: Tensor) -> Tensor:
    """Log-probabilities in nats of every next token, shaped like :func:`logits`, in at least float32."""
    z = logits(model, sequences)
    return F.log_softmax(z, dim=-1, dtype=torch.promote_types(z.dtype, torch.float32))


def token_losses(model: PreTrainedModel, sequences: Tensor) -> Tensor:
    """Cross-entropy in nats of each token given those before it, shape [n, tokens - 1]. Differentiable."""
    targets, z = sequences[:, 1:].to(model.device), logits(model, sequences)
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    return F.cross_entropy(z.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)


def sequence_losses(model: PreTrainedModel, sequences: Tensor) -> Tensor:
    """Mean token cross-entropy of each sequence in nats, shape [n]. Differentiable; one batch."""
    return token_losses(model, sequences).mean(dim=1)


def batched(
    measure: Callable[[PreTrainedModel, Tensor], Tensor],
    model: PreTrainedModel,
    sequences: Tensor,
    batch_size: int = 32,
) -> Tensor:
    """Apply ``measure(model, batch)`` without gradients to all sequences; the results, joined, on the CPU."""
    with torch.no_grad():
        return torch.cat([measure(model, batch).cpu() for batch in sequences.split(batch_size)])


def mean_loss(model: PreTrainedModel, sequences: Tensor) -> float:
    """The loss L of the book: ``sequence_losses`` in nats, averaged over the sequences [n, tokens]."""
    return batched(sequence_losses, model, sequences).double().mean().item()


def token_accuracy(model: PreTrainedModel, sequences: Tensor) -> float:
    """Share of tokens that are the model's most likely next token (memorisation accuracy, Jang et al. 2023)."""

    def hits(model: PreTrainedModel, batch: Tensor) -> Tensor:
        return logits(model, batch).argmax(dim=2) == batch[:, 1:].to(model.device)

    return batched(hits, model, sequences).double().mean().item()


def compare(
    model: PreTrainedModel, reference: PreTrainedModel, sequences: Tensor, batch_size: int = 32
) -> tuple[Tensor, Tensor, Tensor]:
    """All that one pass of each model over ``sequences`` [n, tokens] tells, on the CPU.

    Returns the model's loss on every token in nats, and whether the token is its most likely one, both of shape
    [n, tokens - 1]; and of every sequence KL(reference ‖ model) in nats, averaged over its tokens but the last,
    after which nothing is predicted, [n].
    """
    parts = []
    with torch.no_grad():
        for batch in sequences.split(batch_size):
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
