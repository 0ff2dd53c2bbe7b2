"""Reports about earnings or about something else, as weights of words: data for logistic regression."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from sklearn.feature_extraction.text import TfidfVectorizer

from unlearnlib.curvature.convex import Problem
from unlearnlib.texts.corpora import load_corpus

OUTSIDE, TRAIN = 1000, 2000
"""How many reports the vocabulary is learned from, and how many the model is trained on."""


@dataclass(frozen=True)
class EarningsNews:
    """The reports that are trained on and may have to go (``train``), and two sets without any of them.

    ``pilot`` is for what must be known beforehand, such as how long residuals are, ``test`` for the accuracy.
    ``topics`` are those of the training reports.
    """

    train: Problem
    pilot: Problem
    test: Problem
    topics: np.ndarray


def earnings_news(damping: float, features: int = 500) -> EarningsNews:
    """Shuffle the Reuters corpus and deal it: TF-IDF weights as rows of length 1, labels +1 for earnings, else −1.

    The vocabulary and its weights are those of ``OUTSIDE`` reports that are not trained on: else features would
    remember what the weights are to forget. The pilot is made of these and of as many others.
    """
    news = load_corpus("reuters").to_pandas().sample(frac=1, random_state=0)
    outside, train, rest = news[:OUTSIDE], news[OUTSIDE : OUTSIDE + TRAIN], news[OUTSIDE + TRAIN :]
    others, test = rest[:OUTSIDE], rest[OUTSIDE:]
    vectorizer = TfidfVectorizer(max_features=features, sublinear_tf=True).fit(outside["text"])

    def problem(reports: pd.DataFrame) -> Problem:
        labels = np.where(reports["topic"] == "earn", 1.0, -1.0)
        return Problem(vectorizer.transform(reports["text"]).toarray(), labels, damping)

    pilot = pd.concat([outside, others])
    return EarningsNews(problem(train), problem(pilot), problem(test), train["topic"].to_numpy())
