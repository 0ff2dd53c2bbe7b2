import dataclasses

import pytest
import torch

from unlearnlib.experiment import make_cases, profiles
from unlearnlib.models import loading
from unlearnlib.models.training import Training
from unlearnlib.own import Request, check_request, read_texts, write_demonstration
from unlearnlib.texts import corpora

PROFILE = dataclasses.replace(
    profiles.PROFILES["quick"],
    corpus="tales",
    model=loading.small_opt(300, hidden_size=16, layers=1, heads=2),
    vocabulary=300,
    length=24,
    forget=3,
    retain=32,
    holdout=4,
    training=Training(epochs=1, learning_rate=1e-2),
    seeds=(0,),
)
LETTERS = "abcdefghij"


def word(i):
    return "".join(LETTERS[int(digit)] for digit in f"{i:05d}")


ROWS = [
    {"id": f"tales/{i}", "text": f"{word(i)} met {word(i)} and {word(i + 500)}, {i} times in {i * i} days"}
    for i in range(200)
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The case, the parameters of its request, and the request as checked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNLEARNLIB_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setitem(corpora.CORPORA, "tales", lambda: ROWS)
        [case] = make_cases(PROFILE)
        parameters = write_demonstration(case, tmp_path_factory.mktemp("request"))
        material, _ = check_request(Request(method="kfac", **parameters), torch.device("cpu"))
    return case, parameters, material


def test_the_request_forgets_what_the_model_was_trained_on(made):
    case, parameters, material = made
    tokens, trained_on = material.forget.flatten(), case.splits.forget.flatten()
    assert torch.equal(tokens[:-1], trained_on[:-1])  # the last text, cut in two, gets an end token
    assert parameters["length"] == case.profile.length
    assert parameters["learning_rate"] == case.profile.relearning_rate


def test_models_and_texts_lie_in_their_files(made):
    case, parameters, _ = made
    for name, model in {"model": case.original(), "reference": case.retrained()}.items():
        saved = loading.load_model(parameters[name])
        for a, b in zip(saved.parameters(), model.parameters(), strict=True):
            assert torch.equal(a, b)
    text = {row["id"]: row["text"] for row in ROWS}
    for split, ids in case.splits.documents.items():
        written = read_texts(parameters[f"{split}_file"])
        assert written[:-1] == [text[i] for i in ids][: len(written) - 1]
        assert text[ids[len(written) - 1]].startswith(written[-1])


def test_secrets_are_the_most_frequent_words_that_only_forget_texts_have(made):
    case, parameters, _ = made
    own = sorted(word(int(i.split("/")[1])) for i in case.splits.documents["forget"])  # each twice, others once
    assert read_texts(parameters["secrets"])[0].split() == own[:2]
