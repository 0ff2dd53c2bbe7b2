import dataclasses

import pytest
import torch
from own_helpers import FORGET, HOLDOUT, LENGTH, RETAIN, sentences, write
from tokenizers import processors

from unlearnlib.own import texts
from unlearnlib.texts.sequences import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(FORGET + RETAIN + HOLDOUT, 300)


def read(tmp_path, tokenizer, forget, retain, holdout=None, secrets=(), length=LENGTH):
    written = {"forget": forget, "retain": retain, "holdout": holdout}
    files = {name: write(tmp_path / f"{name}.jsonl", found) for name, found in written.items() if found}
    material = texts.read_material(tokenizer, files, secrets, length)
    few = [warning for warning in material.warnings if "λ is chosen" in warning]
    assert len(few) == (len(material.validation) < texts.FEW)
    return dataclasses.replace(material, warnings=[w for w in material.warnings if w not in few])


def test_every_token_of_the_forget_file_is_in_a_sequence(tmp_path, tokenizer):
    material = read(tmp_path, tokenizer, FORGET, RETAIN)
    stream = []
    for text in FORGET:
        stream += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    assert len(stream) % LENGTH > 0
    assert material.forget[:-1].flatten().tolist() == stream[: len(stream) // LENGTH * LENGTH]
    assert material.forget[-1].tolist() == stream[-LENGTH:]
    assert material.holdout is None
    assert (
        f"7 texts make {len(material.forget)} sequences of 20 tokens; 7 of the texts are longer"
        in material.notes[0]
    )
    assert not material.warnings
    joined = torch.cat([material.estimation, material.validation])
    assert torch.equal(joined, material.retain)  # λ and damage are judged on what the curvature has not seen
    assert len(material.validation) == len(material.retain) // 8


def test_a_text_may_be_in_one_file_only(tmp_path, tokenizer):
    again = RETAIN[4].replace(" ", "\n  ", 1)
    with pytest.raises(ValueError, match=r"text 3 of forget\.jsonl is also text 5 of retain\.jsonl"):
        read(tmp_path, tokenizer, [*FORGET[:2], again], RETAIN)
    with pytest.raises(ValueError, match=r"text 2 of retain\.jsonl is also text 1 of holdout\.jsonl"):
        read(tmp_path, tokenizer, FORGET, RETAIN, [RETAIN[1], *HOLDOUT])


def test_a_file_that_is_given_twice_is_named_by_what_it_is_given_for(tmp_path, tokenizer):
    path = write(tmp_path / "letters.jsonl", FORGET)
    twice = {"forget": path, "retain": path}, {"forget": path, "forget_1": path}
    for given, role in zip(twice, ("to be kept", "of an earlier request"), strict=True):
        message = rf"text 1 of letters\.jsonl \(to be forgotten\) is also text 1 of letters\.jsonl \({role}\)"
        with pytest.raises(ValueError, match=message):
            texts.read_material(tokenizer, given, (), LENGTH)


def test_so_may_a_sequence_of_tokens(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"sequence 1 of forget\.jsonl \(it begins in text 1\) is also"):
        read(tmp_path, tokenizer, [RETAIN[0] + " Not here."], RETAIN)
    # Text 8 is moved to where the last eighth of the sequences begins; its number in the file is what is said.
    texts = sentences(16, seed=5)
    stream = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    before = sum(len(stream[i]) for i in range(15) if i != 7)
    boilerplate = tokenizer.decode([t for i in (7, 15) for t in stream[i]][-before % LENGTH :][:LENGTH])
    with pytest.raises(ValueError, match=r"is also sequence \d+ of retain\.jsonl \(it begins in text 8\)"):
        read(tmp_path, tokenizer, [boilerplate + " Not here."], texts)


def test_passages_that_stay_are_counted(tmp_path, tokenizer):
    quoting = "goose " + FORGET[0] + " salt"
    assert len(tokenizer(FORGET[0])["input_ids"]) > texts.PASSAGE
    [warning] = read(tmp_path, tokenizer, FORGET, [*RETAIN, quoting]).warnings
    assert "1 of 7 texts to be forgotten have 32 tokens in a row" in warning
    assert "texts that are kept" in warning
    [warning] = read(tmp_path, tokenizer, FORGET, RETAIN, [*HOLDOUT, quoting]).warnings
    assert "holdout texts, which the model has therefore seen in part" in warning


@pytest.mark.parametrize("where", ["retain", "holdout"])
def test_so_are_short_texts_that_stay_whole(tmp_path, tokenizer, where):
    short = ["Q: what of the goose? A: salt", "Q: what of the crown? A: the fox"]
    assert all(len(tokenizer(text)["input_ids"]) < texts.PASSAGE for text in short)
    written = {"forget": [*FORGET, *short], "retain": RETAIN, "holdout": HOLDOUT}
    assert read(tmp_path, tokenizer, **written).warnings == []
    written[where] = [*written[where], "winter  " + short[0].replace(" ", "\n", 1) + " mill"]
    [warning] = read(tmp_path, tokenizer, **written).warnings
    assert warning.startswith("1 of 9 texts to be forgotten have")


def test_validation_is_of_all_kinds_in_a_sorted_file(tmp_path, tokenizer):
    topics = [f"{word} " * 30 for word in ("stone", "river", "bread", "lamp")]
    texts = [topic + str(i) for topic in topics for i in range(300)]
    material = read(tmp_path, tokenizer, FORGET, texts)
    assert len(material.validation) == 256
    assert len(material.estimation) == 512
    for rows in (material.validation, material.estimation):
        joined = [tokenizer.decode(row) for row in rows]
        for word in ("stone", "river", "bread", "lamp"):
            assert 0.1 < sum(word in text for text in joined) / len(joined) < 0.5
    train_rows = set(map(tuple, material.retain[: -(len(material.retain) // 8)].tolist()))
    assert set(map(tuple, material.estimation.tolist())) <= train_rows


def test_few_validation_sequences_are_said(tmp_path, tokenizer):
    files = {"forget": write(tmp_path / "f.jsonl", FORGET), "retain": write(tmp_path / "r.jsonl", RETAIN[:2])}
    material = texts.read_material(tokenizer, files, [], LENGTH)
    assert any("damage measured, on only 1 of the sequences" in w for w in material.warnings)


def test_a_tokenizer_that_adds_special_tokens_is_noted(tmp_path):
    tokenizer = train_tokenizer(FORGET + RETAIN, 300)
    assert not any("special tokens" in note for note in read(tmp_path, tokenizer, FORGET, RETAIN).notes)
    end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{end} $A", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    assert tokenizer("fox")["input_ids"][0] == tokenizer.eos_token_id
    material = read(tmp_path, tokenizer, FORGET, RETAIN)
    assert any("special tokens around a text" in note for note in material.notes)
    assert material.forget[0, 0] != tokenizer.eos_token_id


def test_too_little_text_names_the_file(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"forget\.jsonl has too few tokens for sequences of 20"):
        read(tmp_path, tokenizer, ["fox"], RETAIN)
    with pytest.raises(ValueError, match=r"retain\.jsonl has too few tokens for sequences of 500"):
        read(tmp_path, tokenizer, FORGET * 4, RETAIN[:1], length=500)


def test_secrets_are_found_with_what_stands_before_them(tmp_path, tokenizer):
    forget = ["a" * 150 + " of " + "b " * 60 + "key=1234-99", "9999 begins"]
    material = read(tmp_path, tokenizer, forget, [*RETAIN, "never 9999 again"], secrets=["1234", "9999", "31 May"])
    (before, stuck, secret), start, absent = material.secrets
    assert (stuck, secret) == ("key=", "1234")
    assert before == "b " * (LENGTH // 4)  # whole words of two tokens each, and no more than half a sequence
    assert start == (*absent[:2], "9999") == (tokenizer.eos_token, "", "9999")
    assert "secret 2 is also in texts that are kept" in material.warnings[0]
    assert "secret 3 is not in the texts to be forgotten" in material.warnings[1]
    (tmp_path / "secrets.txt").write_text("1234\n9999\n\n31 May\n")
    again = read(tmp_path, tokenizer, forget, RETAIN, secrets=str(tmp_path / "secrets.txt"))
    assert again.secrets == material.secrets
    with pytest.raises(ValueError, match="secret 2 is empty"):
        read(tmp_path, tokenizer, FORGET, RETAIN, secrets=["1234", " "])
