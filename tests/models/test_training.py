import copy
import json
import multiprocessing
import os
import signal
import sys
import time
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch
from helpers import ARCHITECTURES, TINY, random_sequences, tiny_model
from torch.optim.optimizer import register_optimizer_step_pre_hook

import unlearnlib
from unlearnlib import weights
from unlearnlib.losses import mean_loss, sequence_losses
from unlearnlib.models import loading, training
from unlearnlib.models.training import Run, Training

SHORT = Training(epochs=3, batch_size=4, learning_rate=1e-2)


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("UNLEARNLIB_CACHE", str(tmp_path))
    return Run(TINY, random_sequences(10), SHORT, seed=0)


def same_weights(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_it_learns_and_is_deterministic():
    sequences, ends = random_sequences(8), []
    for _ in range(2):
        model = tiny_model()
        before = mean_loss(model, sequences)
        losses = training.train(model, sequences, Training(epochs=60, learning_rate=2e-2), seed=0)
        assert len(losses) == 60
        assert mean_loss(model, sequences) < before / 2
        ends.append(model)
    assert same_weights(*ends)
    other = tiny_model()
    training.train(other, sequences, Training(epochs=60, learning_rate=2e-2, batch_size=4), seed=1)
    assert not same_weights(ends[0], other)


WITH_DROPOUT = {
    "opt": {"dropout": 0.1, "attention_dropout": 0.1, "layerdrop": 0.1},
    "gpt2": {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1},
    "llama": {"attention_dropout": 0.1},
}


@pytest.mark.parametrize("architecture", WITH_DROPOUT)
def test_a_configuration_with_dropout_trains_the_same_twice(architecture):
    """Nothing comes from the global random numbers, which no seed of a run sets."""
    config = ARCHITECTURES[architecture] | WITH_DROPOUT[architecture]
    first, second = (loading.load_model(config, seed=0, device="cpu") for _ in range(2))
    settings = Training(epochs=3, batch_size=4, learning_rate=1e-2, checkpointing=architecture == "opt")
    for model in (first, second):
        training.train(model, random_sequences(8), settings, seed=0)
    assert same_weights(first, second)


def test_one_step_against_a_hand_written_adamw():
    model, sequences = tiny_model(), random_sequences(4)
    start = weights.snapshot(model)
    gradient = weights.mean_gradient(model, sequences, sequence_losses)
    settings = Training(epochs=2, batch_size=4, learning_rate=1e-3)
    schedule = []

    def stop(optimizer, args, kwargs):
        schedule.append(optimizer.param_groups[0]["lr"])
        if len(schedule) == 2:
            raise KeyboardInterrupt

    handle = register_optimizer_step_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        training.train(model, sequences, settings, seed=0)
    handle.remove()
    clip = min(1.0, 1.0 / (weights.norm(gradient) + 1e-6))
    for name, p in weights.parameters(model).items():
        g = clip * gradient[name]
        # After bias correction the first step of Adam has m = g and v = g².
        expected = start[name] * (1 - schedule[0] * 0.01) - schedule[0] * g / (g.abs() + 1e-8)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-9, atol=1e-12)


def trained(device="cpu", **settings):
    model = tiny_model(dtype=torch.float32, device=device)
    steps = Training(epochs=20, learning_rate=1e-2, **settings)
    return model, torch.tensor(training.train(model, random_sequences(8), steps, seed=0))


def test_on_a_cpu_bfloat16_is_float32():
    """Also on a processor that has the format: results must not depend on which one it is."""
    (plain, exact), (model, losses) = trained(), trained(bfloat16=True)
    assert torch.equal(losses, exact)
    assert same_weights(plain, model)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_bfloat16_follows_float32():
    (_, exact), (model, rounded) = trained(device="cuda"), trained(device="cuda", bfloat16=True)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not torch.equal(rounded, exact)
    assert exact[0] - exact[-1] > 0.5  # there is something to follow
    torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0)


def test_checkpointing_changes_memory_and_not_the_model():
    (plain, _), (model, _) = trained(), trained(checkpointing=True)
    assert same_weights(plain, model)
    assert not model.is_activation_checkpointing


