import copy
import itertools
import json
import math

import hub_fixtures
import huggingface_hub
import pytest
import safetensors.torch
import torch
from helpers import ARCHITECTURES, random_sequences, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from unlearnlib import weights
from unlearnlib.experiment import profiles
from unlearnlib.losses import log_probabilities, mean_loss, sequence_losses
from unlearnlib.measures import extraction
from unlearnlib.methods import first_order
from unlearnlib.models import loading


def test_weights_depend_on_the_seed_alone():
    state = torch.random.get_rng_state()
    a, b, c = tiny_model(seed=0), tiny_model(seed=0), tiny_model(seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)  # the caller's random numbers are untouched
    assert torch.equal(a.lm_head.weight, b.lm_head.weight)
    assert not torch.equal(a.lm_head.weight, c.lm_head.weight)


def test_parameter_counts_by_hand():
    vocabulary, hidden, layers, context = 40, 48, 3, 32
    matrices = 12 * hidden**2  # of a layer: 4 of attention, and 8 more in the feed-forward part
    biases, norms = 9 * hidden, 4 * hidden
    expected = {
        loading.small_opt: (vocabulary + context + 2) * hidden + layers * (matrices + biases + norms) + 2 * hidden,
        loading.small_gpt2: (vocabulary + context) * hidden + layers * (matrices + biases + norms) + 2 * hidden,
        loading.small_gpt_neox: 2 * vocabulary * hidden + layers * (matrices + biases + norms) + 2 * hidden,
        loading.small_llama: 2 * vocabulary * hidden + layers * (matrices + 2 * hidden) + hidden,
    }
    for small, count in expected.items():
        model = loading.load_model(small(vocabulary, hidden, layers, heads=4, context=context), device="cpu")
        assert loading.parameter_count(model) == count
        assert model.config.hidden_size == hidden
        assert model.config.num_hidden_layers == layers


@pytest.mark.parametrize(
    "small", [loading.small_opt, loading.small_gpt2, loading.small_gpt_neox, loading.small_llama]
)
def test_small_models_have_no_dropout_and_keep_their_context(small):
    model, sequences = loading.load_model(small(40, 16, 2, heads=2, context=12), device="cpu"), random_sequences(3)
    calm = sequence_losses(model, sequences)
    assert torch.equal(sequence_losses(model.train(), sequences), calm)
    with pytest.raises(ValueError, match="do not fit the model's context of 12"):
        mean_loss(model, random_sequences(3, length=13))


SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 40,
    "pad_token_id": None,
}
NAMED_OTHERWISE = {
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2},
    "gpt_neo": {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]},
    "gptj": {"n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4},
    "bloom": {"n_layer": 2, "n_head": 2},
    "opt": {"word_embed_proj_dim": 16, "ffn_dim": 32},
}
NOISY = ("drop", "jitter")  # what their names have in common, and sizes and switches have not
DROPPING = (
    *("opt", "gpt2", "llama", "gpt_neo", "gpt_neox", "gptj", "phi", "bloom", "falcon", "biogpt"),
    *("starcoder2", "stablelm", "gemma2", "mixtral"),
)


@pytest.mark.parametrize("kind", DROPPING)
def test_nothing_is_dropped_whatever_a_configuration_says_and_the_saved_one_still_says_it(kind, tmp_path):
    config = AutoConfig.for_model(kind, **SIZES | NAMED_OTHERWISE.get(kind, {}))
    values = vars(config).items()
    names = [n for n, value in values if any(part in n for part in NOISY) and isinstance(value, int | float)]
    for name in names:
        setattr(config, name, 0.4)
    sequences = random_sequences(4)
    source = AutoModelForCausalLM.from_config(config)
    dropped = [sequence_losses(source.train(), sequences) for _ in range(5)]
    assert any(not torch.equal(dropped[0], other) for other in dropped)  # there is something to switch off
    source.save_pretrained(tmp_path / "source")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source").eval()
    loading.switch_off_dropout(model)
    calm = sequence_losses(model, sequences)
    assert torch.equal(sequence_losses(model.train(), sequences), calm)
    again = copy.deepcopy(model).train()
    assert torch.equal(sequence_losses(again, sequences), calm)
    model.save_pretrained(tmp_path / "saved")
    saved, before = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("saved", "source"))
    assert saved == before
    assert names
    assert all(saved[name] == 0.4 for name in names)


