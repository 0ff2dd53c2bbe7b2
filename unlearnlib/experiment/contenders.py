"""The methods that are compared, in one place: what each reads, its knobs, and the path a setting takes."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from unlearnlib.curvature.block_gauss_newton import BlockGaussNewton
from unlearnlib.curvature.kronecker import kfac
from unlearnlib.curvature.newton import GaussNewton
from unlearnlib.experiment.case import Case
from unlearnlib.losses import batched, hidden_states
from unlearnlib.methods.first_order import (
    Loss,
    activation_loss,
    ascent_direction,
    ascent_loss,
    kl_loss,
    npo_loss,
    retain_loss,
    rmu_loss,
    simnpo_loss,
    with_retain,
)
from unlearnlib.methods.fisher_updates import Build, RemovalInSteps, removal_direction
from unlearnlib.methods.matching import Line, Path
from unlearnlib.methods.newton_descent import newton_loss
from unlearnlib.methods.newton_removal import NaturalPath, krylov_subspace
from unlearnlib.methods.sophia import sophia_walk
from unlearnlib.methods.tuning import Knobs
from unlearnlib.methods.walks import RepairedAscent, adam_walk, sgd_walk
from unlearnlib.weights import parameters, set_weights, snapshot

MAX_STEPS = 200
"""After so many steps of an optimizer a method that has not reached the target is given up."""

BETA = 0.1
"""β of NPO where it is no knob: the value of its authors."""

SIMNPO_BETA = 0.7
"""β of SimNPO; the margin γ is 0. Its authors take both for continuing plain text, of news and of books."""

FARTHER = 2.0
"""How long RMU's random vector is, in mean lengths of the original's activations on the forget set."""

STEPS = 4
"""How many steps Fisher Removal in steps takes."""

M_NEWTON = 96
"""Of how many retained sequences, at most, the products with the Gauss–Newton matrix are."""

RATES = {"learning_rate": (1e-4, 4e-4, 1.6e-3)}
WEIGHTS = RATES | {"retain_weight": (1.0, 4.0, 16.0)}
DAMPINGS = {
    "fisher_recursion": (1e-6, 1e-5, 1e-4),
    "fisher_dual": (1e-4, 1e-3, 1e-2),
    "fisher_diagonal": (1e-7, 1e-6, 1e-5),
    "kfac": (1e-6, 1e-5, 1e-4),
    "newton_cg": (5e-4, 2e-3, 8e-3),
}
"""Where the search for λ begins, by curvature; each approximation has a scale of its own."""


@dataclass(frozen=True)
class Contender:
    """A method on one case: the sets it ``reads`` to serve a request, its ``knobs``, and its ``path``.

    ``path(**setting)``, with a value for each knob, starts from the original model. What does not depend on the
    setting, such as a curvature, is computed at the first call only.
    """

    reads: str
    knobs: Knobs
    path: Callable[..., Path]


def contenders_on(case: Case, builds: Mapping[str, Build], max_steps: int = MAX_STEPS) -> dict[str, Contender]:
    """By method, all contenders on ``case``: the first-order ones, and Fisher Removal over each of ``builds``.

    Where K-FAC is among these, so is what goes :func:`beyond` it. What goes in steps of an optimizer takes
    ``max_steps`` at the most. A knob that the profile has given a value has no other.
    """
    removals = {method: removal(case, method, build) for method, build in builds.items()}
    further = beyond(case, builds["kfac"], max_steps) if "kfac" in builds else {}
    found = first_order(case, max_steps) | removals | further
    for method, knob, value in case.profile.given:
        if method in found:
            found[method] = replace(found[method], knobs={**found[method].knobs, knob: (value,)})
    return found


def first_order(case: Case, max_steps: int = MAX_STEPS) -> dict[str, Contender]:
    """By method, the contenders on ``case`` that take first derivatives only.

    ``newton_descent`` is among them, which descends with these what Newton's equation is the minimum of.
    """
    forget, retain = case.splits.forget, case.estimation

    def one_step() -> Path:
        model = case.original()
        return Line(model, ascent_direction(model, forget), forget)

    def batches(learning_rate: float) -> Path:
        return sgd_walk(case.original(), ascent_loss, forget, retain, learning_rate, case.seed, max_steps)

    def adam(loss: Loss, learning_rate: float) -> Path:
        return adam_walk(case.original(), loss, forget, retain, learning_rate, case.seed, max_steps)

    def difference(learning_rate: float, retain_weight: float) -> Path:
        return adam(with_retain(ascent_loss, retain_weight), learning_rate)

    def kl(learning_rate: float, retain_weight: float) -> Path:
        return adam(with_retain(ascent_loss, retain_weight, kl_loss(case.original())), learning_rate)

    def npo(learning_rate: float, beta: float) -> Path:
        return adam(npo_loss(case.original(), beta), learning_rate)

    def npo_retain(learning_rate: float, retain_weight: float) -> Path:
        return adam(with_retain(npo_loss(case.original(), BETA), retain_weight), learning_rate)

    def simnpo(learning_rate: float, retain_weight: float) -> Path:
        return adam(with_retain(simnpo_loss(SIMNPO_BETA), retain_weight), learning_rate)

    @functools.cache
    def misdirected() -> tuple[Loss, Loss]:
        """What RMU descends on forget and on retain: it acts in the middle of the model."""
        model = case.original()
        layer = model.config.get_text_config().num_hidden_layers // 2
        lengths = batched(lambda model, rows: hidden_states(model, rows, layer).norm(dim=2), model, forget)
        return rmu_loss(layer, FARTHER * lengths.mean().item(), case.seed), activation_loss(model, layer)

    def rmu(learning_rate: float, retain_weight: float) -> Path:
        away, keep = misdirected()
        return adam(with_retain(away, retain_weight, keep), learning_rate)

    @functools.cache
    def contribution() -> Loss:
        """What Newton's step by descent descends: with the gradient at the original, once for all settings."""
        model = case.original()
        return newton_loss(model, ascent_direction(model, forget), len(forget) / len(case.splits.retain))

    def newton(learning_rate: float) -> Path:
        return adam(contribution(), learning_rate)

    def repaired(learning_rate: float, overshoot: float) -> Path:
        return RepairedAscent(case.original(), forget, retain, learning_rate, overshoot, case.seed, max_steps)

    def finetuning(learning_rate: float) -> Path:
        return adam(retain_loss, learning_rate)

    # A weight is in units of the loss that forgets over those of what keeps. SimNPO's brake makes its gradient
    # some sixteen times smaller than that of the forget loss; NPO's does the same around a target, but is a sum.
    of_simnpo = RATES | {"retain_weight": tuple(weight / 16 for weight in WEIGHTS["retain_weight"])}
    both = "forget, retain"
    return {
        "finetuned": Contender("retain", RATES, finetuning),
        "gradient_ascent": Contender("forget", {}, one_step),
        "gradient_ascent:sgd": Contender("forget", {"learning_rate": (1e-2, 4e-2, 1.6e-1)}, batches),
        "gradient_ascent:adam": Contender("forget", RATES, functools.partial(adam, ascent_loss)),
        "gradient_ascent:kl": Contender(both, WEIGHTS, kl),
        "gradient_difference": Contender(both, WEIGHTS, difference),
        "npo": Contender("forget", RATES | {"beta": (1e-2, 1e-1, 1.0)}, npo),
        "npo:retain": Contender(both, WEIGHTS, npo_retain),
        "simnpo:retain": Contender(both, of_simnpo, simnpo),
        "rmu": Contender(both, WEIGHTS, rmu),
        "gradient_ascent:repaired": Contender(both, RATES | {"overshoot": (0.25, 0.5, 1.0)}, repaired),
        "newton_descent": Contender(both, RATES, newton),
    }


