import pytest
import torch
from helpers import random_sequences, tiny_model
from torch.nn import functional as F

from unlearnlib import weights
from unlearnlib.curvature import kronecker
from unlearnlib.experiment import curvatures

MODEL = tiny_model(seed=3)
for parameter_name, parameter in MODEL.named_parameters():
    parameter.requires_grad_("layers.1.self_attn.out_proj" in parameter_name)
START = weights.snapshot(MODEL)
V = weights.random_vector(START, torch.Generator().manual_seed(5))
RETAIN = random_sequences(9, seed=2)
BLOCK = 10


def fisher_matrix(number):
    """The Fisher matrix of the first sequences, of their gradients one by one."""
    rows = []
    for sequence in RETAIN[:number]:
        logits = MODEL(input_ids=sequence[None]).logits[0, :-1]
        loss = F.cross_entropy(logits, sequence[1:])
        rows.append(
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights.parameters(MODEL).values())])
        )
    G = torch.stack(rows)
    return G.T @ G / number


def in_blocks(matrix):
    block = torch.arange(len(matrix)) // BLOCK
    return matrix * (block[:, None] == block)


def product(curvature):
    return weights.flatten(curvature.matvec(V))


@pytest.mark.parametrize(
    ("method", "matrix"),
    [
        ("fisher_dual", lambda: fisher_matrix(6)),
        ("fisher_diagonal", lambda: fisher_matrix(6).diagonal().diag()),
        ("fisher_recursion", lambda: in_blocks(fisher_matrix(4))),
    ],
)
def test_builders_take_as_many_sequences_as_are_asked_for(method, matrix):
    build = curvatures.curvature_builders(RETAIN, m=6, m_recursion=4, block_size=BLOCK, m_factors=3)
    torch.testing.assert_close(product(build[method](MODEL)), matrix() @ weights.flatten(V))


def test_kfac_draws_its_labels_with_the_seed():
    build = curvatures.curvature_builders(RETAIN, seed=1, m_factors=3)["kfac"]
    alone, otherwise = (kronecker.kfac(MODEL, RETAIN[:3], seed=seed) for seed in (1, 2))
    assert torch.equal(product(build(MODEL)), product(alone))
    assert not torch.equal(product(build(MODEL)), product(otherwise))


@pytest.mark.parametrize("method", ["fisher_dual", "fisher_diagonal", "fisher_recursion", "kfac"])
def test_builders_take_all_by_default_and_never_more_than_there_are(method):
    all_of_them = {"m": len(RETAIN), "m_recursion": len(RETAIN), "m_factors": len(RETAIN)}
    whole, counted = (curvatures.curvature_builders(RETAIN, **sizes)[method] for sizes in ({}, all_of_them))
    assert torch.equal(product(whole(MODEL)), product(counted(MODEL)))
    too_many = curvatures.curvature_builders(RETAIN, **{name: number + 1 for name, number in all_of_them.items()})[
        method
    ]
    with pytest.raises(ValueError, match="10 of 9"):
        too_many(MODEL)
