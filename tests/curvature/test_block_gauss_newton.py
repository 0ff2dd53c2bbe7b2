"""Blocks of the Gauss–Newton matrix against the dense matrix, with the entries between blocks struck out."""

import pytest
import torch
from helpers import random_sequences, smallest_model, tiny_model
from test_newton import SEQUENCES, VOCABULARY, explicit_gauss_newton

from unlearnlib import losses, weights
from unlearnlib.curvature import kronecker, kronecker_blocks
from unlearnlib.curvature.block_gauss_newton import BlockGaussNewton

DAMPING = 0.05


@pytest.fixture(scope="module")
def model():
    return smallest_model(VOCABULARY)


def dense_blocks(model, blocks):
    """The explicit matrix, zero where a row and a column belong to different blocks."""
    of = {name: number for number, names in enumerate(blocks) for name in names}
    number = torch.cat([torch.full((p.numel(),), of[name]) for name, p in weights.parameters(model).items()])
    return explicit_gauss_newton(model) * (number[:, None] == number[None, :])


def matrices(model):
    return [block.names for block in kronecker_blocks.find_blocks(model)]


def test_products_are_those_of_the_dense_matrix_without_what_is_between_blocks(model):
    curvature = BlockGaussNewton(model, SEQUENCES)
    assert len(curvature.blocks) > 5
    expected = dense_blocks(model, matrices(model))
    assert not torch.allclose(expected, explicit_gauss_newton(model))  # something is struck out
    v = weights.random_vector(weights.snapshot(model), torch.Generator().manual_seed(0))
    torch.testing.assert_close(weights.flatten(curvature.matvec(v)), expected @ weights.flatten(v))


def test_enough_steps_solve_every_block_exactly(model):
    v = weights.random_vector(weights.snapshot(model), torch.Generator().manual_seed(1))
    curvature = BlockGaussNewton(model, SEQUENCES, steps=60)
    dense = dense_blocks(model, matrices(model))
    row = weights.flatten(v)
    expected = torch.linalg.solve(dense + DAMPING * torch.eye(len(row), dtype=row.dtype), row)
    *_, last = curvature.iterates(v, DAMPING)
    torch.testing.assert_close(weights.flatten(last.x), expected, rtol=1e-6, atol=1e-8)
    assert max(last.residuals.values()) < 1e-10


def test_residuals_are_those_of_the_iterates(model):
    v = weights.random_vector(weights.snapshot(model), torch.Generator().manual_seed(1))
    curvature = BlockGaussNewton(model, SEQUENCES, steps=3)
    *_, last = curvature.iterates(v, DAMPING)
    left = weights.difference(v, weights.add(curvature.matvec(last.x), last.x, DAMPING))
    for names, residual in last.residuals.items():
        part, whole = ({name: a[name] for name in names} for a in (left, v))
        assert residual == pytest.approx(weights.norm(part) / weights.norm(whole))


def test_the_first_step_with_a_preconditioner_is_along_its_own_solution(model):
    v = weights.random_vector(weights.snapshot(model), torch.Generator().manual_seed(1))
    factors = kronecker.kfac(model, SEQUENCES)
    x = BlockGaussNewton(model, SEQUENCES, steps=1, preconditioner=factors).solve(v, DAMPING)
    direction = factors.solve(v, DAMPING)
    for names in matrices(model):
        part, own = ({name: a[name] for name in names} for a in (x, direction))
        assert weights.cosine(part, own) == pytest.approx(1)


def test_one_block_of_all_weights_is_the_whole_matrix(model):
    everything = [tuple(weights.parameters(model))]
    v = weights.random_vector(weights.snapshot(model), torch.Generator().manual_seed(2))
    factors = kronecker.kfac(model, SEQUENCES)
    x = BlockGaussNewton(model, SEQUENCES, everything, steps=200, preconditioner=factors).solve(v, DAMPING)
    row = weights.flatten(v)
    dense = explicit_gauss_newton(model) + DAMPING * torch.eye(len(row), dtype=row.dtype)
    torch.testing.assert_close(weights.flatten(x), torch.linalg.solve(dense, row), rtol=1e-6, atol=1e-8)


def test_a_block_with_nothing_to_solve_stands_still(model):
    v = weights.random_vector(weights.snapshot(model), torch.Generator().manual_seed(1))
    still = matrices(model)[0]
    x = BlockGaussNewton(model, SEQUENCES, steps=2).solve(
        v | {name: torch.zeros_like(v[name]) for name in still}, DAMPING
    )
    assert all(x[name].eq(0).all() == (name in still) for name in x)


def test_a_product_is_counted_as_a_plain_pass_for_each_block():
    model, sequences = tiny_model(), random_sequences(4)
    curvature = BlockGaussNewton(model, sequences)
    with losses.counted_passes() as passes:
        curvature.matvec(weights.snapshot(model))
    assert passes.plain == pytest.approx(len(sequences) * (1 + len(curvature.blocks)))


@pytest.mark.parametrize("blocks", [[("lm_head.weight",)], "twice"])
def test_blocks_that_do_not_part_the_parameters_are_refused(blocks):
    model = tiny_model()
    if blocks == "twice":
        blocks = [block.names for block in kronecker_blocks.find_blocks(model)] * 2
    with pytest.raises(ValueError, match="hold every trainable parameter of the model once"):
        BlockGaussNewton(model, random_sequences(2), blocks)


def test_no_steps_are_refused():
    with pytest.raises(ValueError, match="cannot solve in 0 steps"):
        BlockGaussNewton(tiny_model(), random_sequences(2), steps=0)
