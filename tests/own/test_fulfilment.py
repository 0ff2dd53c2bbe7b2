import dataclasses
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import ARCHITECTURES
from own_helpers import FORGET, HOLDOUT, LENGTH, RETAIN, write
from scipy.stats import linregress
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from unlearnlib import cache, cost, losses, weights
from unlearnlib.curvature import kronecker
from unlearnlib.losses import sequence_losses
from unlearnlib.measures import exposure
from unlearnlib.methods.matching import Line
from unlearnlib.models import loading
from unlearnlib.models.training import Training, train
from unlearnlib.own import checks, fulfilment, methods, rehearsal, request, texts
from unlearnlib.own import report as own_report
from unlearnlib.own.request import Request
from unlearnlib.texts.bigrams import Bigrams
from unlearnlib.texts.sequences import train_tokenizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(FORGET + RETAIN + HOLDOUT, 300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """Models of three architectures, each with a reference trained without the forget texts, and the files."""
    folder = tmp_path_factory.mktemp("own")
    for name, written in {"forget": FORGET, "retain": RETAIN, "holdout": HOLDOUT}.items():
        write(folder / f"{name}.jsonl", written)
    files = {name: str(folder / f"{name}.jsonl") for name in ("forget", "retain", "holdout")}
    material = texts.read_material(tokenizer, files, [], LENGTH)
    for architecture, config in ARCHITECTURES.items():
        for kind in ("model", "reference"):
            model = loading.load_model(config | {"vocab_size": 300}, device="cpu")
            known = [material.forget, material.retain] if kind == "model" else [material.retain]
            train(model, torch.cat(known), Training(epochs=20, learning_rate=1e-2), seed=0)
            if architecture == "llama" and kind == "model":
                model.bfloat16()
            model.save_pretrained(folder / architecture / kind)
            tokenizer.save_pretrained(folder / architecture / kind)
    return folder


@pytest.fixture(autouse=True)
def short_probe(monkeypatch):
    monkeypatch.setattr(own_report, "PROBE_STEPS", 3)


def make(folder, output, architecture="opt", **changes):
    settings = {
        name: str(folder / f"{name.removesuffix('_file')}.jsonl") for name in ("forget_file", "retain_file")
    }
    settings |= {"model": str(folder / architecture / "model"), "output": str(output), "length": LENGTH}
    return Request(**settings | {"strength": 1.0, "method": "gradient_ascent"} | changes)


def load(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def loss(model, sequences):
    """The textbook's mean token loss."""
    z = model(input_ids=sequences).logits[:, :-1]
    return F.cross_entropy(z.transpose(1, 2), sequences[:, 1:])


def gradients(model, sequences):
    """The gradient of each sequence, a row each, in float64."""
    names = dict(model.named_parameters())
    rows = [torch.autograd.grad(loss(model, sequence[None]), list(names.values())) for sequence in sequences]
    return torch.stack([torch.cat([g.flatten().double() for g in row]) for row in rows])


# Checking


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": ""}, "model is missing"),
        ({"forget_file": None}, "forget_file is missing"),
        ({"method": "magic"}, "unknown method 'magic': choose one of gradient_ascent"),
        ({"strength": "match"}, "needs a reference model or a target_loss"),
        ({"strength": 1.0, "target_loss": 3.0}, "leave one of the two out"),
        ({"strength": "much"}, "the strength must be 'match', 'estimate' or a positive number, not 'much'"),
        ({"strength": "estimate"}, "strength 'estimate' needs a holdout_file"),
        ({"strength": "estimate", "target_loss": 3.0}, "leave one of the two out"),
        ({"strength": 3, "method": "gradient_difference"}, "needs a retain_weight to go with it"),
        ({"retain_weight": -1.0}, "retain_weight must be a positive number"),
        ({"earlier_forget_files": 3}, "earlier_forget_files must be names of files"),
        ({"earlier_forget_files": [3]}, "earlier_forget_files must be names of files"),
        ({"strength": -1}, "the strength must be"),
        ({"strength": float("nan")}, "the strength must be"),
        ({"strength": True}, "the strength must be"),
        ({"strength": 1.5, "method": "gradient_difference"}, "a number of steps, not 1.5"),
        ({"strength": 1.5, "method": "newton"}, "the strength of newton is a number of steps, not 1.5"),
        ({"factors": "here", "method": "newton"}, "newton has no Kronecker factors: leave factors out"),
        ({"damping": 0.0}, "damping must be a positive number, not 0.0"),
        ({"length": 1}, "length must be a whole number of tokens, 2 or more, not 1"),
        ({"length": 64.5}, "length must be a whole number"),
        ({"reference": 2024}, "reference must be a name, not the number 2024: write it with ./"),
        ({"secrets": 4821}, "secrets must be a name, not the number"),
        ({"secrets": None}, "secrets must be a list of texts"),
        ({"secrets": ["0815", 4821]}, "secret 2 is no text: put it between quotation marks"),
        ({"seed": 1.5}, "seed must be a whole number of at most 18 digits, not 1.5"),
        ({"seed": 2**64}, "seed must be a whole number"),
        ({"factors": "here"}, "gradient_ascent has no Kronecker factors: leave factors out, or choose kfac or"),
    ],
)
def test_impossible_settings_are_errors(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, tmp_path / "out", **changes)


