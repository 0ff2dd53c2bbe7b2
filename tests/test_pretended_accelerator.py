"""What has to run on a GPU runs on a pretended one, in a process of its own: nothing is left behind on the CPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


OTHERS = "(gpt2 or llama) and not (simnpo or repaired or newton)"  # of what takes long OPT's run is enough


@pytest.mark.parametrize(("chosen", "number"), [("not gpt2 and not llama", 40), (OTHERS, 52)])
def test_all_algorithms_run_on_a_pretended_accelerator(chosen, number):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "pretended_accelerator", "-p", "no:cacheprovider"]
    command += ["test_accelerator.py", "-k", f"not float32 and ({chosen})"]
    paths = [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    named = {"UNLEARNLIB_TEST_DEVICE": "pretended", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    ended = subprocess.run(command, cwd=TESTS, env=os.environ | named, capture_output=True, encoding="utf-8")
    assert ended.returncode == 0, ended.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", ended.stdout)[1]) >= number, ended.stdout[-3000:]
