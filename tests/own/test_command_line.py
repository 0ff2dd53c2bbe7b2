import dataclasses
import json
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import ARCHITECTURES
from own_helpers import FORGET, HOLDOUT, LENGTH, RETAIN, write
from safetensors.torch import load_file

from unlearnlib.curvature import kronecker_groups
from unlearnlib.curvature.kronecker_blocks import find_blocks
from unlearnlib.models import loading
from unlearnlib.models.training import Training, train
from unlearnlib.own import command_line, fulfilment, texts
from unlearnlib.own.request import STRENGTHS, Request
from unlearnlib.texts.sequences import train_tokenizer
from unlearnlib.weights import difference, norm


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that has learnt the texts, and the files."""
    folder, tokenizer = tmp_path_factory.mktemp("own"), train_tokenizer(FORGET + RETAIN + HOLDOUT, 300)
    for name, written in {"forget": FORGET, "retain": RETAIN, "holdout": HOLDOUT}.items():
        write(folder / f"{name}.jsonl", written)
    files = {name: str(folder / f"{name}.jsonl") for name in ("forget", "retain")}
    material = texts.read_material(tokenizer, files, [], LENGTH)
    model = loading.load_model(ARCHITECTURES["opt"] | {"vocab_size": 300}, device="cpu")
    known = torch.cat([material.forget, material.retain])
    train(model, known, Training(epochs=20, learning_rate=1e-2), seed=0)
    for part in (model, tokenizer):
        part.save_pretrained(folder / "model")
    return folder


@pytest.fixture(autouse=True)
def same_handler():
    """The program changes what a signal does, as programs may."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def settings(folder, place, **changes):
    """Parameters of a small request."""
    files = {f"{name}_file": str(folder / f"{name}.jsonl") for name in ("forget", "retain", "holdout")}
    asked = {"model": str(folder / "model"), "output": str(place), "length": LENGTH, "target_loss": 4.0}
    return asked | files | changes


def options(folder, place, **changes):
    """The same on the command line."""
    asked = {name: value for name, value in settings(folder, place, **changes).items() if value is not None}
    return [text for name, value in asked.items() for text in (f"--{name.replace('_', '-')}", str(value))]


def test_help_names_every_parameter_with_its_default_and_every_method(capsys):
    with pytest.raises(SystemExit) as ended:
        command_line.main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for name, unit in STRENGTHS.items():
        assert re.search(rf"^  {name} +{re.escape(unit)}$", text, re.MULTILINE)
    _, required, optional = re.split("^required:|^optional:", text, flags=re.MULTILINE)
    described = {}
    for part, must in ((required, True), (optional.partition("\n\n")[0], False)):
        for option in re.split(r"\n  (?=--)", part)[1:]:
            name, _, said = " ".join(option.split()).partition(" ")
            described[name] = must, said
    assert described.pop("--device")
    assert list(described) == [f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(Request)]
    for field, (must, said) in zip(dataclasses.fields(Request), described.values(), strict=True):
        assert must == (field.default is dataclasses.MISSING)
        assert len(said) > 20
        if field.default not in (dataclasses.MISSING, None, ()):
            assert said.endswith(f"(default: {field.default})")


