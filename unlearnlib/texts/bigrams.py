"""How hard a text is, by a model that anybody can afford: the bigrams of some other texts."""

import torch
from torch import Tensor


class Bigrams:
    """Probabilities of the next token given the last, counted in ``sequences`` [n, tokens] of a ``vocabulary``.

    p(b|a) = (c(ab) + k(a) p(b)) / (c(a) + k(a)), where c counts and k(a) is how many different tokens follow a:
    the less is known of what follows a, the more counts how frequent b is at all (Witten & Bell 1991). p(b) is
    b's share of the tokens after one has been added to every count, so that nothing is impossible.
    Raises ValueError if there is no token to count.
    """

    def __init__(self, sequences: Tensor, vocabulary: int) -> None:
        if sequences.numel() == 0:
            raise ValueError("there is nothing to count: give texts that make a sequence or more")
        self.vocabulary = vocabulary
        counts = torch.bincount(sequences.flatten(), minlength=vocabulary).double() + 1
        self.frequency = counts / counts.sum()
        self.pairs, self.counts = self._pairs(sequences).unique(return_counts=True)
        firsts = self.pairs // vocabulary
        self.followers = torch.bincount(firsts, minlength=vocabulary)
        self.seen = torch.bincount(firsts, weights=self.counts.double(), minlength=vocabulary)

    def losses(self, sequences: Tensor) -> Tensor:
        """The mean cross-entropy of each sequence's tokens but the first, in nats, shape [n]."""
        pairs = self._pairs(sequences)
        places = torch.searchsorted(self.pairs, pairs).clamp(max=len(self.pairs) - 1)
        count = torch.where(self.pairs[places] == pairs, self.counts[places], 0)
        a, b = pairs // self.vocabulary, pairs % self.vocabulary
        k = self.followers[a].clamp(min=1)  # after a token that was not seen, frequency alone counts
        return -((count + k * self.frequency[b]) / (self.seen[a] + k)).log().mean(dim=1)

    def _pairs(self, sequences: Tensor) -> Tensor:
        """Each token and the next as one number, [n, tokens - 1]."""
        return sequences[:, :-1] * self.vocabulary + sequences[:, 1:]
