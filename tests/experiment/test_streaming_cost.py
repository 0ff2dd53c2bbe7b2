from helpers import TINY, random_sequences, tiny_model

from unlearnlib.cost import in_own_process
from unlearnlib.experiment.streaming_cost import streaming_cost
from unlearnlib.models import parameter_count


def test_streaming_is_measured_beside_a_plain_pass_over_the_same_sequences():
    sequences, forget = random_sequences(6), random_sequences(2, seed=1)
    spent = in_own_process(streaming_cost, TINY, sequences, forget)
    assert spent.d == parameter_count(tiny_model())
    assert spent.plain.plain_passes == 6
    assert min(spent.build.seconds, spent.solve.seconds, spent.plain.seconds) > 0
    assert spent.peak_bytes > 2**26  # Python and PyTorch alone take more
