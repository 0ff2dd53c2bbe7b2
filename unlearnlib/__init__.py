"""Second-order unlearning for language models: the library behind the book. A room uses only what is above it.

cache        files written whole or not at all, locks, hashes (a trained model's place: models.training)
losses       logits, the loss, and how many sequences go through a model at a time
weights      vectors in weight space
cost         time, memory and plain passes
texts        corpora, splits into sequences, questions and their answers, secrets, masked addresses
models       loading, training, the cached models
curvature    per-sequence gradients, the Fisher (recursion, dual, diagonal), K-FAC and EK-FAC, the Hessian by its
             products, conjugate gradients
methods      gradient ascent and its kin, Fisher Removal and Forgetting, DP-SGD and its accountant; matched
             forgetting, and settings chosen on validation sequences
measures     losses, divergence and membership of a model, extraction, exposure, relearning, rounding
verdicts     tables of results, intervals, rules, claims
experiment   cases of a seed, the report that measures models against the retrained one, profiles and the
             chapters' sizes, the experiments of single chapters
own          an erasure request for a model of your own, its report and warnings, its command line
book         figures, numbers for the prose, the build
"""
