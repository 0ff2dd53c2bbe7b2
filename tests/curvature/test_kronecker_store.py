"""Kronecker factors in files: found again for the same curvature, and for no other."""

import pytest
import torch
from helpers import ARCHITECTURES, random_sequences, tiny_model

from unlearnlib import losses, weights
from unlearnlib.curvature import kfac_in_groups, kronecker, kronecker_groups, kronecker_plan
from unlearnlib.models import loading

SEQUENCES = random_sequences(6, 5)


def frozen(shift):
    model = tiny_model()
    layer = model.model.decoder.layers[0].requires_grad_(False)
    with torch.no_grad():
        layer.fc1.weight.add_(shift)
    return model


def llama(**changes):
    return loading.load_model(ARCHITECTURES["llama"] | changes, dtype=torch.float64, device="cpu")


@pytest.mark.parametrize(
    ("built", "asked", "other"),
    [
        (lambda: frozen(0), lambda: frozen(1), "weights"),
        (llama, lambda: llama(hidden_act="relu"), "configuration"),
        (tiny_model, lambda: tiny_model(dtype=torch.float32), "weights"),
    ],
)
def test_factors_of_another_model_are_refused(tmp_path, built, asked, other):
    kfac_in_groups(built(), SEQUENCES, folder=tmp_path)
    with pytest.raises(ValueError, match=f"were built with other {other}: name another folder"):
        kfac_in_groups(asked(), SEQUENCES, folder=tmp_path)


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_a_model_that_was_saved_and_loaded_finds_its_factors(tmp_path, monkeypatch, architecture):
    model, factors = tiny_model(architecture, dtype=torch.bfloat16), tmp_path / "factors"
    built = kfac_in_groups(model, SEQUENCES, folder=factors)
    (factors / ".factors.json-1.tmp").touch()  # of a run that was killed
    model.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(kronecker_groups, "build_group", None)
    again = loading.load_model(tmp_path / "model", dtype="auto", device="cpu")
    found = kfac_in_groups(again, SEQUENCES, folder=factors)
    v = weights.snapshot(model)
    expected, solved = built.solve(v, 0.1), found.solve(v, 0.1)
    assert all(torch.equal(solved[name], expected[name]) for name in v)


def test_damaged_files_are_named(tmp_path):
    model = tiny_model()
    kfac_in_groups(model, SEQUENCES, folder=tmp_path)
    file = min(tmp_path.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(OSError, match=f"{file.name} is damaged .*: delete it"):
        kfac_in_groups(model, SEQUENCES, folder=tmp_path)
    for content in ("", "[]"):
        (tmp_path / "factors.json").write_text(content)
        with pytest.raises(ValueError, match=r"factors\.json is damaged"):
            kfac_in_groups(model, SEQUENCES, folder=tmp_path)


def test_a_folder_with_a_run_that_was_killed_at_once_is_free(tmp_path):
    (tmp_path / ".factors.json-1.tmp").touch()
    kfac_in_groups(tiny_model(), SEQUENCES, folder=tmp_path)
    (tmp_path / "factors.json").unlink()
    with pytest.raises(ValueError, match=r"has other things in it and no factors\.json"):
        kfac_in_groups(tiny_model(), SEQUENCES, folder=tmp_path)


def test_without_a_budget_nothing_is_planned(monkeypatch):
    monkeypatch.setattr(kronecker_groups, "plan", None)
    model = tiny_model()
    v = weights.snapshot(model)
    found, expected = (build(model, SEQUENCES).solve(v, 0.1) for build in (kfac_in_groups, kronecker.kfac))
    assert all(torch.equal(found[name], expected[name]) for name in v)


def test_a_model_that_adds_in_place_to_what_a_layer_gave_it_is_built_in_groups():
    config = {"model_type": "falcon", "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 2, "bos_token_id": 0, "eos_token_id": 0}
    model = loading.load_model(config, dtype=torch.float64, device="cpu")
    for block in kronecker.kfac(model, SEQUENCES).blocks:
        [found] = kronecker.build_group(model, SEQUENCES, [block], 0, False, lambda built: built)
        assert torch.allclose(found.eigenvalues, block.eigenvalues, rtol=1e-9)


def test_a_plan_needs_sequences_and_is_no_pass_over_them():
    with losses.counted_passes() as passes:
        kronecker_plan.plan(tiny_model(), SEQUENCES)
    assert passes == losses.Passes()
    with pytest.raises(ValueError, match="m = 0 of 0"):
        kronecker_plan.plan(tiny_model(), SEQUENCES[:0])
