"""The command for a GPU, on a CPU and with tiny shapes: every measurement is made, written at once, and told."""

import dataclasses

import pytest
import torch

from unlearnlib.book import on_gpu, paper_scale, roofline
from unlearnlib.experiment.inverse_fisher_time import gpu_times
from unlearnlib.models import loading
from unlearnlib.verdicts.results import read_results

CPU = torch.device("cpu")
TINY = {name: roofline.Shape(1, 16, 2, 64, 160, paper_scale.TOKENS) for name in paper_scale.OPT}


def metrics(table):
    return table.pivot_table(index=["model", "method", "precision", "m"], columns="metric", values="value")


def test_every_planned_measurement_is_made_and_written(tmp_path, capsys):
    tasks = [dataclasses.replace(task, model="OPT-125M", m=2) for task in paper_scale.PLAN]
    plan = list({(task.method, task.precision): task for task in tasks if task.dtype == torch.float32}.values())
    assert {task.method for task in plan} == {task.method for task in tasks}
    assert any(task.rounding for task in plan)
    table = paper_scale.Table(tmp_path, "gpu_measured", "NVIDIA H100 80GB HBM3")
    paper_scale.measure_routes(table, CPU, plan, TINY, forget=4)
    found = read_results(tmp_path, "gpu_measured")
    assert "failed" not in set(found["metric"]), capsys.readouterr().out
    wide = metrics(found)
    assert len(wide) == len(plan)
    assert (wide[["seconds", "predicted_seconds", "predicted_bytes"]] > 0).all(axis=None)
    assert set(found["card"]) == {"NVIDIA H100 80GB HBM3"}
    assert len(capsys.readouterr().out.splitlines()) == len(plan)


def test_what_does_not_fit_is_written_down_and_the_next_is_measured(tmp_path, monkeypatch):
    plan = [paper_scale.Task("OPT-125M", method, 4) for method in ("kfac", "gradient")]

    def too_much(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(paper_scale.curvature, "kfac", too_much)
    paper_scale.measure_routes(paper_scale.Table(tmp_path, "gpu_measured", "a card"), CPU, plan, TINY)
    found = read_results(tmp_path, "gpu_measured").set_index(["method", "metric"])["value"]
    assert found["kfac", "out_of_memory"] == 1
    assert found["gradient", "seconds"] > 0
    assert "predicted_seconds" not in found["gradient"].index  # of a card that is not known


def test_no_measurement_is_planned_twice():
    keys = [(task.model, task.method, task.precision, task.m) for task in paper_scale.PLAN]
    assert len(set(keys)) == len(keys)


def test_a_model_has_the_shape_it_is_named_after():
    names = {"OPT-125M": 125e6, "OPT-1.3B": 1.3e9, "OPT-2.7B": 2.7e9}
    assert all(abs(shape.d / names[name] - 1) < 0.03 for name, shape in paper_scale.OPT.items())
    model = paper_scale.random_opt(TINY["OPT-125M"], torch.bfloat16, CPU)
    assert loading.parameter_count(model) == TINY["OPT-125M"].d
    assert model.dtype == torch.bfloat16


def test_the_time_of_the_inverse_and_the_speeds_are_written(tmp_path):
    paper_scale.measure_inverse(paper_scale.Table(tmp_path, "inverse_fisher_gpu", "x"), CPU, [(200, 2, 8)])
    [row] = gpu_times(tmp_path).to_dict("records")
    assert (row["card"], row["weights"], row["m"], row["block"]) == ("x", 200, 2, 8)
    assert row["seconds"] > 0
    table = paper_scale.Table(tmp_path, "gpu_measured", "x")
    paper_scale.measure_speeds(table, CPU, side=16)
    paper_scale.measure_decompositions(table, CPU, sides=[8])
    found = read_results(tmp_path, "gpu_measured")
    assert sorted(found["method"]) == ["copy", "eigendecomposition", "product", "product", "product"]
    assert (found["value"] > 0).all()


def test_what_the_tests_recorded_is_read_from_their_report(tmp_path):
    (tmp_path / "r.xml").write_text(
        '<testsuites><testsuite><testcase name="test_a[kfac-opt-torch.float64]"><properties>'
        '<property name="error" value="1e-12"/></properties></testcase>'
        '<testcase name="test_a[fisher_dual:drawn-gpt2-torch.float32]"><failure message="no"/></testcase>'
        '<testcase name="test_b"><skipped/></testcase></testsuite></testsuites>'
    )
    table = on_gpu.read_report(tmp_path / "r.xml")
    assert table.drop(columns="error").to_numpy().tolist() == [
        ["kfac", "opt", "float64", "passed"],
        ["fisher_dual:drawn", "gpt2", "float32", "failure"],
        ["test_b", "", "", "skipped"],
    ]
    assert table["error"].iloc[0] == 1e-12
    assert table["error"].isna().sum() == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_the_command_says_so(tmp_path, capsys):
    assert on_gpu.main(["--out", str(tmp_path / "out")]) == 1
    assert "no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
