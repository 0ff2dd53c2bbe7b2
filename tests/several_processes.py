"""What each of several processes does in ``test_distributed.py``: all of it together, and all of it alone.

On CPUs, or on the device that ``UNLEARNLIB_TEST_DEVICE`` names, a GPU each.
Run by torchrun. Prints nothing if everything agrees, and ends with an error if anything does not.
"""

import os
import sys
from pathlib import Path

import torch
from helpers import random_sequences, tiny_model

from unlearnlib import curvature, distributed, methods, weights
from unlearnlib.curvature.kronecker_groups import kfac_in_groups
from unlearnlib.curvature.newton import GaussNewton
from unlearnlib.losses import batched, mean_loss, sequence_losses

DEVICE = os.environ.get("UNLEARNLIB_TEST_DEVICE") or "cpu"
FORGET, RETAIN = random_sequences(5, seed=1), random_sequences(7, seed=2)
DAMPING = 1e-3


def recursion(model):
    return curvature.FisherRecursion(curvature.sequence_gradients(model, RETAIN), 24, 4)


CURVATURES = {
    "kfac": lambda model: curvature.kfac(model, RETAIN),
    "ekfac": lambda model: curvature.ekfac(model, RETAIN),
    "diagonal_fisher": lambda model: curvature.diagonal_fisher(model, RETAIN),
    "fisher_diagonal": lambda model: curvature.FisherDiagonal(model, RETAIN),
    "fisher_recursion": recursion,
    "fisher_dual": lambda model: curvature.FisherDual(curvature.sequence_gradients(model, RETAIN)),
}


def measured(model):
    """Gradients, losses, products, solutions and powers, and the model's weights after a matched step."""
    delta = methods.ascent_direction(model, FORGET)
    found = {"gradient": delta, "losses": {"": batched(sequence_losses, model, RETAIN)}}
    found["one"] = {"": batched(sequence_losses, model, RETAIN[:1])}  # fewer than there are processes
    for name, build in CURVATURES.items():
        built = build(model)
        found[f"{name}:product"] = built.matvec(delta)
        found[f"{name}:step"] = built.solve(delta, DAMPING)
        found[f"{name}:power"] = built.power(delta, -0.25, DAMPING)
    exact, factors = GaussNewton(model, RETAIN), curvature.kfac(model, RETAIN)
    found["gauss_newton:product"] = exact.matvec(delta)
    found["newton"] = methods.krylov_subspace(exact, factors, delta, DAMPING, products=3).solve(DAMPING)
    found["one:product"] = GaussNewton(model, RETAIN[:1]).matvec(delta)
    start = weights.snapshot(model)
    methods.Line(model, found["kfac:step"], FORGET).to(mean_loss(model, FORGET) + 0.05)
    found["matched"] = weights.snapshot(model)
    weights.set_weights(model, start)
    return found


def compare(found, expected, tolerance=1e-6):
    for name, vector in expected.items():
        off = weights.norm(weights.difference(found[name], vector)) / weights.norm(vector)
        assert off < tolerance, (name, off)


def owned_bytes(built):
    """What this process keeps of a curvature: numbers and not mere shapes."""
    parts = [x for b in built.blocks for x in (b.eigenvalues, b.left, b.right) if x is not None]
    return sum(x.nbytes for x in parts if not x.is_meta)


def agree(folder):
    for architecture in ("gpt2",) if distributed.size() > 2 else ("llama", "opt"):
        model = tiny_model(architecture, device=DEVICE)
        with distributed.alone():
            expected, whole = measured(model), curvature.ekfac(model, RETAIN)
        compare(measured(model), expected)
        shared = curvature.ekfac(model, RETAIN)
        mine = torch.tensor([owned_bytes(shared)])
        assert 0 < mine.item() < 0.75 * owned_bytes(whole)
        distributed.sum_over([mine])
        assert mine.item() == owned_bytes(whole)  # every matrix has one owner
    for _ in ("built", "found again"):
        stored = kfac_in_groups(model, RETAIN, corrected=True, budget_bytes=2**20, folder=folder)
        delta = methods.ascent_direction(model, FORGET)
        compare({"": stored.solve(delta, DAMPING)}, {"": expected["ekfac:step"]})
        assert len(list(folder.glob("*.safetensors"))) == len(stored.blocks)  # once all have come so far


def broken(folder):
    """One process's share has a sequence whose loss is not finite: all end with the message that names it."""
    model = tiny_model(device=DEVICE)
    if distributed.rank() == distributed.size() - 1:  # whose last sequence is number 6
        with torch.no_grad():
            model.get_output_embeddings().weight.fill_(torch.nan)
    curvature.kfac(model, RETAIN)


def gone(folder):
    """One process ends without a word while the others wait for it."""
    if distributed.rank() == 1:
        sys.exit(7)
    methods.ascent_direction(tiny_model(device=DEVICE), FORGET)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with distributed.started(DEVICE):
        {"agree": agree, "broken": broken, "gone": gone}[sys.argv[1]](Path(sys.argv[2]))
