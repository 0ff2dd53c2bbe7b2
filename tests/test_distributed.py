import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from unlearnlib import distributed

TESTS = Path(__file__).parent


def run(what, number, folder):
    """Run ``several_processes.py`` in so many processes that exchange tensors by gloo."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(number), "--standalone"]
    paths = [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    named = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "several_processes.py", what, str(folder)],
        cwd=TESTS,
        env=os.environ | named,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )


@pytest.mark.parametrize("number", [2, 3])
def test_several_processes_find_what_one_finds(number, tmp_path):
    ended = run("agree", number, tmp_path / "factors")
    assert ended.returncode == 0, ended.stderr[-3000:]


def test_a_number_that_is_not_finite_ends_all_processes_with_its_message(tmp_path):
    ended = run("broken", 2, tmp_path)
    assert ended.returncode != 0
    said = "the predictions are not finite for sequence 4: are the weights damaged?"
    assert f"FloatingPointError: {said}" in ended.stderr  # who had it
    assert f"ErrorElsewhere: process 1: {said}" in ended.stderr  # who heard of it


def test_a_process_that_dies_ends_the_others(tmp_path):
    ended = run("gone", 2, tmp_path)
    assert ended.returncode != 0
    assert "exitcode  : 7" in ended.stderr


def test_alone_there_is_nobody_to_wait_for():
    rows = torch.arange(6.0).view(3, 2)
    assert (distributed.size(), distributed.rank()) == (1, 0)
    assert distributed.share(5) == slice(0, 5)
    distributed.sum_over([rows])
    distributed.copy_from(rows, 0)
    assert torch.equal(distributed.joined(rows, 3), torch.arange(6.0).view(3, 2))
    assert torch.equal(distributed.rows_to_columns(rows, distributed.shares(2)), torch.arange(6.0).view(3, 2))
    with pytest.raises(ValueError, match="as it was"), distributed.together():
        raise ValueError("as it was")
