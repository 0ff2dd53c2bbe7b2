"""What the paper's text would settle and no source at hand tells: one name for each, all read by the profile gpu.

Whoever has the text puts its values here, and ``make book PROFILE=gpu`` runs them. The page "What we know of the
paper" says of each what is known; a test sees to it that the page names all of them and that the profile obeys.
"""

from dataclasses import dataclass, field

from unlearnlib.models.training import Training


@dataclass(frozen=True)
class Paper:
    """Our stand-ins for the settings of Gu et al. (2024, arXiv 2403.10557), where nothing else is said.

    ``model`` is fine-tuned as in ``training`` on sequences of ``length`` tokens of each of ``corpora``: of so many
    in ``retain``, and so many in ``forget`` that are to be forgotten. The inverse Fisher is of ``gradients``
    sequences, in blocks of ``block_size`` weights, with ``damping`` λ. In the recursion's place other curvatures
    read more sequences. Ascent batch by batch goes at ``ascent_rate``. Private training is for each of
    ``epsilons``. In a row come so many ``requests``, of ``request_size`` sequences each.
    A ``damping`` or ``ascent_rate`` of None is chosen by the rule of :mod:`unlearnlib.methods.tuning`.
    """

    model: str = "facebook/opt-125m@1f44ae81e29a9f7525c8331302e5562e0d91f731"
    corpora: str = "lambada,piqa,mathqa,arc_easy"
    length: int = 128
    forget: int = 64
    retain: int = 1984
    holdout: int = 512
    training: Training = field(default_factory=lambda: Training(epochs=4, learning_rate=1e-4))
    gradients: int = 16
    block_size: int = 64
    damping: float | None = None
    ascent_rate: float | None = None
    epsilons: tuple[float, ...] = (1, 8, 100, 2000)
    requests: int = 12
    request_size: int = 16

    @property
    def given(self) -> tuple[tuple[str, str, float], ...]:
        """Method, knob and value of what is not to be chosen."""
        known = (
            ("fisher_recursion", "damping", self.damping),
            ("gradient_ascent:sgd", "learning_rate", self.ascent_rate),
        )
        return tuple(one for one in known if one[-1] is not None)


PAPER = Paper()
