"""An erasure request: what may be asked."""

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

STRENGTHS = {
    "gradient_ascent": "step length along the gradient of the forget loss",
    "gradient_difference": "steps of Adam",
    "fisher_diagonal": "step length along (F + λI)⁻¹Δ, F the diagonal of the empirical Fisher",
    "fisher_dual": "step length along (F + λI)⁻¹Δ, F the whole empirical Fisher",
    "kfac": "step length along (C + λI)⁻¹Δ, C by K-FAC",
    "kfac:difference": "step length along (C + λI)⁻¹(Δ − g), C by K-FAC, g the gradient of what stays",
    "ekfac": "step length along (C + λI)⁻¹Δ, C by EK-FAC",
    "fisher_forgetting": "step length along (C + λI)⁻¹Δ, C by K-FAC, from weights with noise",
    "newton": "steps of Adam down KL(θ₀ ‖ θ) − (n₋/n₊) Δᵀ(θ − θ₀)",
}
"""The methods, and the unit in which each one's strength is a number."""
DESCENTS = ("gradient_difference", "newton")
"""The methods that take steps of an optimizer."""
KRONECKER = ("kfac", "kfac:difference", "ekfac", "fisher_forgetting")
"""The methods that build Kronecker factors."""


@dataclass(frozen=True)
class Request:
    """What shall be forgotten, by which model, and how.

    ``model`` and ``reference`` are folders or hub ids, the files as :func:`unlearnlib.texts.files.read_file` reads
    them, ``secrets`` a list or a file of one a line, and ``output`` a folder that does not exist yet. ``strength``
    is a number in the unit of ``STRENGTHS``, or ``"match"``: then the forget loss is brought to ``target_loss``
    nats, or where that is None to the loss of ``reference``. With ``"estimate"`` the target is estimated from the
    losses on holdout texts (:func:`unlearnlib.own.targets.estimate_targets`). ``earlier_forget_files`` are those
    of requests that were served before: all sets are forgotten together, by the model that has forgotten none.
    Texts are cut into sequences of ``length`` tokens. ``damping`` is λ and ``retain_weight`` the weight of what
    stays in gradient difference; None has either chosen on the validation part of the retained texts. ``noise`` is
    the length of Fisher Forgetting's noise as a share of the length of the weights, ``learning_rate`` is for
    gradient difference, newton and the probe; for a target newton chooses its own around it. ``factors`` is a
    folder where Kronecker factors are kept as they are built and found again: by the same request if it was
    interrupted, or by a later one of the same model and texts to keep.

    Raises ValueError for settings that cannot be, FileExistsError if the output exists.
    """

    model: str
    forget_file: str
    retain_file: str
    output: str
    holdout_file: str | None = None
    earlier_forget_files: str | Sequence[str] = ()
    secrets: str | Sequence[str] = ()
    method: str = "kfac"
    strength: float | str = "match"
    reference: str | None = None
    target_loss: float | None = None
    length: int = 64
    damping: float | None = None
    retain_weight: float | None = None
    noise: float = 1e-2
    learning_rate: float = 2e-5
    seed: int = 0
    factors: str | None = None

    def __post_init__(self) -> None:
        for name in ("model", "forget_file", "retain_file", "output"):
            if not getattr(self, name):
                raise ValueError(f"{name} is missing: every request needs a model, two files and an output folder")
        names = (
            "model",
            "reference",
            "forget_file",
            "retain_file",
            "holdout_file",
            "secrets",
            "output",
            "factors",
        )
        for name in names:
            value = getattr(self, name)
            if isinstance(value, int | float):  # what papermill makes of a name of digits, with zeros lost
                raise ValueError(f"{name} must be a name, not the number {value}: write it with ./ before it")
            if isinstance(value, str | Path):
                object.__setattr__(self, name, _expanded(value))
        object.__setattr__(self, "earlier_forget_files", _names(self.earlier_forget_files))
        if self.method not in STRENGTHS:
            raise ValueError(f"unknown method {self.method!r}: choose one of {', '.join(STRENGTHS)}")
        if self.strength == "match":
            if self.reference is None and self.target_loss is None:
                raise ValueError(
                    "strength 'match' needs a reference model or a target_loss in nats. With neither take "
                    "'estimate', which needs a holdout_file, or a number"
                )
        elif self.target_loss is not None:
            raise ValueError("target_loss is for strength 'match': leave one of the two out")
        elif self.strength == "estimate":
            if self.holdout_file is None:
                raise ValueError(
                    "strength 'estimate' needs a holdout_file: the target comes from texts of the same kind that "
                    "the model has never seen"
                )
        elif not _positive(self.strength):
            raise ValueError(
                f"the strength must be 'match', 'estimate' or a positive number, not {self.strength!r}"
            )
        elif self.method in DESCENTS:
            if self.strength != int(self.strength):
                raise ValueError(f"the strength of {self.method} is a number of steps, not {self.strength!r}")
            if self.method == "gradient_difference" and self.retain_weight is None:
                raise ValueError("a number of steps of gradient_difference needs a retain_weight to go with it")
        if self.factors is not None and self.method not in KRONECKER:
            raise ValueError(
                f"{self.method} has no Kronecker factors: leave factors out, or choose {' or '.join(KRONECKER)}"
            )
        for name in ("target_loss", "damping", "retain_weight", "noise", "learning_rate"):
            if not (getattr(self, name) is None or _positive(getattr(self, name))):
                raise ValueError(f"{name} must be a positive number, not {getattr(self, name)!r}")
        if not isinstance(self.length, int) or self.length < 2:
            raise ValueError(f"length must be a whole number of tokens, 2 or more, not {self.length!r}")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or abs(self.seed) >= 2**63:
            raise ValueError(f"seed must be a whole number of at most 18 digits, not {self.seed!r}")
        if not isinstance(self.secrets, str | Sequence):
            raise ValueError("secrets must be a list of texts, or a file of one a line")
        for i, secret in enumerate(() if isinstance(self.secrets, str) else self.secrets, 1):
            if not isinstance(secret, str):  # a number loses its zeros
                raise ValueError(f"secret {i} is no text: put it between quotation marks")
        self.check_output()

    @property
    def files(self) -> dict[str, str | None]:
        """The files of texts, by what is in them; those of earlier requests are ``forget_1``, ``forget_2``, ..."""
        earlier = {f"forget_{i}": name for i, name in enumerate(self.earlier_forget_files, 1)}
        return {
            "forget": self.forget_file,
            **earlier,
            "retain": self.retain_file,
            "holdout": self.holdout_file,
        }

    def public(self, hashes: dict[str, str]) -> dict[str, Any]:
        """The settings as JSON values: of files the name and hash, of folders the name, of secrets nothing.

        ``hashes`` are those of the files' bytes as they were read, by what is in them.
        """
        settings = {name: value for name, value in asdict(self).items() if not name.endswith(("_file", "_files"))}
        del settings["secrets"], settings["output"], settings["factors"]
        for name in ("model", "reference"):
            if settings[name] and Path(settings[name]).is_dir():
                settings[name] = Path(settings[name]).resolve().name
        files = {split: {"name": Path(self.files[split]).name, "sha256": known} for split, known in hashes.items()}
        return settings | {"files": files}

    def check_output(self) -> None:
        """Raise FileExistsError if the output exists, ValueError if what is written lies where it must not.

        That is, output or factors within a model's folder, or factors within the output.
        This is a first look: :func:`unlearnlib.cache.new_folder` holds the place while the work is done.
        """
        output = Path(self.output)
        if os.path.lexists(output):
            raise FileExistsError(f"the output {output} exists and is never overwritten: name a new folder")
        written = {"output": output} | ({"folder of factors": Path(self.factors)} if self.factors else {})
        for source in filter(None, (self.model, self.reference)):
            for name, place in written.items():
                if Path(source).is_dir() and place.resolve().is_relative_to(Path(source).resolve()):
                    raise ValueError(f"the {name} {place} lies within {source}, which must not change: move it")
        if self.factors and Path(self.factors).resolve().is_relative_to(output.resolve()):
            raise ValueError(f"the factors {self.factors} lie within the output, which is made last: move them")


def _expanded(name: str | Path) -> str:
    """A name of a file or folder with the home folder in place of a tilde."""
    return str(Path(name).expanduser() if str(name).startswith("~") else name)


def _names(files: object) -> tuple[str, ...]:
    """Names of files: a sequence of them, or one, or several in one text with commas between them."""
    if isinstance(files, str | Path):
        files = [name for name in str(files).split(",") if name.strip()]
    if not isinstance(files, Sequence) or not all(isinstance(name, str | Path) for name in files):
        raise ValueError("earlier_forget_files must be names of files, a list of them or with commas between them")
    return tuple(_expanded(str(name).strip()) for name in files)


def _positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0 and math.isfinite(value)