def test_options_are_the_parameters_of_a_request(folder, tmp_path):
    asked = settings(folder, tmp_path / "out", method="kfac", damping=0.5, noise=0.25, retain_weight=2.0, seed=7)
    asked |= {"learning_rate": 1e-3, "reference": "theirs", "secrets": "secrets.txt", "factors": "f"}
    line = [text for name, value in asked.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    several = ["a.jsonl", "b,c.jsonl"]
    found = vars(command_line.parser().parse_args([*line, "--earlier-forget-files", *several, "--device", "cpu"]))
    assert found.pop("device") == torch.device("cpu")
    assert Request(**found) == Request(**asked, earlier_forget_files=several)
    least = {name: asked[name] for name in ("model", "forget_file", "retain_file", "output")}
    line = [text for name, value in least.items() for text in (f"--{name.replace('_', '-')}", value)]
    found = vars(command_line.parser().parse_args([*line, "--strength", "0.5"]))
    assert found.pop("device") is None
    assert Request(**found) == Request(**least, strength=0.5)


def test_options_may_stand_in_a_file(folder, tmp_path):
    lines = [f'--output "{tmp_path}/a b"  # the place', "", f"--model {folder}/model --length 20"]
    (tmp_path / "request.txt").write_text("\n".join(lines))
    line = [f"@{tmp_path}/request.txt", "--forget-file", "a", "--retain-file", "b", "--length", "30"]
    found = command_line.parser().parse_args(line)
    assert (found.output, found.length) == (f"{tmp_path}/a b", 30)
    (tmp_path / "request.txt").write_text('--model m\n--output "a b')
    with pytest.raises(ValueError, match=r"""the line '--output "a b' among the options"""):
        command_line.parser().parse_args(line)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": "long"}, "argument --length: invalid int value: 'long'"),
        ({"method": "magic"}, "unknown method 'magic': choose one of gradient_ascent"),
        ({"magic": 1}, "unrecognized arguments: --magic 1 (--help explains"),
        ({"device": "tricorder"}, "argument --device: there is no device tricorder here: name another"),
        ({"model": "./nowhere"}, "there is no model './nowhere'"),
        ({"forget_file": "nowhere.jsonl"}, "there is no file nowhere.jsonl: give the path"),
        ({"output": "/dev/null"}, "the output /dev/null exists and is never overwritten: name a new folder"),
        ({"output": "/dev/null/out"}, "nothing can be written at /dev/null/out"),
        ({"target_loss": float("nan")}, "target_loss must be a positive number"),
    ],
)
def test_an_error_is_one_line_and_exit_code_1(folder, tmp_path, capfd, changes, message):
    assert command_line.main(options(folder, tmp_path / "out", **changes)) == 1
    said = capfd.readouterr()
    [line] = [line for line in said.err.splitlines() if not re.match(r" *\d+\.\d s  ", line)]
    assert line.startswith("error: ")
    assert message in line
    assert said.out == ""
    assert not (tmp_path / "out").exists()