def removal(case: Case, method: str, build: Build) -> Contender:
    """Fisher Removal over a curvature, of ``case.estimation`` at the original's weights; ``method`` has its λ."""
    forget = case.splits.forget

    @functools.cache
    def prepared() -> tuple:
        model = case.original()
        return model, snapshot(model), build(model), ascent_direction(model, forget)

    def path(damping: float) -> Path:
        model, start, curvature, delta = prepared()
        return Line(model, removal_direction(curvature, delta, damping), forget, start)

    return Contender("forget, retain", {"damping": DAMPINGS[method.partition(":")[0]]}, path)


def beyond(case: Case, build: Build, max_steps: int = MAX_STEPS) -> dict[str, Contender]:
    """By method, second-order contenders on ``case`` that are more than one step over a fixed curvature.

    ``soul`` takes many clipped diagonal steps; ``kfac:steps`` takes :data:`STEPS` steps of Fisher Removal, each
    with a gradient and a curvature (by ``build``, K-FAC) of its own. ``newton_cg:kfac`` takes one, along what a
    few conjugate gradients, with K-FAC as preconditioner, make of the Gauss–Newton matrix of :data:`M_NEWTON`
    sequences. ``newton_cg:natural`` takes all that stay, and goes as far as theory says; its damping is that of
    the directions, and the one of the step is what brings it to a target.
    """
    forget, retain = case.splits.forget, case.estimation

    def soul(learning_rate: float, retain_weight: float) -> Path:
        loss = with_retain(ascent_loss, retain_weight)
        return sophia_walk(case.original(), loss, forget, retain, learning_rate, case.seed, max_steps)

    def in_steps(damping: float) -> Path:
        return RemovalInSteps(case.original(), forget, build, damping, STEPS, refresh=True, renew=True)

    @functools.cache
    def prepared() -> tuple:
        model = case.original()
        return (
            model,
            snapshot(model),
            kfac(model, retain[:M_NEWTON], seed=case.seed),
            ascent_direction(model, forget),
        )

    def newton(damping: float, products: float) -> Path:
        model, start, factors, delta = prepared()
        everything = [tuple(parameters(model))]  # in one block
        matrix = BlockGaussNewton(model, retain[:M_NEWTON], everything, round(products), factors)
        return Line(model, removal_direction(matrix, delta, damping), forget, start)

    @functools.cache
    def prepared_natural() -> tuple:
        model = case.original()
        return model, snapshot(model), build(model), ascent_direction(model, forget), GaussNewton(model, retain)

    def natural(damping: float) -> Path:
        model, start, factors, delta, matrix = prepared_natural()
        set_weights(model, start)
        space = krylov_subspace(matrix, factors, delta, damping)
        return NaturalPath(model, space.solve, forget, len(forget) / len(case.splits.retain), damping)

    both = "forget, retain"
    knobs = {"damping": (1e-4, 1e-3, 1e-2), "products": (2, 4, 8)}
    return {
        "soul": Contender(both, WEIGHTS, soul),
        "kfac:steps": Contender(both, {"damping": DAMPINGS["kfac"]}, in_steps),
        "newton_cg:kfac": Contender(both, knobs, newton),
        "newton_cg:natural": Contender(both, {"damping": DAMPINGS["newton_cg"]}, natural),
    }