def test_a_saved_folder_loads_the_same(tmp_path):
    model, sequences = tiny_model("llama"), random_sequences(3)
    model.save_pretrained(tmp_path)
    back = loading.load_model(tmp_path, dtype=torch.float64, device="cpu")
    assert mean_loss(back, sequences) == mean_loss(model, sequences)
    assert not back.training


def rewrite(folder, edit):
    weights = edit(safetensors.torch.load_file(folder / "model.safetensors"))
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda w: {f"_orig_mod.{name}": v for name, v in w.items()}, "missing .*'_orig_mod.': remove that from"),
        (lambda w: {name: v for name, v in w.items() if ".1." not in name}, r"missing \(.*\.1\..*save_pretrained"),
        (lambda w: w | {"model.more": torch.ones(2)}, r"1 unknown to it \(model\.more\)"),
        (lambda w: {n: v[:-1].clone() if v.shape[0] == 40 else v for n, v in w.items()}, "of another shape"),
    ],
    ids=["prefix", "layer", "unknown", "shape"],
)
def test_weights_that_do_not_fit_are_not_replaced_by_random_ones(tmp_path, architecture, edit, message):
    tiny_model(architecture).save_pretrained(tmp_path)
    rewrite(tmp_path, edit)
    with pytest.raises(ValueError, match=f"not those of its architecture: .*{message}"):
        loading.load_model(tmp_path, device="cpu")


def test_a_missing_head_is_an_error_unless_it_is_tied(tmp_path):
    for architecture, tied in (("opt", True), ("gpt2", True), ("llama", False)):
        model = tiny_model(architecture)
        model.save_pretrained(tmp_path / architecture)
        rewrite(tmp_path / architecture, lambda w: {name: v for name, v in w.items() if "lm_head" not in name})
        if tied:
            back = loading.load_model(tmp_path / architecture, dtype=torch.float64, device="cpu")
            assert torch.equal(back.lm_head.weight, model.lm_head.weight)
        else:
            with pytest.raises(ValueError, match=r"1 missing \(lm_head\.weight\)"):
                loading.load_model(tmp_path / architecture, device="cpu")


def test_names_of_older_versions_are_understood(tmp_path):
    model = tiny_model("gpt2")
    model.save_pretrained(tmp_path)  # GPT-2's own folder has names without the prefix, and the masks
    mask = {"h.0.attn.bias": torch.ones(1, 1, 4, 4), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    rewrite(tmp_path, lambda w: {n.removeprefix("transformer."): v for n, v in w.items()} | mask)
    back = loading.load_model(tmp_path, dtype=torch.float64, device="cpu")
    assert torch.equal(back.transformer.h[1].mlp.c_fc.weight, model.transformer.h[1].mlp.c_fc.weight)


def test_damaged_and_missing_files_of_weights_are_named_as_such(tmp_path):
    tiny_model().save_pretrained(tmp_path, max_shard_size="8KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    shards[-1].write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(OSError, match="damaged, cut short or a mere Git LFS pointer"):
        loading.load_model(tmp_path, device="cpu")
    shards[-1].unlink()
    with pytest.raises(OSError, match=f"cannot load the model in the folder.*{shards[-1].name}"):
        loading.load_model(tmp_path, device="cpu")


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "bloom", "n_layer": 2, "n_head": 2},
        {"model_type": "gptj", "n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4, "n_positions": 32},
        {"model_type": "mamba", "num_hidden_layers": 2, "state_size": 4},
    ],
    ids=lambda config: config["model_type"],
)
def test_architectures_without_torchs_attention_have_their_own(config):
    model = loading.load_model({"vocab_size": 40, "hidden_size": 16} | config, device="cpu")
    assert mean_loss(model, random_sequences(3)) == pytest.approx(math.log(40), rel=0.5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_torchs_attention_is_taken_where_there_is_a_choice(architecture):
    assert tiny_model(architecture).config._attn_implementation == "sdpa"


def test_pickled_weights_are_never_loaded(tmp_path):
    torch.save(tiny_model().state_dict(), tmp_path / "pytorch_model.bin")
    tiny_model().config.save_pretrained(tmp_path)
    with pytest.raises(OSError, match="safetensors"):
        loading.load_model(tmp_path, device="cpu")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A folder of the hub's client, which cannot reach the hub."""
    home = tmp_path_factory.mktemp("home")
    hub_fixtures.write_hub(home)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(home / "hub"))
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        yield home / "hub"


def stored(hub, source):
    """The weights in the files of a hub's model, in float32, by the ends of their names, which differ in age."""
    folder = next(hub.glob(f"models--{source.partition('@')[0].replace('/', '--')}")) / "snapshots"
    files = [safetensors.torch.load_file(file) for file in folder.glob("*/*.safetensors")]
    return {name.removeprefix("model."): value.float() for file in files for name, value in file.items()}


