"""What each chapter does at each profile: how many seeds and sequences, which grids, what is for large ones only.

An entry that is a field of :class:`unlearnlib.experiment.profiles.Profile` changes the profile for that chapter;
``seeds`` counts them, and ``left_out_seeds``, by corpus, are not among them. The others are the chapter's own, by
the names that its cells use.
"""

from typing import Any

from unlearnlib.experiment.paper import PAPER
from unlearnlib.experiment.profiles import GPU, HUB_ARCHITECTURES, QUICK
from unlearnlib.models.loading import SMOLLM2, small_llama, small_opt
from unlearnlib.models.training import Training

# What chapters 11 and 12 compare, quick without the last of the first-order methods, which takes most steps.
FIRST_ORDER = ("gradient_ascent", "gradient_ascent:sgd", "gradient_difference", "npo:retain")
SECOND_ORDER = ("fisher_recursion", "fisher_dual", "fisher_diagonal", "kfac")
PAPERS_INVERSE = {"m_recursion": PAPER.gradients, "block_size": PAPER.block_size}
CASE_STUDIES = {
    "corpus": "posts",
    "length": 64,
    "seeds": 5,
    "candidates": 256,
    "passage_length": 64,
    "m_recursion": 128,
    "block_size": 64,
    "methods": (*FIRST_ORDER, "fisher_recursion", "fisher_diagonal", "kfac"),
    "most": 12,
    "max_steps": 200,
}
SMALL_CASES = {
    "model": small_opt(1024, hidden_size=64, layers=2),
    "training": Training(epochs=12, batch_size=16, learning_rate=4e-3),
    "relearning_steps": 10,
    "relearning_rate": 3e-4,
}

# Of chapter 16: corpora of real texts, how many of them are in each split, copies of each secret planted on one
# side, the tokens of a memory and how many come before the first. Trained for long, so that there is something
# to forget.
INDELIBLE = {
    "length": 64,
    "model": small_opt(1024, hidden_size=64, layers=2),
    "training": Training(epochs=24, batch_size=16, learning_rate=4e-3),
    "corpora": "posts,licences",
    "texts": {"holdout": 24, "forget": 16, "retain": 64},
    "repeats": (*[1] * 10, 2, 2, 4, 4),
    "span": 6,
    "prompt": 8,
    "m_recursion": 128,
    "block_size": 64,
    "methods": ("gradient_ascent", *FIRST_ORDER[1:3], "fisher_recursion", "kfac"),
}

# The processes of chapter 21 and widths and layers of its models, whose weights and sequences are random.
MANY_GPUS = {"seeds": 1, "length": 49, "forget": 16, "m": 32, "processes": 2}

# The model of chapter 13 and its sets are small, because private training is slow.
PRIVATE = {
    "model": small_llama(1024, hidden_size=32, layers=2, context=64),
    "vocabulary": 1024,
    "training": Training(epochs=10, learning_rate=6e-3),
    "length": 32,
    "forget": 64,
    "retain": 448,
    "holdout": 256,
    "epsilons": (1, 8, 100, 2000),
    "knobs": {"learning_rate": (2.5e-3, 1e-2, 4e-2), "batch_size": (16, 32, 64)},
    "most": 8,
    "shorter": (1, 2, 3, 5),  # epochs
    # With seed 4 two of the maths problems, one kept and one held out, share a sequence.
    "left_out_seeds": {"maths": (4,)},
}

# The paper's three axes, on one small OPT that knows its secrets. All settings are chosen in "most" trials. The
# recursion is timed around the middle of the three grids, of which one at a time is gone along.
THREE_AXES = {
    "model": small_opt(1024, hidden_size=64, layers=2, context=32),
    "vocabulary": 1024,
    "training": Training(epochs=12, batch_size=16, learning_rate=6e-3),
    "length": 32,
    "forget": 64,
    "retain": 320,
    "holdout": 128,
    "copies": 4,
    "m_recursion": 256,
    "block_size": 64,
    "delta": 1e-5,
    "private": {"learning_rate": (2.5e-3, 1e-2, 4e-2)},
    "blocks_kept": (1, 4, 16, 64, 256),
}