def test_interrupted_and_resumed_equals_uninterrupted(tmp_path):
    sequences, checkpoint = random_sequences(10), tmp_path / "c.safetensors"
    whole, broken = tiny_model(), tiny_model()
    losses = training.train(whole, sequences, SHORT, seed=3)
    steps = []

    def interrupt(*_):
        steps.append(1)
        if len(steps) == 5:
            raise KeyboardInterrupt

    handle = register_optimizer_step_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        training.train(broken, sequences, SHORT, seed=3, checkpoint=checkpoint, checkpoint_seconds=0)
    handle.remove()
    assert checkpoint.exists()
    resumed = tiny_model(seed=7)  # whatever its weights, the checkpoint's count
    resumed_losses = training.train(resumed, sequences, SHORT, seed=3, checkpoint=checkpoint)
    assert same_weights(whole, resumed)
    assert resumed_losses == losses


def test_the_checkpoint_goes_once_the_model_is_safe(run, monkeypatch):
    """A disk that is full when the model is written must not cost the training."""
    checkpoint, inner = run.folder.with_suffix(".checkpoint.safetensors"), training.train

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(training, "train", lambda *arguments: inner(*arguments, checkpoint_seconds=0))
        patch.setattr(training, "store", full)
        with pytest.raises(OSError, match="No space left"):
            training.train_missing([run])
    assert checkpoint.exists()
    steps = []
    handle = register_optimizer_step_pre_hook(lambda *_: steps.append(1))
    training.train_missing([run])
    handle.remove()
    assert steps == []
    assert run.folder.exists()
    assert not checkpoint.exists()


def test_a_damaged_checkpoint_is_not_used(tmp_path):
    checkpoint = tmp_path / "c.safetensors"
    checkpoint.write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00half a head")
    model, whole = tiny_model(), tiny_model()
    with pytest.warns(UserWarning, match="damaged: training from the start"):
        training.train(model, random_sequences(4), SHORT, seed=0, checkpoint=checkpoint)
    training.train(whole, random_sequences(4), SHORT, seed=0)
    assert same_weights(model, whole)


def test_bad_input():
    with pytest.raises(ValueError, match="nothing to train on"):
        training.train(tiny_model(), random_sequences(4)[:0], SHORT, seed=0)
    with pytest.raises(ValueError, match="33 tokens do not fit the model's context of 32"):
        training.train(tiny_model(), random_sequences(4, length=33), SHORT, seed=0)
    with pytest.raises(FloatingPointError, match=r"the loss at step \d+ of 60 is nan: the learning rate 1e\+200"):
        training.train(tiny_model(), random_sequences(8), Training(epochs=60, learning_rate=1e200), seed=0)


def test_a_finished_model_is_loaded_not_trained(run, monkeypatch):
    first = training.load_trained(run)
    assert training.training_record(run)["seconds"] > 0
    assert len(training.training_record(run)["losses"]) == 9
    monkeypatch.setattr(training, "train", lambda *_: pytest.fail("trained twice"))
    assert same_weights(first, training.load_trained(run))
    assert not any(file.suffix in (".bin", ".pt", ".pkl") for file in run.folder.iterdir())


def test_everything_that_makes_a_model_is_in_its_name(run):
    others = [
        Run(TINY | {"num_hidden_layers": 1}, run.sequences, run.training, run.seed),
        Run(TINY, run.sequences.flip(0), run.training, run.seed),
        Run(TINY, run.sequences, Training(epochs=4, batch_size=4, learning_rate=1e-2), run.seed),
        Run(TINY, run.sequences, run.training, 1),
    ]
    assert len({r.folder for r in [run, *others]}) == 5
    assert {"torch", "transformers", "tokenizers"} == run.description["versions"].keys()


def fresh(run):
    return Run(run.source, run.sequences, run.training, run.seed, run.last_blocks)


def test_a_model_of_another_device_is_not_served(run, monkeypatch):
    training.load_trained(run)
    cards = ["card A", "card B"]
    with monkeypatch.context() as patch:
        patch.setattr(loading, "default_device", lambda: torch.device("cuda"))
        patch.setattr(torch.cuda, "get_device_name", lambda device: cards[0])
        folders = [run.folder, fresh(run).folder]
        cards.reverse()
        folders.append(fresh(run).folder)
    assert len(set(folders)) == 3
    monkeypatch.setattr(loading, "device_name", lambda device: "another")
    trained = []
    monkeypatch.setattr(training, "train", lambda *_: trained.append(1) or [])
    monkeypatch.setattr(training, "CODE", ())  # the source of a lambda is not to be found
    training.load_trained(fresh(run))
    assert trained