def test_too_little_memory_is_said_with_the_remedy(folder, tmp_path, monkeypatch, capfd):
    def fail(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has much to say.")

    monkeypatch.setattr(command_line, "fulfil", fail)
    assert command_line.main(options(folder, tmp_path / "out")) == 1
    message = "CUDA out of memory. Tried to allocate 2.00 GiB: take a smaller length, or a device with more memory"
    assert capfd.readouterr().err == f"error: {message}\n"


def test_what_is_missing_is_named(capfd):
    assert command_line.main(["--model", "here"]) == 1
    assert "arguments are required: --forget-file, --retain-file, --output (" in capfd.readouterr().err


def run(*arguments, processes=0, program=("-m", "unlearnlib.own"), **more):
    """The program, in a process of its own, or in several that torchrun starts."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes else []
    line = [sys.executable, *launcher, *program, *arguments]
    return subprocess.run(line, capture_output=True, text=True, timeout=240, check=False, **more)


def weights_and_report(place):
    report = json.loads((place / "report.json").read_text())
    del report["cost"]
    return load_file(place / "model.safetensors"), report


def test_a_request_is_fulfilled_as_by_the_library_and_warnings_come_last(folder, tmp_path):
    ended = run(*options(folder, "out"), cwd=tmp_path)
    assert ended.returncode == 0
    assert ended.stdout == "The unlearned model and its report are in out\n"
    expected = fulfilment.fulfil(Request(**settings(folder, tmp_path / "expected")), "cpu")
    (found, report), (weights, _) = (weights_and_report(tmp_path / name) for name in ("out", "expected"))
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    assert report == {name: value for name, value in expected.items() if name != "cost"}
    lines = re.split(r"[\r\n]+", ended.stderr.strip())
    number = len(report["warnings"])
    assert number > 0
    assert lines[-number:] == [f"warning: {warning}" for warning in report["warnings"]]
    stages = [match[1] for line in lines if (match := re.search(r"\d+\.\d s  (\w+)", line))]
    beginnings = (
        "reading rehearsing measuring unlearning differentiating building choosing searching writing measuring"
    )
    assert stages == beginnings.split()


def flat(value, place=""):
    """All that a report says, by its place in it."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for name, part in items for k, v in flat(part, f"{place}/{name}").items()}
    return {place: value}


SLOW = """
import sys, time
from unlearnlib.curvature.kronecker_store import FactorStore
from unlearnlib.own.command_line import main

put = FactorStore.put

def slowly(store, block):
    found = put(store, block)
    time.sleep(1)
    return found

FactorStore.put = slowly
sys.exit(main())
"""


def test_an_interrupted_request_goes_on_from_the_factors_that_are_finished(folder, tmp_path, monkeypatch):
    asked, kept = {"damping": 0.1}, tmp_path / "factors"
    line = options(folder, tmp_path / "out", factors=kept, **asked)
    with subprocess.Popen([sys.executable, "-c", SLOW, *line], stderr=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + 200
        while len(list(kept.glob("*.safetensors"))) < 2 and time.monotonic() < until:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.splitlines()[-1] == "interrupted; nothing is at the output"
    assert list(tmp_path.iterdir()) == [kept]
    finished = {path: path.stat().st_mtime_ns for path in kept.glob("*.safetensors")}
    matrices = len(find_blocks(loading.load_model(folder / "model", device="cpu")))
    assert 2 <= len(finished) < matrices

    assert command_line.main(line) == 0
    assert len(list(kept.glob("*.safetensors"))) == matrices
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    fulfilment.fulfil(Request(**settings(folder, tmp_path / "expected", **asked)), "cpu")
    (found, report), (weights, expected) = (weights_and_report(tmp_path / name) for name in ("out", "expected"))
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    assert report == expected

    monkeypatch.setattr(kronecker_groups, "build_group", must_not_be_called)
    later = {"forget_file": write(tmp_path / "later.jsonl", FORGET[:4]), "factors": str(kept), **asked}
    assert command_line.main(options(folder, tmp_path / "later", **later)) == 0
    monkeypatch.setattr(fulfilment, "measure", must_not_be_called)
    with pytest.raises(ValueError, match="were built with other method: name another folder"):
        fulfilment.fulfil(Request(**settings(folder, tmp_path / "other", method="ekfac", **later)), "cpu")


def must_not_be_called(*args, **settings):
    raise AssertionError("this had been done already, or should not have been begun")


@pytest.mark.parametrize(
    "asked", [{"method": "kfac", "damping": 0.1}, {"method": "newton", "strength": 5, "target_loss": None}]
)
def test_two_processes_do_what_one_does_and_the_first_speaks(folder, tmp_path, asked):
    ended = run(*options(folder, tmp_path / "out", **asked), processes=2)
    assert ended.returncode == 0
    assert ended.stdout.count("The unlearned model and its report are in") == 1
    assert ended.stderr.count(f"unlearning with {asked['method']}") == 1
    fulfilment.fulfil(Request(**settings(folder, tmp_path / "expected", **asked)), "cpu")
    (found, report), (weights, expected) = (weights_and_report(tmp_path / name) for name in ("out", "expected"))
    for name in weights:  # by rounding only the biases of keys have gradients, of which Adam makes steps
        if asked["method"] == "newton" and name.endswith("k_proj.bias"):
            found[name] = weights[name]
    assert norm(difference(found, weights)) < 1e-6 * norm(weights)
    said, expected = flat(report), flat(expected)
    assert said.keys() == expected.keys()
    for place, value in expected.items():
        known = isinstance(value, float)
        # Some are differences of losses, which are of several nats.
        assert said[place] == (pytest.approx(value, rel=1e-6, abs=1e-6) if known else value), place
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "out"]


APART = """
import os, sys
from unlearnlib.own.command_line import main

sys.exit(main([*sys.argv[1:], "--forget-file", f"forget{os.environ['RANK']}.jsonl"]))
"""


def test_what_one_process_finds_wrong_ends_all_with_one_message(folder, tmp_path):
    (tmp_path / "program.py").write_text(APART)
    write(tmp_path / "forget0.jsonl", FORGET)
    (tmp_path / "forget1.jsonl").write_text('{"text": "one"}\n{"text": ')
    before = sorted(tmp_path.iterdir())
    ended = run(*options(folder, "out"), processes=2, program=["program.py"], cwd=tmp_path)
    assert ended.returncode == 1
    said = [line for line in ended.stderr.splitlines() if "error: " in line]
    message = 'line 2 of forget1.jsonl is no JSON object with a string "text": one object a line'
    assert said == [f"error: process 1: {message}"]
    assert command_line.__file__ not in ended.stderr  # as in a traceback
    assert sorted(tmp_path.iterdir()) == before


def test_another_process_speaks_only_if_nothing_ends_it(folder, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(command_line, "GRACE", 0.0)
    assert command_line.main(options(folder, tmp_path / "out", forget_file="nowhere.jsonl")) == 1
    assert (
        capfd.readouterr().err
        == "error: process 1: there is no file nowhere.jsonl: give the path of a file of texts\n"
    )
