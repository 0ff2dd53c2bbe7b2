"""Three sizes of the same experiments: ``quick`` for newcomers, ``cpu`` for reference, ``gpu`` for hub models."""

import dataclasses
from typing import Any

from unlearnlib.experiment.paper import PAPER
from unlearnlib.models.loading import small_gpt2, small_gpt_neox, small_llama, small_opt
from unlearnlib.models.training import Training
from unlearnlib.texts.corpora import corpus_name


@dataclasses.dataclass(frozen=True)
class Profile:
    """How large the experiments are: the data, the model and the number of repetitions.

    ``forget``, ``retain`` and ``holdout`` count sequences of ``length`` tokens. ``model`` is a configuration to
    train from scratch, with a tokenizer of ``vocabulary`` entries trained on the corpus, or the name of a
    pretrained model, fine-tuned with its own tokenizer (``vocabulary`` is None), all of it or only its
    ``last_blocks`` transformer blocks.
    The relearning probe takes ``relearning_steps`` steps at ``relearning_rate``. So many ``references`` are
    trained for the calibrated attack; with none there is no such attack. Each of ``seeds`` draws its own splits,
    initial weights and batch order. What is ``given``, as method, knob and value,
    is not searched.
    """

    name: str
    corpus: str
    model: str | dict[str, Any]
    vocabulary: int | None
    length: int
    forget: int
    retain: int
    holdout: int
    training: Training
    seeds: tuple[int, ...]
    relearning_steps: int = 30
    relearning_rate: float = 1e-4
    last_blocks: int | None = None
    references: int = 2
    given: tuple[tuple[str, str, float], ...] = ()


QUICK = Profile(
    name="quick",
    corpus="reuters",
    model=small_opt(1024, hidden_size=64),
    vocabulary=1024,
    length=64,
    forget=64,
    retain=960,
    holdout=256,
    training=Training(epochs=15, learning_rate=3e-3),
    seeds=(0, 1),
)

# The small model of quick with more repetitions (chapters add methods and settings), on half of the retained texts
# in as many steps: one set of trained models, which most chapters share.
CPU = dataclasses.replace(
    QUICK,
    name="cpu",
    retain=512,
    training=Training(epochs=10, batch_size=16, learning_rate=3e-3),
    seeds=(0, 1, 2, 3, 4),
)

GPU = Profile(
    name="gpu",
    corpus="reuters",
    model=PAPER.model,
    vocabulary=None,
    length=PAPER.length,
    forget=PAPER.forget,
    retain=PAPER.retain,
    holdout=PAPER.holdout,
    training=PAPER.training,
    seeds=(0, 1, 2, 3, 4),
    given=PAPER.given,
)

PROFILES = {profile.name: profile for profile in (QUICK, CPU, GPU)}


def get_profile(name: str, corpus: str | None = None, seeds: int | None = None) -> Profile:
    """The profile called ``name``, on another corpus or with another number of seeds where these are given.

    Raises ValueError for an unknown profile or less than one seed, and as
    :func:`unlearnlib.texts.corpora.corpus_name` for a corpus or a file of texts.
    """
    if name not in PROFILES:
        raise ValueError(f"unknown profile {name!r}: choose one of {', '.join(PROFILES)}")
    profile = PROFILES[name]
    if corpus is not None:
        profile = dataclasses.replace(profile, corpus=corpus_name(corpus))
    if seeds is not None:
        if seeds < 1:
            raise ValueError(f"need at least one seed, not {seeds}")
        profile = dataclasses.replace(profile, seeds=tuple(range(seeds)))
    return profile


def corpus_names(given: str, *others: str) -> list[str]:
    """The names of the corpora that are listed with commas between them; of a file of texts, its stem.

    ``others`` are names that the chapter knows besides. Raises as :func:`unlearnlib.texts.corpora.corpus_name`.
    """
    return [each if each in others else corpus_name(each) for each in given.split(",")]


def on_second_corpus(settings: Profile, seeds: int) -> Profile:
    """The same experiment on another corpus: socialiqa, or reuters where socialiqa is the first.

    Socialiqa is small, so that no more than 960 sequences are retained and 256 held out.
    """
    return dataclasses.replace(
        settings,
        corpus="reuters" if settings.corpus == "socialiqa" else "socialiqa",
        retain=min(settings.retain, 960),
        holdout=min(settings.holdout, 256),
        seeds=tuple(range(seeds)),
    )


