"""unlearnlib: second-order machine unlearning for language models, one small module per idea."""
