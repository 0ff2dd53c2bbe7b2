import pytest
import torch
from helpers import random_sequences, tiny_model

from unlearnlib import weights
from unlearnlib.curvature import fisher_dual_streaming, kronecker

SEQUENCES = random_sequences(6, seed=5)
CURVATURES = {"kfac": kronecker.kfac, "streaming": fisher_dual_streaming.StreamingFisher}


@pytest.mark.parametrize("name", CURVATURES)
def test_solutions_and_powers_are_not_rounded_where_products_are(name):
    model = tiny_model(dtype=torch.float32)
    C, v = CURVATURES[name](model, SEQUENCES), weights.snapshot(model)
    functions = {
        "solve": lambda: C.solve(v, 1e-3),
        "power": lambda: C.power(v, -0.5, damping=1e-3),
        "matvec": lambda: C.matvec(v),
    }
    plain = {name: weights.flatten(function()) for name, function in functions.items()}
    with torch.autocast("cpu", torch.bfloat16):
        rounding = {name: weights.flatten(function()) for name, function in functions.items()}
        rounded_still = torch.is_autocast_enabled("cpu")
    assert torch.equal(rounding["solve"], plain["solve"])
    assert torch.equal(rounding["power"], plain["power"])
    assert not torch.equal(rounding["matvec"], plain["matvec"])  # as any product is within such a block
    assert rounded_still