HUB_MODELS = [*itertools.chain(*profiles.HUB_ARCHITECTURES.values()), hub_fixtures.SHARDED]


@pytest.mark.parametrize("source", HUB_MODELS, ids=lambda source: source.partition("@")[0])
def test_models_of_the_hub_load_offline_with_their_weights_and_their_tokenizer(hub, source):
    model, tokenizer = loading.load_model(source, device="cpu"), loading.load_tokenizer(source)
    expected = stored(hub, source)
    for name, p in model.named_parameters():
        assert p.dtype == torch.float32
        names = {name, name.removeprefix("model."), name.removeprefix("transformer.")} & expected.keys()
        assert torch.equal(p, expected[names.pop()])
    tokens = tokenizer("the old king", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(tokens) == "the old king"
    assert tokenizer.eos_token_id == model.config.eos_token_id
    assert max(tokens) < len(tokenizer) <= model.config.vocab_size


def test_nor_are_those_of_the_hub(hub):
    with pytest.raises(OSError, match=r"with weights in safetensors \(pickled ones are refused"):
        loading.load_model(hub_fixtures.PICKLED, device="cpu")


def test_unknown_models_are_clear_errors(tmp_path):
    with pytest.raises(OSError, match="nobody/nothing"):
        loading.load_model("nobody/nothing")
    with pytest.raises(ValueError, match="no-such-architecture"):
        loading.load_model({"model_type": "no-such-architecture"})


def test_a_token_that_pads_is_trained_like_any_other():
    model = loading.load_model(ARCHITECTURES["llama"] | {"pad_token_id": 7})
    sequences = torch.full((1, 5), 7)
    sequence_losses(model, sequences).sum().backward()
    assert model.get_input_embeddings().weight.grad[7].abs().max() > 0


def test_losses_and_gradients_stay_on_the_models_device():
    """Tensors of the meta device hold no data, and mixing them with others raises: a GPU's rules without a GPU."""
    model, sequences = tiny_model(dtype=torch.float32, device="meta"), random_sequences(4)
    losses = sequence_losses(model, sequences)
    assert losses.device.type == "meta"
    assert losses.shape == (4,)
    gradients = torch.autograd.grad(losses.sum(), list(weights.parameters(model).values()))
    assert {g.device.type for g in gradients} == {"meta"}
    original = tiny_model(dtype=torch.float32, device="meta")
    for loss in (first_order.with_retain(first_order.ascent_loss, 1.0), first_order.kl_loss(original)):
        assert loss(model, sequences, sequences).device.type == "meta"
    start = weights.snapshot(model)
    weights.set_weights(model, start, start, 0.5)
    assert weights.dot(start, start).device.type == "meta"
    assert log_probabilities(model, sequences).device.type == "meta"


def test_smollm2_is_a_language_model():
    tokenizer, model = loading.load_tokenizer(loading.SMOLLM2), loading.load_model(loading.SMOLLM2, device="cpu")
    assert loading.parameter_count(model) == 134_515_008
    prompt = torch.tensor(tokenizer("The capital of France is")["input_ids"])
    assert "Paris" in tokenizer.decode(extraction.continuations(model, prompt[None], 5)[0])
    english = tokenizer("It was the best of times, it was the worst of times, it was the age of wisdom.")
    english = torch.tensor([english["input_ids"]])
    shuffled = english[:, torch.randperm(english.shape[1], generator=torch.Generator().manual_seed(0))]
    assert mean_loss(model, english) < mean_loss(model, shuffled) - 2


@pytest.mark.parametrize("enabled", [True, False])
def test_half_precision_leaves_a_cpu_in_float32(enabled):
    a = torch.ones(2, 2)
    with loading.half_precision(torch.device("cpu"), enabled):
        assert (a @ a).dtype == torch.float32


@pytest.mark.parametrize(
    ("vectors", "features", "native"),
    [
        ("AVX512", {"avx512_bf16": True}, True),
        ("AVX2", {"avx512_bf16": True}, False),  # PyTorch was told to do without
        ("AVX512", {"avx512_bf16": False}, False),
        ("SVE256", {}, False),  # a kind of processor that we do not know
    ],
)
def test_bfloat16_is_native_only_where_that_is_certain(monkeypatch, vectors, features, native):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: vectors)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    assert loading.has_bfloat16(torch.device("cpu")) is native
