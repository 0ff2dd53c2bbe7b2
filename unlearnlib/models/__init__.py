"""Language models: where they come from, on what they compute, and how they are trained and cached."""

from unlearnlib.models.loading import (
    default_device,
    half_precision,
    has_bfloat16,
    load_model,
    load_tokenizer,
    parameter_count,
    small_gpt2,
    small_gpt_neox,
    small_llama,
    small_opt,
)
from unlearnlib.models.sharding import load_sharded, save_model, shard
from unlearnlib.models.training import Run, Training, load_trained, train, train_missing, training_record

__all__ = [
    "Run",
    "Training",
    "default_device",
    "half_precision",
    "has_bfloat16",
    "load_model",
    "load_sharded",
    "load_tokenizer",
    "load_trained",
    "parameter_count",
    "save_model",
    "shard",
    "small_gpt2",
    "small_gpt_neox",
    "small_llama",
    "small_opt",
    "train",
    "train_missing",
    "training_record",
]
