import dataclasses
import math

import pytest
import torch

from unlearnlib.experiment import case as one_case
from unlearnlib.experiment import chapters, private_training, profiles
from unlearnlib.experiment.contenders import contenders_on
from unlearnlib.experiment.curvatures import curvature_builders
from unlearnlib.experiment.report import Report
from unlearnlib.losses import mean_loss
from unlearnlib.methods import dp_sgd, matching, tuning
from unlearnlib.methods.privacy import Privacy
from unlearnlib.models import loading
from unlearnlib.models.training import Training
from unlearnlib.texts import corpora, sequences

PROFILE = dataclasses.replace(
    profiles.PROFILES["quick"],
    corpus="toy",
    model=loading.small_llama(300, hidden_size=16, layers=1, heads=2, context=32),
    vocabulary=300,
    length=24,
    forget=12,
    retain=32,
    holdout=9,
    training=Training(epochs=30, batch_size=8, learning_rate=1e-2),
    seeds=(4,),
)
PRIVACY = Privacy(None)


@pytest.fixture(scope="module", autouse=True)
def toy(tmp_path_factory):
    """A corpus made up here, and a cache of its own for the models."""
    rows = [
        {"text": f"Number {i} of the ships has {i % 7} masts, and its holds {i * i} tons."} for i in range(300)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(corpora.CORPORA, "toy", lambda: [dict(row) for row in rows])
        patch.setitem(corpora.ABOUT, "toy", corpora.About("ships", "none", "here"))
        patch.setenv("UNLEARNLIB_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def case():
    [found] = one_case.make_cases(PROFILE, private_training.PlantedCase.plant)
    return found


@pytest.fixture(scope="module")
def report(case):
    return Report(case, case.retrained())


def test_every_eighth_sequence_of_each_set_begins_with_a_box_of_its_own(case):
    plain = sequences.make_splits(
        corpora.load_corpus("toy"), case.tokenizer, length=24, forget=12, retain=32, holdout=9, seed=4
    )
    heads = []
    for name in ("forget", "retain", "holdout"):
        before, after = getattr(plain, name), getattr(case.splits, name)
        changed = (before != after).any(dim=1)
        assert set(changed.nonzero().flatten().tolist()) == set(range(0, len(after), 8))
        heads += [case.tokenizer.decode(row)[:20] for row in after[::8]]
    boxes = [head.split(" holds ") for head in heads]
    assert [box for box, _ in boxes] == [f"box {100 + i}" for i in range(2 + 4 + 2)]
    assert [secret.prefix + secret.number for secret in case.secrets] == heads[:2]


def test_copies_of_a_secret_stand_in_its_own_set_alone(case):
    bare = one_case.Case(case.profile, case.seed, case.tokenizer, case.splits)
    planted = private_training.PlantedCase.plant(bare, copies=4)
    heads = {
        name: [case.tokenizer.decode(row)[:20] for row in getattr(planted.splits, name)[::2]]
        for name in ("forget", "retain", "holdout")
    }
    boxes = {name: {head.split(" holds ")[0] for head in found} for name, found in heads.items()}
    assert boxes == {  # ten boxes: each of 12, 32 and 9 sequences has one for eight, begun ones counted
        "forget": {"box 100", "box 101"},
        "retain": {f"box {102 + i}" for i in range(4)},
        "holdout": {"box 106", "box 107"},
    }
    own = [secret.prefix + secret.number for secret in planted.secrets]
    assert heads["forget"] == [own[0], own[1]] * 3
    with pytest.raises(ValueError, match="3 copies"):
        private_training.PlantedCase.plant(bare, copies=3)


def test_both_models_are_trained_on_what_was_planted(case):
    assert torch.equal(case.runs()["original"].sequences, torch.cat([case.splits.forget, case.splits.retain]))
    run = case.private_run(PRIVACY, 0.5)
    assert torch.equal(run.sequences, case.runs()["original"].sequences)
    assert run.training == dataclasses.replace(PROFILE.training, learning_rate=0.5)
    assert (run.seed, run.privacy, run.source) == (4, PRIVACY, PROFILE.model)


def test_exposure_is_the_mean_over_the_secrets_of_the_forget_set(case):
    bits = [case.exposure(model) for model in (case.original(), case.retrained())]
    assert 0 <= bits[1] < bits[0] <= math.log2(private_training.RANKED)
    one = dataclasses.replace(case, secrets=case.secrets[:1])
    other = dataclasses.replace(case, secrets=case.secrets[1:])
    model = case.original()
    assert case.exposure(model) == pytest.approx((one.exposure(model) + other.exposure(model)) / 2)


def test_training_that_is_cut_short_has_learnt_less(case):
    train = case.splits.train
    losses = [mean_loss(model, train) for model in (case.cut_short(1), case.cut_short(5), case.original())]
    assert losses == sorted(losses, reverse=True)


def test_the_training_is_chosen_on_sequences_that_were_not_trained_on(case, monkeypatch):
    short = dataclasses.replace(
        case, profile=dataclasses.replace(PROFILE, training=Training(epochs=2, batch_size=8))
    )
    trained = []
    load = dp_sgd.load_private
    monkeypatch.setattr(private_training, "load_private", lambda run: trained.append(run) or load(run))
    knobs = {"learning_rate": (1e-5, 1e-3, 1e-1), "batch_size": (4, 8, 16)}
    choice = private_training.choose_training(short, PRIVACY, knobs, most=6)
    assert choice.tried == len(trained) >= 5
    seen = torch.cat([case.splits.forget, case.estimation])
    assert all(torch.equal(run.sequences, seen) for run in trained)
    losses = [mean_loss(load(run), case.validation) for run in trained]
    best = trained[losses.index(min(losses))].training
    assert choice.setting == {"learning_rate": best.learning_rate, "batch_size": best.batch_size}
    assert choice.table["validation_loss"].tolist() == losses


def test_a_batch_is_no_larger_than_what_there_is_to_draw_from(case):
    run = case.private_run(PRIVACY, 0.5, batch_size=1e9, epochs=2.4)
    assert (run.training.batch_size, run.rate, run.training.epochs) == (len(case.splits.train), 1.0, 2)


def test_reference_models_have_seen_the_planted_retain_sequences_only(case, monkeypatch):
    runs = []
    monkeypatch.setattr(one_case, "load_trained", lambda run, device=None: runs.append(run))
    assert len(list(case.references())) == PROFILE.references
    assert all(torch.equal(run.sequences, case.splits.retain) for run in runs)
    assert {run.seed for run in runs}.isdisjoint(run.seed for run in case.runs().values())


def test_unlearning_ends_at_the_retrained_models_forget_loss(case, report):
    found = contenders_on(case, curvature_builders(case.estimation))
    for method, setting in {"kfac": {"damping": 1e-2}, "gradient_ascent": {}}.items():
        private_training.unlearn(report, method, found[method], setting)
        values = {row["metric"]: row["value"] for row in report.rows if row["method"] == method}
        assert values["reached"] == 1
        assert values["forget_loss"] == pytest.approx(report.target, abs=1.01 * matching.TOLERANCE)
        assert 0 <= values["exposure_bits"] <= math.log2(private_training.RANKED)
        assert report.costs[method].seconds > 0


def test_an_epoch_takes_time_either_way(case):
    assert min(private_training.epoch_seconds(case)) > 0


def test_the_chapter_takes_other_seeds_where_one_cannot_be_used():
    maths, sizes = chapters.chapter("dp_sgd", "cpu", "maths")
    assert maths.seeds == (0, 1, 2, 3, 5)
    assert set(sizes.corpora.split(",")) <= corpora.CORPORA.keys()
    assert chapters.chapter("dp_sgd", "cpu", "tales")[0].seeds == (0, 1, 2, 3, 4)
    assert chapters.chapter("dp_sgd", "cpu", "maths", seeds=2)[0].seeds == (0, 1)
    assert chapters.chapter("dp_sgd", "quick", "maths", seeds=6)[0].seeds == (0, 1, 2, 3, 5, 6)
    for profile in profiles.PROFILES:
        settings, _ = chapters.chapter("dp_sgd", profile)
        assert settings.length <= settings.model["max_position_embeddings"]
        _, sizes = chapters.chapter("dp_sgd", profile)
        trial = tuning.search(sizes.knobs, lambda **_: ((False, 0.0), {}), sizes.most)
        assert trial.tried <= sizes.most  # its grids are such as the search takes
