"""K-FAC of models whose factors do not fit beside them: a group of matrices at a time, the rest on the host."""

from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from unlearnlib.curvature.kronecker import Kronecker, build_group
from unlearnlib.curvature.kronecker_blocks import Block, find_blocks
from unlearnlib.curvature.kronecker_plan import plan
from unlearnlib.curvature.kronecker_store import FactorStore, settings_of
from unlearnlib.curvature.protocol import take


def kfac_in_groups(
    model: PreTrainedModel,
    sequences: Tensor,
    number: int | None = None,
    seed: int = 0,
    corrected: bool = False,
    budget_bytes: int | None = None,
    folder: Path | None = None,
) -> Kronecker:
    """K-FAC, or if ``corrected`` EK-FAC, built within ``budget_bytes`` of the device's memory beside the model.

    Matrices are built in the groups of :func:`unlearnlib.curvature.kronecker_plan.plan`, each with a pass of its
    own over the sequences (EK-FAC with two). What is built moves to the host's memory, and from there one matrix
    at a time to the device where it is applied. With a ``folder`` it goes to files there: what an interrupted
    build has finished is not built again, nor is anything for a later request of the same model and sequences.

    The same as :func:`unlearnlib.curvature.kronecker.kfac` and ``ekfac``, and raises as they do; also MemoryError
    if one matrix alone is too much for the budget, and as :class:`FactorStore`.
    """
    chosen, blocks = take(sequences, number), find_blocks(model)
    store = None if folder is None else FactorStore(folder, settings_of(model, chosen, seed, corrected))
    there = [False] * len(blocks) if store is None else store.there(blocks)

    def keep(block: Block) -> Block:
        if store is not None:
            return store.put(block)
        return block if budget_bytes is None else block.to("cpu")

    found = {b.names: store.get(b) for b, known in zip(blocks, there, strict=True) if known}
    missing = {b.names: b for b in blocks if b.names not in found}
    if budget_bytes is None:  # there is nothing to plan
        groups = [list(missing)] if missing else []
    else:
        groups = plan(model, chosen, budget_bytes, corrected, missing).groups
    for group in groups:
        built = build_group(model, chosen, [missing[names] for names in group], seed, corrected, keep)
        found |= {block.names: block for block in built}
    return Kronecker([found[block.names] for block in blocks])
