"""What has to run on a GPU runs on a pretended one, in a process of its own: nothing is left behind on the CPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def test_all_algorithms_run_on_a_pretended_accelerator():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "pretended_accelerator", "-p", "no:cacheprovider"]
    command += ["test_accelerator.py", "-k", "opt-torch.float64 or left_on_the_cpu"]
    paths = [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    named = {"UNLEARNLIB_TEST_DEVICE": "pretended", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    ended = subprocess.run(command, cwd=TESTS, env=os.environ | named, capture_output=True, encoding="utf-8")
    assert ended.returncode == 0, ended.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", ended.stdout)[1]) >= 30, ended.stdout[-3000:]
