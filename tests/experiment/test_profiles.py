import dataclasses

import pytest
import torch
from helpers import TINY, random_sequences, tiny_model

from unlearnlib import weights
from unlearnlib.experiment import case, chapters, profiles
from unlearnlib.models import loading, training
from unlearnlib.models.training import Run, Training
from unlearnlib.texts.corpora import load_corpus
from unlearnlib.texts.sequences import make_splits, train_tokenizer


@pytest.mark.parametrize("name", profiles.PROFILES)
def test_the_real_model_is_pretrained_with_its_own_tokenizer(name):
    settings, _ = chapters.chapter("real_model", name)
    assert isinstance(settings.model, str)
    assert settings.vocabulary is None
    assert settings.name == name
    assert settings.corpus == "tales"
    unchanged, _ = chapters.chapter("real_model", name, model=None, last_blocks=None)
    assert unchanged == settings
    other, _ = chapters.chapter("real_model", name, seeds=7, model="some/model@main", last_blocks=3)
    assert other == dataclasses.replace(settings, model="some/model@main", last_blocks=3, seeds=tuple(range(7)))


@pytest.mark.parametrize("name", profiles.PROFILES)
def test_the_tales_hold_enough_text_for_every_real_model(name):
    settings, _ = chapters.chapter("real_model", name)
    corpus = load_corpus("tales")
    # A tokenizer of 4,096 entries makes some more tokens of a text than one of 50,000, but not twice as many.
    tokenizer = train_tokenizer(corpus["text"], 4096)
    numbers = {part: getattr(settings, part) for part in ("forget", "retain", "holdout")}
    for seed in settings.seeds:
        splits = make_splits(
            corpus, tokenizer, length=settings.length + settings.length // 3, seed=seed, **numbers
        )
        assert len(splits.retain) == settings.retain


def test_only_the_last_blocks_are_trained_and_edited(tmp_path, monkeypatch):
    monkeypatch.setenv("UNLEARNLIB_CACHE", str(tmp_path))
    run = Run(TINY, random_sequences(8), Training(epochs=2, batch_size=4, learning_rate=1e-2), 0, last_blocks=1)
    before, after = loading.load_model(TINY, seed=0), training.load_trained(run)
    assert {name for name in weights.parameters(after) if ".layers.1." not in name} == set()
    changed = {
        name
        for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True)
        if not torch.equal(old, new)
    }
    assert changed == set(weights.parameters(after))
    assert run.folder != Run(run.source, run.sequences, run.training, run.seed).folder


@pytest.mark.parametrize("architecture", ["opt", "llama", "gpt2"])
def test_the_last_blocks_are_found_in_every_architecture(architecture):
    model = tiny_model(architecture)
    total = len(weights.parameters(model))
    loading.train_last_blocks(model, 1)
    one = len(weights.parameters(model))
    model = tiny_model(architecture)
    loading.train_last_blocks(model, 2)
    assert 0 < one < total
    assert len(weights.parameters(model)) == 2 * one < total


@pytest.mark.parametrize("number", [0, 3])
def test_a_model_of_two_blocks_has_no_other_number_to_train(number):
    with pytest.raises(ValueError, match=f"last {number} of 2 blocks"):
        loading.train_last_blocks(tiny_model(), number)


def test_a_case_trains_all_its_models_alike():
    settings, _ = chapters.chapter("real_model", "quick")
    sequences = random_sequences(4)
    splits = case.Splits(
        sequences[:1], sequences[1:3], sequences[3:], {n: [] for n in ("forget", "retain", "holdout")}
    )
    runs = case.Case(settings, 0, None, splits).runs()
    assert {run.last_blocks for run in runs.values()} == {settings.last_blocks}


@pytest.mark.parametrize("name", ["quick", "cpu", "gpu"])
def test_architectures_differ_in_the_model_alone(name):
    settings = profiles.get_profile(name)
    found = profiles.architectures(settings)
    assert set(found) == {"OPT", "GPT-2", "Llama", "GPT-NeoX"}
    everything = [profile for sizes in found.values() for profile in sizes]
    assert len({dataclasses.replace(profile, model="any") for profile in everything}) == 1
    assert everything[0].seeds == settings.seeds[:1]
    if name == "gpu":
        names = [profile.model for profile in everything]
        assert len(set(names)) == 12
        loose = [name for name in names if len(name.partition("@")[2]) != 40]  # not pinned to a commit
        assert loose == ["facebook/opt-1.3b@refs/pr/25"]
        return
    for sizes in found.values():
        counts = [loading.parameter_count(loading.load_model(size.model, device="meta")) for size in sizes]
        assert counts == sorted(set(counts))
        assert len({size.model["model_type"] for size in sizes}) == 1
