import random

import datasets
import pytest
import torch

from unlearnlib import losses
from unlearnlib.measures import exposure
from unlearnlib.models import loading
from unlearnlib.texts import questions, sequences
from unlearnlib.texts.questions import Question

TEXTS = [f"Question: How many eggs has hen {n}?\nAnswer: {n * 7} and {n % 3}\n#### {n * 7}" for n in range(2, 200)]
CHOICES = datasets.Dataset.from_dict(
    {
        "id": ["a", "b"],
        "text": ["Question: What is a cat?\nAnswer: an animal", "Question: And a hen?\nAnswer: a bird"],
        "question": ["What is a cat?", "And a hen?"],
        "options": [["a stone", "an animal"], ["a bird", "a plant"]],
        "answer": ["an animal", "a bird"],
    }
)
SUMS = datasets.Dataset.from_dict(
    {
        "id": ["s"],
        "text": ["Question: 1 and 2, 7 times?\nAnswer: 1 + 2 = 3\n3 * 7 = 21\n#### 21"],
        "question": ["1 and 2, 7 times?"],
        "answer": ["21"],
    }
)


@pytest.fixture(scope="module")
def tokenizer():
    return sequences.train_tokenizer([*TEXTS, *CHOICES["text"]], 300)


@pytest.fixture(scope="module")
def model(tokenizer):
    source = loading.small_opt(len(tokenizer), hidden_size=32, layers=2, heads=2, context=64)
    return loading.load_model(source, seed=0, dtype=torch.float64, device="cpu")


def test_losses_are_those_of_each_option_alone(model, tokenizer, monkeypatch):
    monkeypatch.setattr(losses, "MOST_SEQUENCES", 2)
    asked = [
        Question("Question: How many eggs has hen 3?\nAnswer: ", ("21", "1 and 2", "hen"), 0),
        Question("Answer: ", ("Question", "a very much longer option of many tokens"), 1),
    ]
    found = questions.option_losses(model, tokenizer, asked, length=64)
    for question, values in zip(asked, found, strict=True):
        expected = exposure.text_losses(
            model, tokenizer, question.prompt, question.options
        )  # unpadded, one by one
        torch.testing.assert_close(values, expected, rtol=1e-10, atol=1e-10)


def test_prompts_are_cut_at_their_beginning_alike_for_all_options(model, tokenizer):
    question = Question("Question: How many eggs has hen 3?\nAnswer: ", ("21", "a bird"), 0)
    [found] = questions.option_losses(model, tokenizer, [question], length=12)
    rows = [tokenizer(question.prompt + option)["input_ids"] for option in question.options]
    prompt = len(tokenizer(question.prompt.rstrip())["input_ids"])
    cut = max(map(len, rows)) - 12
    assert 0 < cut < prompt
    for row, loss in zip(rows, found, strict=True):
        log_p = model(input_ids=torch.tensor([row[cut:]])).logits[0].log_softmax(1)
        total = sum(log_p[i - cut - 1, row[i]] for i in range(prompt, len(row)))
        torch.testing.assert_close(loss, -total.detach())


def test_accuracy_counts_right_choices(model, tokenizer):
    asked = [Question("Question: How many?\nAnswer: ", ("21", "a bird", "hen"), i) for i in range(3)]
    assert questions.task_accuracy(model, tokenizer, asked, 64) == 1 / 3  # exactly one of the three is right
    losses = exposure.text_losses(model, tokenizer, asked[0].prompt, asked[0].options)
    right = asked[int(losses.argmin())]
    assert questions.task_accuracy(model, tokenizer, [right, right], 64) == 1


def test_questions_with_options_are_the_corpus_own():
    first, second = questions.document_questions(CHOICES, ["b", "a"], seed=0)
    assert first == Question("Question: And a hen?\nAnswer: ", ("a bird", "a plant"), 0)
    assert second == Question("Question: What is a cat?\nAnswer: ", ("a stone", "an animal"), 1)


def test_questions_with_a_number_get_three_others():
    [worked] = questions.document_questions(SUMS, ["s"], seed=0)
    assert worked.prompt == "Question: 1 and 2, 7 times?\nAnswer: 1 + 2 = 3\n3 * 7 = 21\n#### "
    assert worked.options[worked.right] == "21"
    assert len(set(worked.options)) == 4
    assert questions.document_questions(SUMS, ["s"], seed=1)[0].options != worked.options


@pytest.mark.parametrize(("answer", "low", "high"), [("7", 0, 9), ("42", 10, 99), ("-105.25", -999.25, -100.25)])
def test_other_numbers_look_like_the_answer(answer, low, high):
    drawn = {n for seed in range(60) for n in questions.other_numbers(answer, 3, random.Random(seed))}
    assert answer not in drawn
    assert all(low <= float(n) <= high and len(n) == len(answer) for n in drawn)
    assert len(drawn) > 8
    for seed in range(60):
        assert len(set(questions.other_numbers(answer, 3, random.Random(seed)))) == 3
    assert set(questions.other_numbers("7", 9, random.Random(0))) == set("012345689")


def test_what_cannot_be_asked_is_an_error(model, tokenizer):
    with pytest.raises(ValueError, match="'twelve' is not a number"):
        questions.other_numbers("twelve", 3, random.Random(0))
    with pytest.raises(ValueError, match="only 9 other numbers like '7', not 10"):
        questions.other_numbers("7", 10, random.Random(0))
    with pytest.raises(ValueError, match="no answers, only"):
        questions.document_questions(CHOICES.remove_columns("answer"), ["a"], seed=0)
    with pytest.raises(ValueError, match="no document 'x'"):
        questions.document_questions(CHOICES, ["x"], seed=0)
    with pytest.raises(ValueError, match="do not fit 4 tokens"):
        questions.option_losses(model, tokenizer, [Question("Answer: ", ("a much longer option",), 0)], 4)
    with pytest.raises(ValueError, match="token in common"):
        questions.option_losses(model, tokenizer, [Question("Question: How man", ("y",), 0)], 64)


def test_a_question_fits_where_its_options_can_be_scored(model, tokenizer):
    question = Question("Question: How many eggs has hen 3?\nAnswer: ", ("21", "1 and 2 and 21 and 3"), 0)
    found = []
    for length in range(1, 30):
        found.append(questions.fits(tokenizer, question, length))
        if found[-1]:
            questions.option_losses(model, tokenizer, [question], length)
        else:
            with pytest.raises(ValueError, match=f"do not fit {length} tokens"):
                questions.option_losses(model, tokenizer, [question], length)
    assert found == sorted(found)
    assert len(set(found)) == 2