# Requests in a row: sequences of each; after how many a setting is judged, of how many; steps of Adam for each.
SERIES = {"size": 16, "opening": 3, "most": 12, "steps": 100, "block_size": 64}
# A relearning probe in a third of the steps, each three times as large, for the largest models of quick.
SHORT_PROBE = {"relearning_steps": 10, "relearning_rate": 3e-4}
# The same again in six steps, and a second corpus with half of the retained texts and a single reference model:
# for chapters 6 and 7, which compare curvatures on two corpora.
SHORTER_PROBE = {"relearning_steps": 6, "relearning_rate": 5e-4}
SHORT_SECOND = {"retain": 480, "references": 1}

# Of chapter 3: how many shadow models, by what the probe's rate is multiplied, and what share of a text's first
# half is replaced.
ATTACKED = {"shadows": 16, "factors": (1.0, 4.0, 16.0), "replaced": (0.0, 0.25, 1.0), "stride": 16}

# "most" settings of a method are tried, for each of the architectures "most_each", in "sizes_each" sizes; the
# frontiers go through "shares" of the way to the target.
FISHER_UPDATES = {
    "m_recursion": 256,
    "block_size": 64,
    "most": 12,
    "most_each": 6,
    "sizes_each": 3,
    "shares": (0.5, 0.75, 1.0, 1.25),
    "max_steps": 200,
}

# A few tales, on which a pretrained model is fine-tuned until it knows them by heart. "methods" are those of the
# first seed, the others have the four that are compared; "knobs" have where the search for settings begins, of
# which "most" are tried. "deep" takes long, and is measured on the first seed.
REAL_MODEL = {
    "corpus": "tales",
    "vocabulary": None,
    "steps": 2,
    "m_factors": 96,
    "m_dual": 64,
    "most": 6,
    "max_steps": 30,
    "knobs": {
        "kfac": {"damping": (1e-8, 1e-7, 1e-6)},
        "gradient_difference": {"learning_rate": (1e-5, 3e-5, 9e-5), "retain_weight": (1.0, 3.0, 9.0)},
    },
    "methods": (
        "gradient_ascent",
        "gradient_difference",
        "kfac",
        "kfac:damped",
        "kfac:refreshed",
    ),
    "compared": ("gradient_ascent", "gradient_difference", "kfac", "kfac:damped", "kfac:refreshed"),
    "deep": {"rounding": True, "extraction": 32},
    "rounded": 32,  # sequences on which number formats are compared
    "timed": 16,  # sequences of a pass that is timed
    "elsewhere": 48,  # sequences of each other corpus
    "relearning_steps": 6,
    "relearning_rate": 4e-5,
    "references": 1,
}

# All methods there are, on cases so small that each can be given the same search; the first seed chooses.
# A case so small, and trained so long, that the model can say its texts by heart, at whatever profile.
BY_HEART = {
    "seeds": 1,
    "model": small_opt(1024, hidden_size=64, layers=2, context=32),
    "vocabulary": 1024,
    "length": 32,
    "forget": 16,
    "retain": 96,
    "holdout": 64,
    "training": Training(epochs=30, batch_size=16, learning_rate=4e-3),
    "references": 0,
    "methods": ("gradient_ascent", "gradient_difference", "kfac"),
    "shares": tuple(step / 5 for step in range(9)),
    "prompt": 10,
    "most": 5,
    "max_steps": 60,
}
FAIR_FIGHT = {
    "methods": (
        "gradient_ascent",
        "gradient_ascent:sgd",
        "gradient_ascent:adam",
        "gradient_ascent:repaired",
        "gradient_ascent:kl",
        "gradient_difference",
        "npo:retain",
        "simnpo:retain",
        "rmu",
        "soul",
        "fisher_recursion",
        "fisher_dual",
        "fisher_diagonal",
        "kfac",
        "kfac:steps",
        "newton_cg:kfac",
    ),
    "forget": 32,
    "retain": 256,
    "holdout": 128,
    "m": 192,
    "m_recursion": 192,
    "block_size": 64,
    "most": 10,
    "max_steps": 200,
}

