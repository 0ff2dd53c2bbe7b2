"""Texts of a small request: shared by the tests of what reads them and of what fulfils it."""

import json
import random

LENGTH = 20  # the shortest for which extraction in 10-grams is defined


def sentences(number, seed):
    words = ["stone", "river", "bread", "lamp", "goose", "winter", "salt", "mill", "crown", "fox"]
    draw = random.Random(seed)
    return [" ".join(draw.choice(words) for _ in range(30)) + "." for _ in range(number)]


FORGET = sentences(7, seed=1)
FORGET[2] = "the code of the " + FORGET[2] + " it is 48213907 and no other"
RETAIN, HOLDOUT = sentences(24, seed=2), sentences(10, seed=3)


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)
