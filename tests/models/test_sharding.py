import datetime
import filecmp
from functools import partial

import pytest
import torch
import torch.distributed as dist
from helpers import random_sequences, tiny_model
from safetensors.torch import load_file, save_file

from unlearnlib import curvature, losses
from unlearnlib.curvature import kronecker
from unlearnlib.curvature.kronecker_groups import kfac_in_groups
from unlearnlib.distributed import whole
from unlearnlib.losses import mean_loss
from unlearnlib.measures import relearning
from unlearnlib.methods import ascent_direction, removal_direction
from unlearnlib.methods.first_order import ascent_loss
from unlearnlib.methods.matching import Line
from unlearnlib.methods.sophia import bartlett_diagonal
from unlearnlib.methods.walks import adam_walk
from unlearnlib.models import sharding
from unlearnlib.weights import cosine, norm, set_weights, snapshot

DAMPING = 0.01
BUILDS = {"kfac": curvature.kfac, "ekfac": curvature.ekfac, "diagonal": kronecker.diagonal_fisher}


def unlearned(model, folder):
    """All numbers and vectors of an unlearning, each vector's parameters by name, whole; the model at its end."""
    forget, retain = random_sequences(5), random_sequences(9, seed=1)
    start, found = snapshot(model), {"loss": torch.tensor(mean_loss(model, retain), dtype=torch.float64)}

    def keep(key, vector):
        found.update({f"{key}.{name}": whole(value).contiguous() for name, value in vector.items()})

    keep("gradient of one", ascent_direction(model, forget[:1]))
    delta = ascent_direction(model, forget)
    keep("gradient", delta)
    found["norm"] = torch.tensor([norm(delta), cosine(delta, start)], dtype=torch.float64)
    for name, build in (BUILDS | {"groups": partial(kfac_in_groups, folder=folder)}).items():
        keep(name, step := removal_direction(build(model, retain), delta, DAMPING))
        if name == "ekfac":
            line = Line(model, step, forget)
    adam_walk(model, ascent_loss, forget, retain, 1e-2, seed=0, max_steps=2, batch_size=3).to(9.0)
    keep("walked", snapshot(model))
    set_weights(model, start)
    found["match"] = torch.tensor(line.to(mean_loss(model, forget) + 0.5).strength, dtype=torch.float64)
    keep("matched", snapshot(model))
    return found


def one_of_two(rank, folder):
    """What each of two processes does: the same on a model of which it has half."""
    wait = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2, timeout=wait)
    torch.set_num_threads(1)
    losses.MOST_SEQUENCES = 2  # so that one has more batches than the other
    model = sharding.load_sharded(folder / "model", dtype=torch.float64, device="cpu")
    found = unlearned(model, folder / "factors")
    sharding.save_model(model, folder / "saved")
    found["entries"] = torch.tensor(sum(p.to_local().numel() for p in model.parameters()))
    save_file(found, folder / f"{rank}.safetensors")
    sequences = random_sequences(3)
    for refused in (
        lambda: curvature.GaussNewton(model, sequences),
        lambda: curvature.sequence_gradients(model, sequences),
        lambda: curvature.FisherDiagonal(model, sequences),
        lambda: bartlett_diagonal(model, sequences, torch.Generator()),
        lambda: relearning.relearning_curve(model, sequences, sequences, 1e-3, 1),
    ):
        with pytest.raises(NotImplementedError, match="divided among processes: use gradient ascent"):
            refused()
    dist.destroy_process_group()


def test_a_model_of_which_each_of_two_processes_has_half_is_unlearned_as_a_whole_one(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    torch.multiprocessing.spawn(one_of_two, (tmp_path,), nprocs=2)
    expected = unlearned(model, tmp_path / "alone")
    model.save_pretrained(tmp_path / "expected")
    total = sum(p.numel() for p in model.parameters())
    for rank in range(2):
        found = load_file(tmp_path / f"{rank}.safetensors")
        assert abs(found.pop("entries") / total - 1 / 2) < 0.01
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-6, atol=1e-9, msg=key)
    configs = (tmp_path / name / "config.json" for name in ("saved", "expected"))
    assert filecmp.cmp(*configs, shallow=False)
    saved, again = (load_file(tmp_path / name / "model.safetensors") for name in ("saved", "expected"))
    assert saved.keys() == again.keys()  # the tied head is there once
    for name, value in again.items():
        torch.testing.assert_close(saved[name], value, rtol=1e-6, atol=1e-9)