# Methods of the fair fight whose movements are looked at, with "products" sequences in the exact curvature and
# "krylov" steps of Lanczos's method; "top" singular vectors of a matrix span what has moved.
MOVED = FAIR_FIGHT | {
    "methods": (
        "gradient_ascent",
        "gradient_ascent:sgd",
        "gradient_ascent:adam",
        "gradient_difference",
        "npo:retain",
        "soul",
        "fisher_recursion",
        "fisher_dual",
        "fisher_diagonal",
        "kfac",
    ),
    "references": 0,
    "products": 128,
    "krylov": 40,
    "top": 4,
}

# The proxy of chapter 22 is to be cheap: smaller than the model, and trained for a shorter time.
OWN_MODEL = {
    "proxy": small_opt(1024, hidden_size=32, layers=2),
    "proxy_training": Training(epochs=6, learning_rate=3e-3),
    "dampings": (1e-3, 4e-3, 1.6e-2, 6.4e-2),
}

# "forget" counts the candidates of chapter 15, all of which are scored, and "retain" what is never removed; of the
# "repeats" in which every model is trained, methods are served in the first "served".
ONION = {
    "model": small_opt(1024, hidden_size=32, layers=2, context=32),
    "length": 32,
    "forget": 256,
    "retain": 64,
    "holdout": 256,
    "training": Training(epochs=4, batch_size=16, learning_rate=4e-3),
    "shadows": 16,
    "layer": 64,
    "draws": 2,
    "repeats": 4,
    "served": 2,
    "false_alarms": 0.01,
    "methods": (
        "gradient_ascent",
        "gradient_ascent:sgd",
        "gradient_difference",
        "fisher_recursion",
        "fisher_diagonal",
        "kfac",
    ),
    "most": 12,
    "max_steps": 200,
    "curvatures": {"m_recursion": 192, "block_size": 64, "m_factors": 192},
    "dampings": (1e-5, 1e-3, 1e-1),  # training is short, which asks for much damping
    "swept": (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0),
}

# What chapter 18 compares on each corpus, with so many products with the curvature at the most on the first case,
# dampings that are gone through there, and multiples of the strength that theory gives.
LAST_GAP = {
    "methods": ("gradient_difference", "kfac", "newton_cg:natural", "newton_descent"),
    "products": 12,
    "dampings": (1e-4, 1e-3, 1e-2),
    "multiples": (0.5, 1.0, 2.0),
    "rates": (4e-4, 8e-4, 1.6e-3),
    "m_blocks": 224,
    "large": True,
    "relearning_steps": 10,
    "relearning_rate": 3e-4,
}

# The same on a pretrained model, where chapter 18 is "large"; "knobs" have where the search for settings begins.
LAST_GAP_REAL = {
    "corpus": "tales",
    "model": SMOLLM2,
    "vocabulary": None,
    "seeds": 1,
    "references": 1,
    "relearning_steps": 6,
    "relearning_rate": 4e-5,
    "most": 5,
    "max_steps": 30,
    "knobs": {
        "gradient_difference": {"learning_rate": (1e-5, 3e-5, 9e-5), "retain_weight": (1.0, 3.0, 9.0)},
        "kfac": {"damping": (1e-7, 1e-6, 1e-5)},
        "newton_descent": {"learning_rate": (1e-5, 3e-5, 9e-5)},
    },
}