def test_no_output_is_overwritten_and_no_model_written_into(folder, tmp_path):
    with pytest.raises(FileExistsError, match="never overwritten"):
        make(folder, tmp_path)
    with pytest.raises(ValueError, match="lies within"):
        make(folder, folder / "opt" / "model" / "new")
    for place in (folder / "opt" / "model", folder / "opt" / "model" / "new"):
        with pytest.raises(ValueError, match=r"the folder of factors .* lies within .*, which must not change"):
            make(folder, tmp_path / "out", method="kfac", factors=str(place))
    with pytest.raises(ValueError, match="lie within the output, which is made last: move them"):
        make(folder, tmp_path / "out", method="kfac", factors=str(tmp_path / "out" / "factors"))

    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(FileExistsError, match="never overwritten"):
        make(folder, tmp_path / "link")


def test_a_tilde_is_the_home_folder(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    request = make(folder, "~/out", forget_file="~/forget.jsonl")
    assert request.output == str(tmp_path / "out")
    assert request.files["forget"] == str(tmp_path / "forget.jsonl")


def must_not_be_measured(*args):
    raise AssertionError("it should have been refused before anything is measured")


def test_a_second_run_for_an_output_is_refused_at_once(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(fulfilment, "measure", must_not_be_measured)
    with cache.new_folder(tmp_path / "out"):
        before = sorted(tmp_path.iterdir())
        with pytest.raises(BlockingIOError, match="another run is making"):
            fulfilment.fulfil(make(folder, tmp_path / "out"), CPU)
        assert sorted(tmp_path.iterdir()) == before


def test_what_comes_to_the_place_of_the_output_stays(folder, tmp_path, monkeypatch):
    def interfere(*args):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "theirs").write_text("precious")
        return own_report.measure(*args)

    monkeypatch.setattr(fulfilment, "measure", interfere)
    with pytest.raises(FileExistsError, match="is left as it is: the finished folder is") as error:
        fulfilment.fulfil(make(folder, tmp_path / "out"), CPU)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["theirs"]
    [finished] = [path for path in tmp_path.iterdir() if path.name != "out"]
    assert str(finished) in str(error.value)
    assert (finished / "report.json").is_file()
    load(finished)


@pytest.mark.parametrize("place", ["forget.jsonl/out", "x" * 300])
def test_places_that_cannot_be_written_are_found_at_once(folder, tmp_path, monkeypatch, place):
    monkeypatch.setattr(fulfilment, "measure", must_not_be_measured)
    write(tmp_path / "forget.jsonl", FORGET)
    with pytest.raises(OSError, match="nothing can be written at"):
        fulfilment.fulfil(make(folder, tmp_path / place), CPU)


def test_a_long_name_is_a_name_like_any_other(folder, tmp_path):
    fulfilment.fulfil(make(folder, tmp_path / ("x" * 250)), CPU)
    assert [path.name for path in tmp_path.iterdir()] == ["x" * 250]


def copy_of(folder, tmp_path):
    return shutil.copytree(folder / "opt" / "model", tmp_path / "copy")


def test_models_that_cannot_be_used_are_errors(folder, tmp_path):
    with pytest.raises(OSError, match=r"there is no model '\./nowhere'"):
        checks.outline("./nowhere")
    copy = copy_of(folder, tmp_path)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ValueError, match="quantized"):
        checks.outline(str(copy))
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "unheard-of"}))
    with pytest.raises(ValueError, match="unheard-of"):
        checks.outline(str(copy))
    (copy / "config.json").write_text(json.dumps({"model_type": "t5", "num_layers": 1}))
    with pytest.raises(ValueError, match=r"the architecture 't5' of .* cannot be used"):
        checks.outline(str(copy))
    (copy / "config.json").write_text('{"model_type": "opt"')
    with pytest.raises(OSError, match=r"the configuration of .* cannot be read"):
        checks.outline(str(copy))
    foreign = {"model_type": "theirs", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (copy / "config.json").write_text(json.dumps(foreign))
    (copy / "code.py").write_text("raise SystemExit")
    with pytest.raises(ValueError, match="needs program code of its own, which is never run here"):
        checks.outline(str(copy))
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has an adapter: merge it"):
        checks.outline(str(copy))
    (copy / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has an adapter: merge it"):
        checks.outline(str(copy))
    (copy / "adapter_config.json").unlink()
    with pytest.raises(OSError, match=r"has no config\.json"):
        checks.outline(str(copy))
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "model.safetensors").rename(copy / "other.safetensors")
    (copy / "pytorch_model.bin").write_bytes(b"pickled")
    with pytest.raises(ValueError, match="no weights in safetensors"):
        checks.outline(str(copy))


def test_files_and_folders_that_cannot_be_read_are_no_models(folder, tmp_path, monkeypatch):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(OSError, match=r"model\.gguf is a file: give the folder of a model"):
        checks.outline(str(tmp_path / "model.gguf"))

    def forbid(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(checks.Path, "iterdir", forbid)
    with pytest.raises(OSError, match=r"the folder .*model cannot be read: .*Permission denied"):
        checks.outline(str(folder / "opt" / "model"))


@pytest.mark.parametrize("adapter", ["adapter_config.json", None])
def test_nor_is_a_model_beside_its_adapter(monkeypatch, adapter):
    config = loading.load_model(ARCHITECTURES["opt"], device="meta").config
    monkeypatch.setattr(loading, "load_config", lambda source: config)
    asked = []
    monkeypatch.setattr(
        checks, "find_adapter_config_file", lambda *args, **kw: asked.append((args, kw)) or adapter
    )
    if adapter:
        with pytest.raises(ValueError, match="nobody/adapted@v2 has an adapter: merge it"):
            checks.outline("nobody/adapted@v2")
    else:
        checks.outline("nobody/adapted@v2")
    assert asked == [(("nobody/adapted",), {"revision": "v2"})]


def test_tokenizers_that_do_not_belong_are_errors(folder, tmp_path, tokenizer):
    request = make(folder, tmp_path / "out", model=str(copy_of(folder, tmp_path)))
    larger = train_tokenizer(FORGET, 310)
    assert len(larger) == 310
    larger.save_pretrained(request.model)
    with pytest.raises(ValueError, match="has 310 entries, the model's table 300 rows"):
        checks.check_request(request, CPU)
    with pytest.raises(ValueError, match="another vocabulary than the model"):
        checks.check_request(make(folder, tmp_path / "out", reference=request.model), CPU)
    gap = json.loads((folder / "opt" / "model" / "tokenizer.json").read_text())
    gap["model"]["vocab"] |= {token: 309 for token, i in gap["model"]["vocab"].items() if i == 299}
    (Path(request.model) / "tokenizer.json").write_text(json.dumps(gap))  # 300 entries, of which one is number 309
    with pytest.raises(ValueError, match="has 310 entries, the model's table 300 rows"):
        checks.check_request(request, CPU)
    endless = AutoTokenizer.from_pretrained(folder / "opt" / "model")
    endless.eos_token = None
    endless.save_pretrained(request.model)
    with pytest.raises(ValueError, match="no token that ends a text"):
        checks.check_request(request, CPU)
    for file in (tmp_path / "copy").glob("*token*"):
        file.unlink()
    with pytest.raises(OSError, match="there is no tokenizer with the model"):
        checks.check_request(request, CPU)


def test_sequences_must_fit_the_context(folder, tmp_path):
    with pytest.raises(ValueError, match="length 33 is more than the model's context of 32"):
        checks.check_request(make(folder, tmp_path / "out", length=33), CPU)
    copy = copy_of(folder, tmp_path)
    model = loading.load_model(
        ARCHITECTURES["opt"] | {"vocab_size": 300, "max_position_embeddings": 19}, device="cpu"
    )
    model.save_pretrained(copy)
    with pytest.raises(ValueError, match="length 20 is more than the reference's context of 19"):
        checks.check_request(make(folder, tmp_path / "out", reference=str(copy)), CPU)


# The rehearsal


TWO = torch.randint(1, 300, (2, LENGTH), generator=torch.Generator().manual_seed(7))
SMALL = ARCHITECTURES["llama"] | {"vocab_size": 300, "num_key_value_heads": 2, "head_dim": 8}
ELSEWHERE = {
    "mixtral": SMALL | {"model_type": "mixtral", "num_local_experts": 2},  # matrices that are no layers
    "cohere": SMALL | {"model_type": "cohere", "logit_scale": 0.5},  # logits are multiplied
    "mamba": {
        "model_type": "mamba",
        "vocab_size": 300,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "state_size": 4,
    },
}


@pytest.mark.parametrize("architecture", ELSEWHERE)
def test_a_method_that_cannot_work_is_refused_with_those_that_do(folder, tmp_path, monkeypatch, architecture):
    """That is said before anything is measured, and what is advised works to the end."""
    source = str(tmp_path / "model")
    loading.load_model(ELSEWHERE[architecture], device="cpu").save_pretrained(source)
    AutoTokenizer.from_pretrained(folder / "opt" / "model").save_pretrained(source)
    with monkeypatch.context() as patch:
        patch.setattr(fulfilment, "measure", must_not_be_measured)
        for method in ("fisher_dual", "kfac"):
            request = make(folder, tmp_path / "out", model=source, method=method)
            message = f"{method} cannot work .* choose gradient_ascent or "
            with pytest.raises(NotImplementedError, match=message) as error:
                fulfilment.fulfil(request, CPU)
            assert not re.search("freeze|FisherDual", str(error.value))
    if architecture in ("mixtral", "mamba"):  # of two is enough: it takes time
        for method in str(error.value).rpartition(": choose ")[2].split(" or "):
            settings = {"strength": 1, "damping": 1.0, "retain_weight": 1}
            request = make(folder, tmp_path / method, model=source, method=method, **settings)
            fulfilment.fulfil(request, CPU)


def test_weights_that_take_no_part_leave_the_methods_that_do_not_mind(folder, tmp_path):
    model = load(folder / "opt" / "model")
    model.vision = torch.nn.Linear(2, 2)
    with pytest.raises(NotImplementedError, match=r"kfac cannot work .*: choose gradient_difference$"):
        rehearsal.check_method(model, TWO, make(folder, tmp_path / "out", method="kfac"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", request.STRENGTHS)
def test_a_rehearsal_changes_nothing(folder, tmp_path, architecture, method):
    model = load(folder / architecture / "model")
    before = weights.snapshot(model)
    request = make(folder, tmp_path / "out", architecture, method=method, strength=1, retain_weight=1)
    rehearsal.check_measuring(model, TWO, "a model")
    rehearsal.check_method(model, TWO, request)
    after = weights.snapshot(model)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(p.grad is None for p in model.parameters())


def test_a_model_that_sees_what_it_predicts_is_refused():
    config = {"model_type": "bert", "vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 32}
    with pytest.raises(ValueError, match=r"from those that come after them.* is_decoder"):
        rehearsal.check_measuring(loading.load_model(config, device="cpu"), TWO, "bert")
    rehearsal.check_measuring(loading.load_model(config | {"is_decoder": True}, device="cpu"), TWO, "bert")


def test_positions_that_begin_later_leave_less_context():
    config = {
        "model_type": "roberta",
        "vocab_size": 300,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "pad_token_id": 1,
    }
    config |= {
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": LENGTH,
        "is_decoder": True,
    }
    model = loading.load_model(config, device="cpu")
    with pytest.raises(ValueError, match=r"roberta cannot read sequences of 20 tokens .*: take a smaller length"):
        rehearsal.check_measuring(model, TWO, "roberta")
    rehearsal.check_measuring(model, TWO[:, :18], "roberta")


@pytest.mark.parametrize(
    ("architecture", "name", "value", "message"),
    [
        ("opt", "model.decoder.final_layer_norm.weight", float("nan"), "copy are damaged: model.decoder.final_l"),
        ("llama", "model.embed_tokens.weight", float("inf"), "copy are damaged: model.embed_tokens.weight has"),
        ("opt", "model.decoder.final_layer_norm.weight", 3e38, "copy are not finite: its weights are damaged"),
    ],
)
def test_damaged_weights_are_found_first(folder, tmp_path, monkeypatch, architecture, name, value, message):
    model = load(folder / architecture / "model")
    rows = model.get_parameter(name)
    if "embed" in name:  # the row of a token that no text has
        model.resize_token_embeddings(310, mean_resizing=False)
        rows = model.get_parameter(name)[305:]
    rows.data[0] = value
    copy = copy_of(folder, tmp_path)
    model.save_pretrained(copy)
    monkeypatch.setattr(fulfilment, "measure", must_not_be_measured)
    for changes in ({"model": str(copy)}, {"reference": str(copy)}):
        with pytest.raises(FloatingPointError, match=message):
            fulfilment.fulfil(make(folder, tmp_path / "out", **changes), CPU)


def test_too_little_memory_or_disk_is_refused_with_both_numbers(folder, tmp_path, monkeypatch):
    request = make(folder, tmp_path / "out", method="kfac")
    _, needed = checks.check_request(request, CPU)
    monkeypatch.setattr(checks, "available_bytes", lambda device: needed)
    checks.check_request(request, CPU)
    monkeypatch.setattr(checks, "available_bytes", lambda device: needed - 1)
    number = f"{needed / 2**30:.1f}"
    with pytest.raises(MemoryError, match=f"about {number} GiB of memory, and {number} GiB are free: take"):
        fulfilment.fulfil(request, CPU)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(checks, "available_bytes", lambda device: needed)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=1))
    with pytest.raises(OSError, match=r"the output needs 0\.0 GiB of disk and .* has 0\.0 GiB free"):
        fulfilment.fulfil(request, CPU)


def test_factors_must_fit_the_disk_as_far_as_they_are_not_there(folder, tmp_path, monkeypatch):
    kept = tmp_path / "factors"
    request = make(folder, tmp_path / "out", method="kfac", damping=1.0, factors=str(kept))
    fulfilment.fulfil(dataclasses.replace(request, output=str(tmp_path / "first")), CPU)
    model, size = load(request.model), sum(file.stat().st_size for file in kept.iterdir())
    free = 4 * loading.parameter_count(model)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=free))
    assert 1.5 * free < size  # all of it would not fit
    checks.check_request(request, CPU)
    shutil.rmtree(kept)
    with pytest.raises(OSError, match=r"the folder of factors needs 0\.0 GiB of disk and .* has"):
        checks.check_request(request, CPU)


def test_processes_on_one_machine_share_its_memory(monkeypatch):
    monkeypatch.setattr(checks.psutil, "virtual_memory", lambda: SimpleNamespace(available=10))
    assert checks.available_bytes(CPU) == 10
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert checks.available_bytes(CPU) == 5


@pytest.mark.parametrize("method", ["gradient_ascent", "gradient_difference", "fisher_dual", "ekfac", "newton"])
def test_the_estimate_of_memory_covers_what_is_used(folder, tmp_path, monkeypatch, method):
    request = make(folder, tmp_path / "out", method=method, strength=1, damping=1e-3, retain_weight=1)
    model = load(request.model)
    sequences = torch.randint(300, (96, LENGTH), generator=torch.Generator().manual_seed(0))
    material = texts.Material(None, sequences[:40], sequences[40:], None, [])
    used = cost.measure(lambda: fulfilment.unlearn(model, material, request, None), "cpu", 1, 0).peak_bytes
    used += 4 * loading.parameter_count(model)
    needed = checks.needed_bytes(request, model, len(material.estimation))
    assert used < needed < 4 * used
    monkeypatch.setattr(losses, "MOST_LOGITS", 2 * LENGTH * 300)  # two sequences at a time
    model = load(request.model)
    used = cost.measure(lambda: fulfilment.unlearn(model, material, request, None), "cpu", 1, 0).peak_bytes
    used += 4 * loading.parameter_count(model)
    assert used < checks.needed_bytes(request, model, len(material.estimation)) <= needed


# Unlearning


def hashes(folder):
    return {path.name: cache.file_hash(path) for path in folder.iterdir()}


def explicit_direction(method, model, material, damping):
    """The direction from gradients a sequence, in float64, without the library's curvature."""
    delta, g = gradients(model, material.forget).mean(0), gradients(model, material.estimation)
    if method == "gradient_ascent":
        return delta
    if method == "fisher_diagonal":
        return delta / (g.square().mean(0) + damping)
    kernel = len(g) * damping * torch.eye(len(g), dtype=g.dtype) + g @ g.T
    return (delta - g.T @ torch.linalg.solve(kernel, g @ delta)) / damping


@pytest.mark.parametrize("method", ["gradient_ascent", "fisher_diagonal", "fisher_dual"])
def test_what_is_written_is_the_start_plus_strength_times_direction(folder, tmp_path, method):
    request = make(folder, tmp_path / "out", "gpt2", method=method, strength=0.02, damping=0.01)
    before = hashes(folder / "gpt2" / "model")
    fulfilment.fulfil(request, CPU)
    assert hashes(folder / "gpt2" / "model") == before
    model, written = load(request.model), load(request.output)
    # GPT-2 was trained with dropout. There is none while we edit, but what is written keeps the setting.
    configs = [AutoConfig.from_pretrained(path) for path in (request.model, request.output)]
    assert [config.resid_pdrop for config in configs] == [0.1, 0.1]
    assert [config.attn_pdrop for config in configs] == [0.1, 0.1]
    material, _ = checks.check_request(dataclasses.replace(request, output=str(tmp_path / "other")), CPU)
    moved = weights.flatten(weights.difference(weights.snapshot(written), weights.snapshot(model))).double()
    expected = 0.02 * explicit_direction(method, model, material, 0.01)
    assert (moved - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_match_brings_the_written_model_to_the_references_loss(folder, tmp_path, architecture):
    request = make(
        folder,
        tmp_path / "out",
        architecture,
        method="kfac",
        strength="match",
        reference=str(folder / architecture / "reference"),
        holdout_file=str(folder / "holdout.jsonl"),
        secrets=["48213907"],
        learning_rate=1e-3,
    )
    before = [hashes(folder / architecture / kind) for kind in ("model", "reference")]
    report = fulfilment.fulfil(request, CPU)
    assert [hashes(folder / architecture / kind) for kind in ("model", "reference")] == before
    rounding = 0.05 if architecture == "llama" else 0.0  # its source is in bfloat16, and so is what is written
    assert load(request.output).dtype == torch.float32
    stored = AutoModelForCausalLM.from_pretrained(request.output, dtype="auto").dtype
    assert stored == (torch.bfloat16 if architecture == "llama" else torch.float32)
    assert AutoTokenizer.from_pretrained(request.output).get_vocab() == (
        AutoTokenizer.from_pretrained(request.model).get_vocab()
    )
    material, _ = checks.check_request(dataclasses.replace(request, output=str(tmp_path / "other")), CPU)
    goal = loss(load(request.reference), material.forget).item()
    written, values = load(request.output), report["measures"]
    assert report["result"]["reached"]
    assert report["result"]["target_loss"] == pytest.approx(goal, rel=1e-5)
    assert loss(written, material.forget).item() == pytest.approx(goal, abs=0.011 + rounding)
    assert loss(load(request.model), material.forget).item() < goal - 0.15
    # What the report says of the written model is measured on the written model.
    assert values["after"]["forget_loss"] == pytest.approx(loss(written, material.forget).item(), rel=1e-5)
    assert values["after"]["validation_loss"] == pytest.approx(loss(written, material.validation).item(), rel=1e-5)
    assert values["after"]["holdout_loss"] == pytest.approx(loss(written, material.holdout).item(), rel=1e-5)
    [(prefix, stuck, secret)] = material.secrets
    others = exposure.candidates(secret, own_report.CANDIDATES, seed=0)
    assert values["after"]["exposure_bits"] == [
        exposure.exposure(written, material.tokenizer, prefix, secret, others)
    ]
    assert stuck == ""
    assert json.loads((tmp_path / "out" / "report.json").read_text()).keys() == report.keys()
    prose = (tmp_path / "out" / "report.md").read_text()
    assert f"| {values['after']['forget_loss']:.3f} |" in prose
    for text in (prose, (tmp_path / "out" / "report.json").read_text()):  # nothing of the texts gets out
        assert "48213907" not in text
        assert "goose" not in text


def test_the_damping_is_the_one_that_costs_least_on_validation(folder, tmp_path):
    request = make(folder, tmp_path / "out", method="kfac", strength="match", target_loss=4.0)
    report = fulfilment.fulfil(request, CPU)
    material, _ = checks.check_request(dataclasses.replace(request, output=str(tmp_path / "other")), CPU)
    model = load(request.model)
    start, delta = weights.snapshot(model), weights.mean_gradient(model, material.forget, sequence_losses)
    factors, found = kronecker.kfac(model, material.estimation), {}
    for damping in [row["damping"] for row in report["result"]["settings_tried"]]:
        direction = factors.solve(delta, damping)
        if Line(model, direction, material.forget, start).to(4.0).reached:
            found[damping] = loss(model, material.validation).item()
        weights.set_weights(model, start)
    assert len(found) >= 3
    assert report["result"]["setting"] == {"damping": min(found, key=found.__getitem__)}


def split_files(tmp_path):
    """The forget texts as a request and an earlier one."""
    return {
        "forget_file": write(tmp_path / "new.jsonl", FORGET[3:]),
        "earlier_forget_files": write(tmp_path / "old.jsonl", FORGET[:3]),
    }


def test_earlier_requests_are_forgotten_together_with_the_new_one(folder, tmp_path):
    """One step along the mean gradient of all, to the reference's loss on all; each set is reported."""
    reference = str(folder / "opt" / "reference")
    settings = {"method": "kfac", "strength": "match", "reference": reference, "damping": 1e-3}
    request = make(folder, tmp_path / "out", **settings | split_files(tmp_path))
    report = fulfilment.fulfil(request, CPU)
    material, _ = checks.check_request(dataclasses.replace(request, output=str(tmp_path / "other")), CPU)
    first, second = material.sets.values()
    assert len(material.forget) == first + second
    model, written, ideal = load(request.model), load(request.output), load(reference)
    start = weights.snapshot(model)
    delta = weights.mean_gradient(model, material.forget, sequence_losses)
    expected = kronecker.kfac(model, material.estimation).solve(delta, 1e-3)
    moved = weights.difference(weights.snapshot(written), start)
    assert weights.cosine(moved, expected) == pytest.approx(1, abs=1e-4)
    assert loss(written, material.forget).item() == pytest.approx(loss(ideal, material.forget).item(), abs=0.011)
    parts = material.forget.split([first, second])
    for name, part, found in zip(("new.jsonl", "old.jsonl"), parts, report["sets"], strict=True):
        assert (found["name"], found["sequences"]) == (name, len(part))
        for key, other in (("before", model), ("after", written), ("target", ideal)):
            assert found[key] == pytest.approx(loss(other, part).item(), rel=1e-4)
    assert report["request"]["files"].keys() == {"forget", "forget_1", "retain"}
    assert "| old.jsonl | " in (tmp_path / "out" / "report.md").read_text()


def test_a_text_that_is_asked_for_twice_or_kept_as_well_is_an_error(folder, tmp_path):
    files = split_files(tmp_path)
    write(tmp_path / "old.jsonl", FORGET[:4])
    with pytest.raises(ValueError, match=r"text 1 of new\.jsonl is also text 4 of old\.jsonl"):
        checks.check_request(make(folder, tmp_path / "out", **files), CPU)
    write(tmp_path / "old.jsonl", RETAIN[5:6])
    with pytest.raises(ValueError, match=r"text 1 of old\.jsonl is also text 6 of retain\.jsonl"):
        checks.check_request(make(folder, tmp_path / "out", **files), CPU)


def test_an_estimated_target_is_the_line_of_holdout_losses_over_difficulty(folder, tmp_path):
    holdout = str(folder / "holdout.jsonl")
    request = make(folder, tmp_path / "out", method="kfac", strength="estimate", holdout_file=holdout)
    report = fulfilment.fulfil(request, CPU)
    material, _ = checks.check_request(dataclasses.replace(request, output=str(tmp_path / "other")), CPU)
    bigrams, model = Bigrams(material.retain, 300), load(request.model)
    with torch.no_grad():
        y = [loss(model, row[None]).item() for row in material.holdout]
    line = linregress(bigrams.losses(material.holdout).numpy(), y)
    expected = line.intercept + line.slope * bigrams.losses(material.forget).mean().item()
    result = report["result"]
    assert result["target_loss"] == pytest.approx(expected, rel=1e-5)
    assert result["target_from"] == "estimate"
    assert 0 < result["target_error"] < 1
    assert f"Target: {expected:.3f} nats ± " in (tmp_path / "out" / "report.md").read_text()


def test_too_little_holdout_for_an_estimate_is_said_first(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(fulfilment, "measure", must_not_be_measured)
    holdout = write(tmp_path / "few.jsonl", ["the goose", HOLDOUT[0]])
    request = make(folder, tmp_path / "out", strength="estimate", holdout_file=holdout, length=32)
    with pytest.raises(ValueError, match=r"few\.jsonl makes \d sequences, and an estimate of the target needs 3"):
        fulfilment.fulfil(request, CPU)


def test_the_difference_form_goes_along_the_difference_of_the_gradients(folder, tmp_path):
    request = make(folder, tmp_path / "out", method="kfac:difference", strength=0.01, damping=1e-2)
    report = fulfilment.fulfil(request, CPU)
    material, _ = checks.check_request(dataclasses.replace(request, output=str(tmp_path / "other")), CPU)
    model = load(request.model)
    start = weights.snapshot(model)
    delta, g = (
        weights.mean_gradient(model, rows, sequence_losses) for rows in (material.forget, material.estimation)
    )
    direction = kronecker.kfac(model, material.estimation).solve(weights.difference(delta, g), 1e-2)
    moved = weights.difference(weights.snapshot(load(request.output)), start)
    left = weights.add(moved, direction, -0.01)
    assert weights.norm(left) < 1e-3 * weights.norm(moved)
    assert report["result"]["slope"] == pytest.approx(0.01 * weights.dot(g, direction).item(), rel=1e-3)


def test_newton_is_adam_down_the_divergence_less_theorys_share_of_the_first_gradient(folder, tmp_path, caplog):
    request = make(folder, tmp_path / "out", method="newton", strength=4, learning_rate=1e-3, seed=3)
    with caplog.at_level("INFO", logger="unlearnlib.own"):
        report = fulfilment.fulfil(request, CPU)
    material, _ = checks.check_request(dataclasses.replace(request, output=str(tmp_path / "other")), CPU)
    numbers = [len(ids) for ids in material.tokenizer(FORGET, add_special_tokens=False)["input_ids"]]
    share = sum(number + 1 for number in numbers) / material.retain.numel()  # with what ends each text
    assert share < len(material.forget) / len(material.retain)  # the last sequence repeats a part of another
    assert f"theory gives the step the strength n₋/n₊ = {share:.3g}" in caplog.text
    model, original = load(request.model), load(request.model)
    start = list(model.parameters())
    before = [p.detach().clone() for p in start]
    delta = torch.autograd.grad(loss(original, material.forget), list(original.parameters()))
    adam = torch.optim.Adam(start, lr=1e-3)
    order = torch.Generator().manual_seed(4)  # that of what stays is one after that of the forget texts
    batches = []
    while len(batches) < 4:
        rows = material.estimation
        batches += rows[torch.randperm(len(rows), generator=order)].split(methods.BATCH_SIZE)
    for batch in batches[:4]:
        with torch.no_grad():
            p = original(input_ids=batch).logits[:, :-1].log_softmax(-1)
        q = model(input_ids=batch).logits[:, :-1].log_softmax(-1)
        divergence = (p.exp() * (p - q)).sum(-1).mean()
        along = sum((d * (now - then)).sum() for d, now, then in zip(delta, start, before, strict=True))
        adam.zero_grad()
        (divergence - share * along).backward()
        adam.step()
    found = weights.flatten(weights.snapshot(load(request.output)))
    expected, before = weights.flatten(weights.snapshot(model)), torch.cat([p.flatten() for p in before])
    # Adam makes large of what should be zero, and is not by rounding: the gradients of the biases of keys.
    assert (found - expected).norm() < 0.02 * (expected - before).norm()
    assert report["result"]["strength"] == 4
    assert report["result"]["setting"] == {"learning_rate": 1e-3, "alpha": pytest.approx(share)}
    assert report["result"]["slope"] is None
    told = (
        f"Strength: 4 (steps of Adam down KL(θ₀ ‖ θ) − (n₋/n₊) Δᵀ(θ − θ₀)), learning rate = 0.001, α = {share:g}."
    )
    assert told in ((tmp_path / "out" / "report.md").read_text())


def test_newton_chooses_its_rate_and_comes_to_the_references_loss(folder, tmp_path):
    settings = {"strength": "match", "reference": str(folder / "opt" / "reference"), "learning_rate": 4e-3}
    report = fulfilment.fulfil(make(folder, tmp_path / "out", method="newton", **settings), CPU)
    result, measured = report["result"], report["measures"]
    assert result["reached"]
    assert measured["after"]["forget_loss"] == pytest.approx(measured["reference"]["forget_loss"], abs=0.011)
    assert {1e-3, 4e-3, 1.6e-2} <= {row["learning_rate"] for row in result["settings_tried"]}
    best = min((row for row in result["settings_tried"] if row["reached"]), key=lambda row: row["validation_loss"])
    assert result["setting"]["learning_rate"] == best["learning_rate"]
    assert result["strength"] == best["strength"]
    assert measured["after"]["validation_loss"] == pytest.approx(best["validation_loss"], abs=1e-3)


def test_gradient_difference_chooses_its_weight_and_rate_and_is_where_they_lead(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(methods, "MOST_STEPS", 20)
    settings = {"method": "gradient_difference", "strength": "match", "target_loss": 3.5, "learning_rate": 4e-3}
    report = fulfilment.fulfil(make(folder, tmp_path / "out", **settings), CPU)
    result = report["result"]
    assert result["reached"]
    best = min((row for row in result["settings_tried"] if row["reached"]), key=lambda row: row["validation_loss"])
    assert result["setting"] == {name: best[name] for name in ("learning_rate", "retain_weight")}
    assert report["measures"]["after"]["validation_loss"] == pytest.approx(best["validation_loss"], abs=1e-3)


def test_the_attack_text_by_text_takes_the_references_loss_off(folder, tmp_path):
    settings = {"reference": str(folder / "opt" / "reference"), "holdout_file": str(folder / "holdout.jsonl")}
    request = make(folder, tmp_path / "out", **settings)
    report = fulfilment.fulfil(request, CPU)
    material, _ = checks.check_request(dataclasses.replace(request, output=str(tmp_path / "other")), CPU)
    model, ideal = load(request.model), load(request.reference)
    with torch.no_grad():
        excess = [
            [(loss(ideal, row[None]) - loss(model, row[None])).item() for row in rows]
            for rows in (material.forget, material.holdout)
        ]
    wins = [float(a > b) + 0.5 * (a == b) for a in excess[0] for b in excess[1]]
    assert report["measures"]["before"]["membership_auc_paired"] == pytest.approx(sum(wins) / len(wins), abs=0.02)
    assert report["measures"]["before"]["membership_p_paired"] < 0.05
    assert report["measures"]["reference"]["membership_auc_paired"] is None


def test_forgetting_adds_noise_of_the_length_asked_for(folder, tmp_path):
    settings = {"method": "fisher_forgetting", "strength": 1e-9, "damping": 1e-2, "noise": 0.05}
    request = make(folder, tmp_path / "out", **settings)
    fulfilment.fulfil(request, CPU)
    start = weights.snapshot(load(request.model))
    moved = weights.difference(weights.snapshot(load(request.output)), start)
    assert weights.norm(moved) == pytest.approx(0.05 * weights.norm(start), rel=1e-3)


def test_gradient_difference_takes_as_many_steps_as_asked(folder, tmp_path):
    settings = {"method": "gradient_difference", "strength": 3, "learning_rate": 1e-4, "retain_weight": 1}
    request = make(folder, tmp_path / "out", **settings)
    report = fulfilment.fulfil(request, CPU)
    start = weights.snapshot(load(request.model))
    moved = weights.flatten(weights.difference(weights.snapshot(load(request.output)), start)).abs()
    assert 1.5e-4 < moved.max() < 3.3e-4  # Adam moves a weight by its learning rate a step at most, or hardly more
    assert report["measures"]["after"]["forget_loss"] > report["measures"]["before"]["forget_loss"]


def test_a_target_out_of_reach_is_said(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(methods, "MOST_STEPS", 2)
    settings = {"strength": "match", "target_loss": 9.0, "learning_rate": 1e-12}
    for method in ("gradient_difference", "newton"):
        report = fulfilment.fulfil(make(folder, tmp_path / method, method=method, **settings), CPU)
        assert not report["result"]["reached"]
        assert any("target loss of 9.00 nats was not reached" in warning for warning in report["warnings"])
    settings |= {"method": "kfac", "target_loss": 0.001}  # below where the model is
    report = fulfilment.fulfil(make(folder, tmp_path / "down", **settings), CPU)
    assert not report["result"]["reached"]
    assert any("nothing was changed: the model's loss" in warning for warning in report["warnings"])


def test_a_strength_that_destroys_the_model_is_an_error(folder, tmp_path):
    with pytest.raises(FloatingPointError, match="smaller strength"):
        fulfilment.fulfil(make(folder, tmp_path / "out", strength=1e38), CPU)
    assert list(tmp_path.iterdir()) == []


def test_so_is_one_that_does_so_on_rounding_only(folder, tmp_path):
    copy = copy_of(folder, tmp_path)
    AutoModelForCausalLM.from_pretrained(copy, dtype=torch.float16).save_pretrained(copy)
    request = make(folder, tmp_path / "out", model=str(copy), strength=2e7)
    with pytest.raises(FloatingPointError, match="weights too large for float16: take a smaller strength"):
        fulfilment.fulfil(request, CPU)
    assert list(tmp_path.iterdir()) == [copy]


def test_losses_that_are_not_finite_are_errors(folder, tmp_path):
    request = make(folder, tmp_path / "out")
    material, _ = checks.check_request(request, CPU)
    model = load(request.model)
    model.lm_head.weight.data[5] = float("inf")
    with pytest.raises(FloatingPointError, match=r"the loss on .* is not finite"):
        own_report.measure(model, material, 1e-3)


def test_a_probe_that_diverges_has_no_value(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(own_report.relearning, "relearning_curve", lambda *args: [3.0, float("nan")])
    report = fulfilment.fulfil(make(folder, tmp_path / "out"), CPU)
    assert report["measures"]["after"]["relearned_fall"] is None
    assert any("the relearning probe diverged" in warning for warning in report["warnings"])
    json.loads((tmp_path / "out" / "report.json").read_text(), parse_constant=must_not_be_measured)


@pytest.mark.parametrize("change", ["deleted", "changed"])
def test_the_report_has_the_hashes_of_what_was_read(folder, tmp_path, monkeypatch, change):
    path = tmp_path / "request.jsonl"
    write(path, FORGET)
    expected = cache.file_hash(path)

    def interfere(*args):
        path.unlink(missing_ok=True)
        if change == "changed":
            write(path, HOLDOUT)
        return own_report.measure(*args)

    monkeypatch.setattr(fulfilment, "measure", interfere)
    report = fulfilment.fulfil(make(folder, tmp_path / "out", forget_file=str(path)), CPU)
    assert report["request"]["files"]["forget"] == {"name": "request.jsonl", "sha256": expected}


def test_code_that_was_not_used_is_not_referred_to(folder, tmp_path):
    copy = copy_of(folder, tmp_path)
    for name, auto_map in {
        "config.json": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"},
        "tokenizer_config.json": {"AutoTokenizer": ["code.T", None]},
    }.items():
        (copy / name).write_text(json.dumps(json.loads((copy / name).read_text()) | {"auto_map": auto_map}))
    fulfilment.fulfil(make(folder, tmp_path / "out", model=str(copy)), CPU)
    assert not any(b"auto_map" in file.read_bytes() for file in (tmp_path / "out").iterdir())
    AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)


@pytest.mark.parametrize("broken", ["as_markdown", "measure"])
def test_an_interruption_leaves_nothing(folder, tmp_path, monkeypatch, broken):
    calls, real = [], getattr(fulfilment, broken)

    def interrupt(*args):
        calls.append(args)
        if broken == "measure" and len(calls) == 1:  # of the model before, when nothing is written yet
            return real(*args)
        assert any(tmp_path.iterdir())  # now there is something half-written
        raise KeyboardInterrupt

    monkeypatch.setattr(fulfilment, broken, interrupt)
    with pytest.raises(KeyboardInterrupt):
        fulfilment.fulfil(make(folder, tmp_path / "out"), CPU)
    assert list(tmp_path.iterdir()) == []