def test_weights_that_change_in_their_folder_make_another_model(run, tmp_path):
    model = tiny_model(dtype=torch.float32)
    model.save_pretrained(tmp_path / "source")
    before = Run(str(tmp_path / "source"), run.sequences, SHORT, seed=0)
    assert fresh(before).folder == before.folder
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    model.save_pretrained(tmp_path / "source")
    assert fresh(before).folder != before.folder


def called_within(function):
    """The functions of the library, by module and name, that ``function`` calls."""
    found, package = set(), Path(unlearnlib.__file__).parent

    def note(frame, event, _argument):
        code, file = frame.f_code, Path(frame.f_code.co_filename)
        if event == "call" and package in file.parents and "<" not in code.co_qualname:
            found.add((file.stem, code.co_qualname))

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return found


# They are called on the way to a trained model, but do not decide what it becomes.
NO_INFLUENCE = {
    "check_length",
    "note_pass",
    "default_device",
    "load_checkpoint",
    "save_checkpoint",
    "store",
    "clock",
    "Run.folder",
    "Run.description",
}


def test_all_code_that_makes_a_model_is_in_its_name(run, monkeypatch):
    last = Run(TINY, run.sequences, Training(epochs=1, batch_size=4, bfloat16=True), 0, last_blocks=1)
    called = called_within(lambda: training.train_into_cache(last))
    called = {(module, name) for module, name in called if module != "cache" and name not in NO_INFLUENCE}
    called -= {("loading", "device_name"), ("loading", "fingerprint")}
    named = {(f.__module__.rpartition(".")[2], f.__qualname__) for f in training.CODE}
    assert {("training", "train"), ("loading", "train_last_blocks"), ("losses", "token_losses")} <= called
    assert called <= named
    folder = run.folder
    for function in training.CODE:
        with monkeypatch.context() as patch:
            patch.setattr(training, "CODE", tuple(f for f in training.CODE if f is not function))
            assert fresh(run).folder != folder
    assert fresh(run).folder == folder


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_model_is_trained_again(run, damage):
    first = copy.deepcopy(training.load_trained(run))  # a loaded model may still be backed by its file
    file = run.folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(content if damage == "flip" else content[:-100])
    with pytest.warns(UserWarning, match="is damaged: training it again"):
        again = training.load_trained(run)
    assert same_weights(first, again)


def _train_and_count(cache, run, count):
    os.environ["UNLEARNLIB_CACHE"] = cache
    inner = training.train

    def counted(*arguments):
        with count.get_lock():
            count.value += 1
        time.sleep(1)  # long enough for the other process to come and want the same
        return inner(*arguments)

    training.train = counted
    runs = [run, Run(run.source, run.sequences, run.training, 1)]
    training.train_missing(runs)
    for each in runs:
        assert training.intact(each.folder)


def test_two_processes_share_the_work(run, tmp_path):
    context = multiprocessing.get_context("spawn")
    count = context.Value("i", 0)
    arguments = (str(tmp_path), run, count)
    processes = [context.Process(target=_train_and_count, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    assert count.value == 2  # two models, each trained once


def _train_slowly(cache, run, started):
    os.environ["UNLEARNLIB_CACHE"] = cache
    save = training.save_checkpoint

    def saved(*arguments):
        save(*arguments)
        started.set()
        time.sleep(0.2)

    training.save_checkpoint = saved
    inner = training.train
    training.train = lambda *arguments: inner(*arguments, checkpoint_seconds=0)
    training.train_missing([run])


def test_killed_during_training_goes_on_where_it_was(run, tmp_path):
    context = multiprocessing.get_context("spawn")
    started = context.Event()
    process = context.Process(target=_train_slowly, args=(str(tmp_path), run, started))
    process.start()
    assert started.wait(120)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not run.folder.exists()
    checkpoint = run.folder.with_suffix(".checkpoint.safetensors")
    with safetensors.safe_open(checkpoint, "pt") as file:
        done = json.loads(file.metadata()["state"])["losses"]
    assert 1 <= len(done) < 9
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed = training.load_trained(run)
    whole = training.loading.load_model(TINY, seed=0)
    assert training.train(whole, run.sequences, SHORT, seed=0)[: len(done)] == done
    assert same_weights(whole, resumed)