CHAPTERS: dict[str, dict[str, dict[str, Any]]] = {
    "unlearning_problem": {"quick": {"seeds": 1}, "cpu": {}, "gpu": {}},
    "gradient_ascent": {
        "quick": {
            "seeds": 1,
            "forget": 32,
            "retain": 256,
            "holdout": 128,
            "model": small_opt(1024, hidden_size=64, layers=2),
            "relearning_steps": 10,
            "steps": 24,
            "tried": 6,
            "left_out": ("gradient_ascent:kl",),  # the dearest
        },
        "cpu": {"steps": 200, "tried": 12, "left_out": ()},
        "gpu": {"steps": 200, "tried": 12, "left_out": ()},
    },
    "erased_or_hidden": {
        "quick": ATTACKED
        | {
            "shadows": 12,
            "model": small_opt(1024, hidden_size=64, layers=2),
            "retain": 256,
            "holdout": 128,
            "relearning_steps": 10,
            "seeds": 1,
            "steps": 32,
            "most": 6,
            "m_factors": 128,
        },
        "cpu": ATTACKED | {"seeds": 5, "steps": 200, "most": 12, "m_factors": 448},
        "gpu": ATTACKED | {"seeds": 1, "steps": 200, "most": 12, "m_factors": 1024, "shadows": 8, "holdout": 256},
    },
    "newton": {
        "quick": {"draws": 10, "noise_draws": 3, "requests": 120},
        "cpu": {"draws": 50, "noise_draws": 20, "requests": 600},
        "gpu": {"draws": 50, "noise_draws": 20, "requests": 600},
    },
    "newton_language_model": {
        "quick": SHORT_PROBE
        | {"seeds": 1, "sequences": 64, "steps": 20, "most": 6, "max_steps": 60, "numbers": (2, 8)},
        "cpu": {"sequences": 256, "steps": 40, "most": 12, "max_steps": 200, "numbers": (2, 5, 10, 20)},
        "gpu": {"sequences": 512, "steps": 40, "most": 12, "max_steps": 200, "numbers": (2, 5, 10, 20)},
    },
    "fisher": {
        "quick": SHORTER_PROBE
        | {
            "seeds": 1,
            "second_seeds": 1,
            "most": 5,
            "m": 256,
            "m_recursion": 256,
            "block_size": 64,
            "second": SHORT_SECOND,
            "block_sizes": (1, 8, 64),
            "few": (16, 64),
            "blank": QUICK.model,
            "m_blank": 96,
            "sampled": False,
            "large": False,
        },
        "cpu": {
            "seeds": 5,
            "second_seeds": 5,
            "second": {},
            "most": 12,
            "m": 448,
            "m_recursion": 256,
            "block_size": 64,
            "block_sizes": (1, 4, 32, 64, 256),
            "few": (16, 64),
            "blank": small_opt(2048),
            "m_blank": 256,
            "sampled": True,
            "large": True,
        },
        "gpu": {
            "seeds": 3,
            "second_seeds": 1,
            "second": {},
            "most": 12,
            "m": 32,
            "m_recursion": PAPER.gradients,
            "block_size": PAPER.block_size,
            "block_sizes": (1, 4, 32, 64, 256),
            "few": (8,),
            "blank": small_opt(2048),
            "m_blank": 256,
            "sampled": True,
            "large": False,
        },
    },
    "kronecker": {
        "quick": SHORTER_PROBE
        | {"seeds": 1, "most": 5, "second_seeds": 1, "second": SHORT_SECOND, "m": 256, "few": 32},
        "cpu": {"seeds": 5, "most": 12, "second_seeds": 5, "second": {}, "m": 448, "few": 256},
        "gpu": {"seeds": 3, "most": 12, "second_seeds": 1, "second": {}, "m": 1024, "few": 64},
    },
    "fisher_updates": {
        "quick": FISHER_UPDATES
        | SHORT_PROBE
        | {"seeds": 1, "m": 256, "m_factors": 256, "draws": 2, "most": 5, "most_each": 5, "max_steps": 60}
        | {"sizes_each": 1, "shares": (0.5, 1.0, 1.25)},
        "cpu": FISHER_UPDATES | {"seeds": 5, "m": 448, "m_factors": 448, "draws": 8},
        "gpu": FISHER_UPDATES | PAPERS_INVERSE | {"seeds": 3, "m": 32, "m_factors": 1024, "draws": 3},
    },
    "fair_fight": {
        "quick": FAIR_FIGHT
        | {
            "seeds": 2,
            "model": small_opt(1024, hidden_size=32, layers=2, context=32),
            "length": 32,
            "training": Training(epochs=15, batch_size=16, learning_rate=4e-3),
            "relearning_steps": 10,
            "relearning_rate": 3e-4,
            "most": 5,
            "max_steps": 100,
        },
        "cpu": FAIR_FIGHT | SMALL_CASES | {"seeds": 5},
        "gpu": FAIR_FIGHT | PAPERS_INVERSE | {"seeds": 3, "forget": 64, "retain": 640, "holdout": 192, "m": 32},
    },
    "by_heart": {"quick": BY_HEART, "cpu": BY_HEART, "gpu": BY_HEART},
    "moved_weights": {
        "quick": MOVED
        | {
            "seeds": 1,
            "model": small_opt(1024, hidden_size=32, layers=2, context=32),
            "length": 32,
            "training": Training(epochs=15, batch_size=16, learning_rate=4e-3),
            "most": 6,
            "max_steps": 100,
        },
        "cpu": MOVED | SMALL_CASES | {"seeds": 5, "top": 8},
        "gpu": MOVED
        | {"seeds": 3, "forget": 64, "retain": 640, "holdout": 192, "m": 32, "m_recursion": 16, "top": 16},
    },
    "cost": {
        "quick": {
            "seeds": 1,
            "sizes": ((32, 2), (48, 2), (64, 3), (80, 4), (96, 4)),
            "sequences": 8,
            "size": (32, 2),
            "numbers": (4, 8, 16, 32, 64),
            "more": (128, 256),
        },
        "cpu": {
            "seeds": 1,
            "sizes": ((64, 2), (96, 3), (128, 4), (192, 4), (256, 5), (320, 7)),
            "sequences": 8,
            "size": (64, 4),
            "numbers": (8, 16, 32, 64, 128),
            "more": (256,),
        },
        "gpu": {
            "seeds": 1,
            "sizes": ((256, 4), (384, 6), (512, 8), (768, 12), (1024, 16)),
            "sequences": 32,
            "size": (256, 4),
            "numbers": (16, 32, 64, 128, 256),
            "more": (512,),
        },
    },
    "many_gpus": {
        "quick": MANY_GPUS | {"sizes": ((48, 2), (96, 2), (192, 2))},
        "cpu": MANY_GPUS | {"sizes": ((64, 2), (128, 4), (256, 4)), "m": 128},
        "gpu": MANY_GPUS | {"vocabulary": 1024, "sizes": ((128, 4), (256, 4), (512, 4)), "m": 128},
    },
    "real_model": {
        "quick": REAL_MODEL
        | {
            "model": SMOLLM2,
            "last_blocks": 2,
            "training": Training(epochs=4, batch_size=8, learning_rate=1e-3),
            "length": 16,
            "forget": 8,
            "retain": 32,
            "holdout": 8,
            "seeds": 1,
            "m_factors": 28,
            "most": 5,
            "max_steps": 8,
            "knobs": {
                "kfac": {"damping": (1e-5, 1e-4, 1e-3)},
                "gradient_difference": {
                    "learning_rate": (1.5e-4, 4.5e-4, 1.35e-3),
                    "retain_weight": (1.0, 3.0, 9.0),
                },
            },
            "methods": REAL_MODEL["compared"],
            "deep": {},
            "rounded": 4,
            "timed": 8,
            "elsewhere": 4,
            "relearning_steps": 2,
            "relearning_rate": 5e-5,
        },
        "cpu": REAL_MODEL
        | {
            "model": SMOLLM2,
            "training": Training(epochs=4, batch_size=8, learning_rate=2e-4),
            "length": 32,
            "forget": 16,
            "retain": 72,
            "holdout": 48,
            "seeds": 3,
            "m_factors": 56,
            "max_steps": 20,
            "deep": {"rounding": True, "extraction": 16},
            "relearning_steps": 4,
        },
        "gpu": REAL_MODEL
        | {
            "training": Training(epochs=4, batch_size=16, learning_rate=2e-5, bfloat16=True, checkpointing=True),
            "length": 128,
            "forget": 64,
            "retain": 384,
            "holdout": 128,
            "seeds": 3,
            "knobs": REAL_MODEL["knobs"]
            | {
                "fisher_diagonal:expected": {"damping": (1e-7, 1e-6, 1e-5)},
                "fisher_dual": {"damping": (1e-3, 1e-2, 1e-1)},
            },
            "methods": (*REAL_MODEL["methods"], "fisher_diagonal:expected", "fisher_dual", "kfac:held"),
        },
    },
    "four_datasets": {
        "quick": {
            "corpora": "reuters,tales,socialiqa,maths",
            "seeds": 1,
            # On half of the profile's batch: as many steps in half of its epochs, and so of its time.
            "training": Training(epochs=8, batch_size=16, learning_rate=3e-3),
            "references": 1,
            "forget": 32,
            "retain": 256,
            "holdout": 112,
            "relearning_steps": 6,
            "m": 192,
            "m_recursion": 192,
            "block_size": 64,
            "methods": (*FIRST_ORDER[:-1], *SECOND_ORDER),
            "most": 5,
            "max_steps": 60,
            "shares": (1.0,),
            "requests": (1, 32),
        },
        "cpu": {
            "corpora": "reuters,tales,socialiqa,maths",
            "seeds": 5,
            "relearning_steps": 15,
            "m": 448,
            "m_recursion": 256,
            "block_size": 64,
            "methods": (*FIRST_ORDER, *SECOND_ORDER),
            "most": 12,
            "max_steps": 200,
            "shares": (0.5, 1.0),
            "requests": (1, 8, 32, 128),
        },
        "gpu": {
            "corpora": PAPER.corpora,
            "seeds": 3,
            # The smallest of them has no more.
            "length": 64,
            "retain": 640,
            "holdout": 192,
            "m": 32,
            "m_recursion": PAPER.gradients,
            "block_size": PAPER.block_size,
            "methods": (*FIRST_ORDER, *SECOND_ORDER),
            "most": 12,
            "max_steps": 200,
            "shares": (0.5, 1.0),
            "requests": (1, 8, 32, 128),
        },
    },
    "case_studies": {
        "quick": CASE_STUDIES
        | SMALL_CASES
        | {
            "methods": (*FIRST_ORDER[:-1], "fisher_recursion", "fisher_diagonal", "kfac"),
            "seeds": 1,
            "candidates": 128,
            "most": 6,
            "max_steps": 60,
        },
        "cpu": CASE_STUDIES | SMALL_CASES,
        "gpu": CASE_STUDIES | PAPERS_INVERSE | {"passage_length": 128},
    },
    "dp_sgd": {
        "quick": PRIVATE
        | {
            "corpora": "reuters",
            "epsilons": (1, 100, 2000),
            "knobs": {"learning_rate": (2.5e-3, 1e-2, 4e-2)},
            "most": 5,
            "shorter": (1, 3, 5),
        },
        "cpu": PRIVATE | {"corpora": "reuters,tales,socialiqa,maths"},
        "gpu": PRIVATE | {"corpora": "reuters", "length": 64, "retain": 1984, "epsilons": PAPER.epsilons},
    },
    "three_axes": {
        "quick": THREE_AXES
        | {
            "seeds": 1,
            "epsilons": (8,),
            "most": 5,
            "max_steps": 40,
            "m_recursion": 128,
            "weights": (2**14, 2**16, 2**18),
            "m": (16, 64, 128),
            "block": (16, 64, 256),
            "repeats": 3,
        },
        "cpu": THREE_AXES
        | {
            "seeds": 5,
            "epsilons": (1, 8, 100),
            "most": 12,
            "max_steps": 200,
            "weights": (2**14, 2**15, 2**16, 2**17, 2**18),
            "m": (16, 32, 64, 128, 256),
            "block": (8, 16, 64, 128, 256),
            "repeats": 5,
        },
        "gpu": THREE_AXES
        | {
            "seeds": 3,
            "epsilons": (1, 8, 100),
            "most": 12,
            "max_steps": 200,
            "retain": 1984,
            "holdout": 256,
            "weights": (2**18, 2**20, 2**22),
            "m": (64, 256, 1024),
            "block": (16, 64, 256),
            "repeats": 5,
        },
    },
    "repeated_requests": {
        "quick": SERIES
        | SHORT_PROBE
        | {"seeds": 1, "number": 6, "every": 2, "m": 128, "opening": 1, "most": 5, "steps": 50}
        | {"m_dual": 128, "m_recursion": 128, "references": 1},
        "cpu": SERIES | {"seeds": 5, "number": 12, "every": 2, "m": 256, "m_dual": 256, "m_recursion": 256},
        "gpu": SERIES
        | {"seeds": 5, "number": 12, "every": 2, "m": 256, "m_dual": 64, "m_recursion": 16, "block_size": 16},
    },
    "onion": {
        "quick": ONION
        | {
            "seeds": 1,
            "shadows": 12,
            "methods": ("gradient_ascent", "gradient_difference", "fisher_recursion", "fisher_diagonal", "kfac"),
            "most": 5,
            "max_steps": 100,
        },
        "cpu": ONION | {"seeds": 5, "forget": 512, "holdout": 512, "layer": 128, "repeats": 6, "served": 3},
        "gpu": ONION
        | {
            "model": GPU.model,
            "length": 64,
            "training": Training(epochs=2, learning_rate=1e-4),
            "seeds": 3,
            "forget": 512,
            "holdout": 512,
            "layer": 128,
            "shadows": 8,
            "curvatures": {"m_recursion": 16, "block_size": 64, "m_factors": 384},
        },
    },
    "indelible": {
        "quick": INDELIBLE | {"seeds": 1, "most": 5, "max_steps": 60},
        "cpu": INDELIBLE | {"seeds": 5, "most": 12, "max_steps": 200},
        "gpu": INDELIBLE
        | {
            "model": GPU.model,
            "training": Training(epochs=12, batch_size=16, learning_rate=1e-4),
            "corpora": "posts,licences,aeslc",
            "seeds": 3,
            "most": 8,
            "max_steps": 200,
            "m_recursion": 16,
            "block_size": 16,
        },
    },
    "last_gap": {
        # The case of chapter 3, and so its models.
        "quick": LAST_GAP
        | {
            "corpora": "reuters",
            "seeds": 1,
            "model": small_opt(1024, hidden_size=64, layers=2),
            "retain": 256,
            "holdout": 128,
            "given": (("newton_cg:natural", "damping", 2e-3),),
            "products": 8,
            "dampings": (1e-3, 1e-2),
            "multiples": (1.0, 2.0),
            "rates": (1.6e-3, 3.2e-3),
            "m_blocks": 64,
            "most": 5,
            "max_steps": 40,
            "large": False,
        },
        "cpu": LAST_GAP
        | {
            "corpora": "reuters,tales,socialiqa,maths",
            "seeds": 5,
            "large": False,
            "most": 6,
            "max_steps": 200,
        },
        "gpu": LAST_GAP
        | {
            "corpora": PAPER.corpora,
            # The smallest of the paper's family: one cure has all gradients of the forget texts in memory, twice.
            "model": HUB_ARCHITECTURES["OPT"][0],
            "seeds": 3,
            "length": 64,
            "forget": 32,
            "retain": 640,
            "holdout": 192,
            "dampings": (1e-6, 1e-5, 1e-4),
            "most": 8,
            "max_steps": 200,
        },
    },
    "last_gap_real": {
        "quick": LAST_GAP_REAL,  # which is not run
        "cpu": LAST_GAP_REAL
        | {
            "training": Training(epochs=4, batch_size=16, learning_rate=2e-4),
            "length": 32,
            "forget": 32,
            "retain": 128,
            "holdout": 96,
            "last_blocks": 4,
        },
        "gpu": LAST_GAP_REAL
        | {
            "model": HUB_ARCHITECTURES["OPT"][-1],
            "training": Training(epochs=4, batch_size=16, learning_rate=2e-5, bfloat16=True, checkpointing=True),
            "length": 64,
            "forget": 64,
            "retain": 384,
            "holdout": 128,
            "seeds": 3,
        },
    },
    "own_model": {
        "quick": OWN_MODEL | {"seeds": 2, "second_seeds": 1},
        "cpu": OWN_MODEL
        | {
            "seeds": 5,
            "second_seeds": 5,
            "proxy_training": Training(epochs=15, learning_rate=3e-3),
            "dampings": (2.5e-4, 1e-3, 4e-3, 1.6e-2, 6.4e-2, 2.56e-1),
        },
        "gpu": OWN_MODEL
        | {
            "seeds": 3,
            "second_seeds": 1,
            "proxy": small_opt(50272, hidden_size=64),
            "dampings": (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2),  # a pretrained model asks for little, see chapter 10
        },
    },
}
