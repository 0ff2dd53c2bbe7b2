import dataclasses

import pytest
import torch
from helpers import TINY, random_sequences, tiny_model

from unlearnlib import weights
from unlearnlib.experiment import case, chapters, profiles
from unlearnlib.experiment.sizes import CHAPTERS
from unlearnlib.models import loading, training
from unlearnlib.models.training import Run, Training
from unlearnlib.texts import corpora
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


@pytest.fixture
def own_file(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "CORPORA", dict(corpora.CORPORA))
    monkeypatch.setattr(corpora, "ABOUT", dict(corpora.ABOUT))
    monkeypatch.setattr(corpora, "OWN_CORPORA", {})
    path = tmp_path / "letters.txt"
    path.write_text("\n\n".join(f"Letter {i} says  {i * i}." for i in range(40)))
    return path


def test_a_chapter_takes_a_file_of_texts_under_its_stem(own_file):
    settings, _ = chapters.chapter("gradient_ascent", "quick", str(own_file), retain=4)
    assert settings.corpus == "letters"
    asked = dataclasses.replace(settings, vocabulary=300, length=8, forget=2, holdout=2)
    corpus = load_corpus("letters")
    tokenizer = case.make_tokenizer(asked, corpus)
    splits = case._splits(asked, corpus, tokenizer, 0)
    assert splits.retain.shape == (4, 8)
    assert all(name.startswith("letters/") for names in splits.documents.values() for name in names)
    with pytest.raises(ValueError, match=r"ran out in the retain split, 960 sequences .* make \d+\. Ask"):
        case._splits(dataclasses.replace(asked, retain=960), corpus, tokenizer, 0)


def test_a_list_may_have_files_and_names_that_the_chapter_knows(own_file):
    given = f"maths,{own_file},posts"
    assert profiles.corpus_names(given, "posts") == ["maths", "letters", "posts"]
    with pytest.raises(ValueError, match="unknown corpus 'posts'"):
        profiles.corpus_names(given)


def test_a_pretrained_model_in_place_of_new_ones_is_tuned_as_chapter_10_does_it():
    real, _ = chapters.chapter("real_model", "quick")
    before, sizes = chapters.chapter("fisher", "quick")
    settings, own_sizes = chapters.chapter("fisher", "quick", model="models/mine", retain=100)
    tuned = {name: getattr(real, name) for name in chapters.FINE_TUNING}
    assert settings == dataclasses.replace(before, model="models/mine", retain=100, **tuned)
    assert own_sizes == sizes
    hub, _ = chapters.chapter("fisher", "gpu")
    settings, _ = chapters.chapter("fisher", "gpu", model="models/mine")
    assert settings == dataclasses.replace(hub, model="models/mine")


@pytest.mark.parametrize("name", chapters.OWN_MODELS_ONLY)
def test_chapters_that_need_their_own_models_say_so(name):
    with pytest.raises(ValueError, match=f"{name}' takes no other model: it"):
        chapters.chapter(name, "quick", model="models/mine")


@pytest.mark.parametrize("model", ["/nowhere/mine", "./mine", "../models/mine", "models/of/mine", "~/mine"])
def test_a_path_of_no_folder_is_refused(model):
    with pytest.raises(FileNotFoundError, match=f"there is no folder {model}: give that of a model, or a hub id"):
        chapters.chapter("fisher", "quick", model=model)


def test_the_others_are_those_that_fine_tune_at_profile_gpu():
    for name in CHAPTERS.keys() - chapters.OWN_MODELS_ONLY.keys():
        settings, _ = chapters.chapter(name, "gpu")
        assert isinstance(settings.model, str)
        assert settings.vocabulary is None


def test_the_new_models_beside_a_given_one_stay_as_they_are():
    before, settings = (
        chapters.chapter("four_datasets", "quick", model=model)[0] for model in (None, "models/mine")
    )
    kept = ("relearning_steps", "relearning_rate")  # which the chapter may have of its own
    for change in (profiles.on_small_opt, lambda given: profiles.architectures(given)["Llama"][1]):
        expected, found = change(before), change(settings)
        assert found == dataclasses.replace(expected, **{name: getattr(found, name) for name in kept})


def test_a_folder_goes_by_its_name_in_tables(tmp_path):
    for model, name in ((str(tmp_path), tmp_path.name), ("some/model@main", "some/model")):
        settings, _ = chapters.chapter("real_model", "quick", model=model)
        assert case.model_name(settings) == name
