"""Texts, their questions and their secrets, and how they become sequences of tokens."""

from unlearnlib.texts.bigrams import Bigrams
from unlearnlib.texts.corpora import ABOUT, CORPORA, corpus_name, load_corpus
from unlearnlib.texts.planting import make_secrets, planted_rows, spread
from unlearnlib.texts.posts import addresses, load_posts, mask_addresses
from unlearnlib.texts.questions import document_questions, fits, task_accuracy
from unlearnlib.texts.sequences import Splits, encode, make_splits, pack, train_tokenizer

__all__ = [
    "ABOUT",
    "CORPORA",
    "Bigrams",
    "Splits",
    "addresses",
    "corpus_name",
    "document_questions",
    "encode",
    "fits",
    "load_corpus",
    "load_posts",
    "make_secrets",
    "make_splits",
    "mask_addresses",
    "pack",
    "planted_rows",
    "spread",
    "task_accuracy",
    "train_tokenizer",
]