# The main branches of OPT have pickled weights alone, which are never loaded. These are the hub's conversions to
# safetensors, its open requests 35, 33 and 25; of the last only the beginning of the commit is on record,
# 0d66fae, and the client asks for all of it, or a name. No repository is "gated": none asks for consent.
HUB_ARCHITECTURES = {
    "OPT": (
        "facebook/opt-125m@1f44ae81e29a9f7525c8331302e5562e0d91f731",
        "facebook/opt-350m@061d15c4d9cc3e25b93c0393d0bcca4934eaa033",
        "facebook/opt-1.3b@refs/pr/25",
    ),
    "GPT-2": (
        "openai-community/gpt2@607a30d783dfa663caf39e06633721c8d4cfcd7e",
        "openai-community/gpt2-medium@6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
        "openai-community/gpt2-large@32b71b12589c2f8d625668d2335a01cac3249519",
    ),
    "Llama": (
        "HuggingFaceTB/SmolLM2-135M@93efa2f097d58c2a74874c7e644dbc9b0cee75a2",
        "HuggingFaceTB/SmolLM2-360M@f8027fd0eaeea54caa13c31d31b9fdc459c38b49",
        "HuggingFaceTB/SmolLM2-1.7B@effd688a12921b4cc83e3312b6feb579f70f9c71",
    ),
    "GPT-NeoX": (
        "EleutherAI/pythia-160m@50f5173d932e8e61f858120bcb800b97af589f46",
        "EleutherAI/pythia-410m@9879c9b5f8bea9051dcb0e68dff21493d67e9d4f",
        "EleutherAI/pythia-1.4b@fedc38a16eea3bd36a96b906d78d11d2ce18ed79",
    ),
}


def _without_given_model(settings: Profile) -> Profile:
    """Of a profile of new models that was given a pretrained one: with what its new models need, for they stay."""
    profile = PROFILES[settings.name]
    if settings.vocabulary is not None or profile.vocabulary is None:
        return settings
    names = ("vocabulary", "last_blocks", "relearning_steps", "relearning_rate")
    return dataclasses.replace(settings, **{name: getattr(profile, name) for name in names})


FEWER = {"vocabulary": 512, "length": 32, "forget": 32, "retain": 224}


def on_small_opt(settings: Profile) -> Profile:
    """The same experiment on the smallest OPT: a hub model, or a new one of two layers on fewer sequences."""
    settings = _without_given_model(settings)
    if settings.vocabulary is None:
        return dataclasses.replace(settings, model=HUB_ARCHITECTURES["OPT"][0])
    if settings.name == "quick":
        smaller, width = FEWER | {"training": Training(epochs=18, learning_rate=5e-3)}, 32
    else:
        smaller, width = {"training": Training(epochs=12, batch_size=16, learning_rate=3e-3)}, 64
    settings = dataclasses.replace(settings, **smaller)
    model = small_opt(settings.vocabulary, width, layers=2, context=settings.length)
    return dataclasses.replace(settings, model=model)


def architectures(settings: Profile) -> dict[str, list[Profile]]:
    """The same experiment on some sizes of each of four architectures, smallest first; the first seed only.

    Hub models where ``settings`` are for one. Else new models of two layers and two or three widths, with one
    training for all, on fewer sequences than in ``settings`` and with one reference model.
    """
    settings = _without_given_model(dataclasses.replace(settings, seeds=settings.seeds[:1]))
    if settings.vocabulary is None:
        found = HUB_ARCHITECTURES
    else:
        if settings.name == "quick":
            smaller, widths = FEWER, (32, 64)
        else:
            smaller, widths = {"forget": 32, "retain": 480}, (48, 64, 96)
        training = Training(epochs=18, learning_rate=5e-3)
        settings = dataclasses.replace(settings, training=training, references=1, **smaller)
        small = {"OPT": small_opt, "GPT-2": small_gpt2, "Llama": small_llama, "GPT-NeoX": small_gpt_neox}
        shape = {"layers": 2, "context": settings.length}
        found = {
            name: [new_model(settings.vocabulary, width, **shape) for width in widths]
            for name, new_model in small.items()
        }
    return {
        name: [dataclasses.replace(settings, model=model) for model in models] for name, models in found.items()
    }
