"""Several processes started from within a program; that they share the work the chapter asserts when it runs."""

import signal

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from unlearnlib import distributed
from unlearnlib.experiment.many_processes import in_processes


def fails(broken: int) -> None:
    """Run in each process: that of the rank ``broken`` meets an error, and the others wait for it."""
    with distributed.started("cpu"), distributed.together():
        if distributed.rank() == broken:
            raise ArithmeticError("the last digit of pi is not to be had")


def test_an_error_of_one_process_ends_all_and_is_told():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ChildFailedError, match="the last digit of pi"):
        in_processes(2, fails, 0)
    assert signal.getsignal(signal.SIGTERM) is before
