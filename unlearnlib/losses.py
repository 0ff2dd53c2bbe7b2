"""The loss of the book, from logits to means over sequences: all that is computed on a model goes through here."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from unlearnlib import distributed

MOST_SEQUENCES = 32
"""The most sequences that go through a model at a time."""
MOST_LOGITS = 2**26
"""The most logits at a time: several tensors of their size are in memory at once."""


def check_length(model: PreTrainedModel, tokens: int) -> None:
    """Raise ValueError if sequences of ``tokens`` tokens do not fit the model's context."""
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and tokens > context:
        raise ValueError(
            f"sequences of {tokens} tokens do not fit the model's context of {context}: cut them shorter"
        )


@dataclass
class Passes:
    """How many sequences went through models: forward alone, and forward to be differentiated."""

    forward: int = 0
    differentiated: int = 0

    @property
    def plain(self) -> float:
        """In plain passes over one sequence, forward and backward: a forward pass alone is a third of one."""
        return self.differentiated + self.forward / 3


_counts: list[Passes] = []


@contextlib.contextmanager
def counted_passes() -> Iterator[Passes]:
    """Count, within the block, the sequences whose logits are computed, of whatever model."""
    passes = Passes()
    _counts.append(passes)
    try:
        yield passes
    finally:
        _counts[:] = [other for other in _counts if other is not passes]


@contextlib.contextmanager
def uncounted() -> Iterator[None]:
    """Within the block, passes are not counted, as those of a model that has shapes and no numbers."""
    open_counts = _counts[:]
    _counts.clear()
    try:
        yield
    finally:
        _counts[:] = open_counts


def note_pass(sequences: int) -> None:
    """Tell all open counts that so many sequences go through a model."""
    for passes in _counts:
        if torch.is_grad_enabled():
            passes.differentiated += sequences
        else:
            passes.forward += sequences


def logits(model: PreTrainedModel, sequences: Tensor) -> Tensor:
    """Logits of every next token, shape [n, tokens - 1, vocabulary]; the last token predicts nothing."""
    check_length(model, sequences.shape[1])
    note_pass(len(sequences))
    return model(input_ids=sequences[:, :-1].to(model.device), use_cache=False).logits


def hidden_states(model: PreTrainedModel, sequences: Tensor, layer: int) -> Tensor:
    """Activations after ``layer`` blocks, at the tokens that predict another, shape [n, tokens - 1, width].

    Layer 0 is what the first block receives; after the last block the model's final norm is applied, where it has
    one. In at least float32. Raises ValueError if the model has no such layer.
    """
    number = model.config.get_text_config().num_hidden_layers
    if not 0 <= layer <= number:
        raise ValueError(f"the model has {number} blocks, so that there is no layer {layer}: choose 0 to {number}")
    check_length(model, sequences.shape[1])
    note_pass(len(sequences))
    inputs = sequences[:, :-1].to(model.device)
    h = model(input_ids=inputs, use_cache=False, output_hidden_states=True).hidden_states[layer]
    return h.to(torch.promote_types(h.dtype, torch.float32))


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


def batches(model: PreTrainedModel, sequences: Tensor) -> tuple[Tensor, ...]:
    """The sequences [n, tokens] cut into parts that the model takes at a time, :data:`MOST_SEQUENCES` or fewer.

    Fewer where those would have more than :data:`MOST_LOGITS`, but at least one; of no sequences no part.
    """
    if len(sequences) == 0:
        return ()
    of_one = max(1, sequences.shape[1] - 1) * len(model.get_output_embeddings().weight)
    return sequences.split(max(1, min(MOST_SEQUENCES, MOST_LOGITS // of_one)))


def shared_batches(model: PreTrainedModel, sequences: Tensor) -> list[tuple[Tensor, int]]:
    """The :func:`batches` of this process's share of the sequences, and how many of each one's sequences count.

    Those are all, but where weights are divided among the processes: then every pass is everybody's, and who has
    less to do than others passes a sequence for them, of which nothing counts.
    """
    mine, most = (sequences[distributed.shares(len(sequences))[i]] for i in (distributed.rank(), 0))
    found = [(batch, len(batch)) for batch in batches(model, mine)]
    if distributed.are_divided(model.parameters()):
        found += [(sequences[:1], 0)] * (len(batches(model, most)) - len(found))
    return found


def batched(
    measure: Callable[[PreTrainedModel, Tensor], Tensor], model: PreTrainedModel, sequences: Tensor
) -> Tensor:
    """Apply ``measure(model, batch)`` without gradients to all sequences; the results, joined, on the CPU.

    Several processes take a share each, and all get everything.
    """
    number = len(sequences)
    if number < distributed.size():  # not one for each
        with distributed.alone():
            return batched(measure, model, sequences)
    divided = distributed.are_divided(model.parameters())
    with torch.no_grad(), distributed.together(met_within=divided):
        shared = shared_batches(model, sequences)
        found = torch.cat([measure(model, batch)[:real].cpu() for batch, real in shared])
    return distributed.joined(found, number)


def mean_loss(model: PreTrainedModel, sequences: Tensor) -> float:
    """The loss L of the book: ``sequence_losses`` in nats, averaged over the sequences [n, tokens]."""
    return batched(sequence_losses, model, sequences).double().mean().item()
