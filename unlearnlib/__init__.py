"""Second-order unlearning for language models: the library behind the book. Each room uses only those above it.

cache, weights, losses, cost   the ground: files, vectors in weight space, the loss, what something costs
texts        corpora, sequences, questions, secrets
models       loading, training
curvature    the Fisher, Kronecker factors, the Hessian by its products
methods      gradient ascent and its kin, Fisher Removal and Forgetting, DP-SGD, matched forgetting
measures     membership, extraction, exposure, relearning, rounding
verdicts     tables of results, intervals, claims
experiment   profiles, cases, the recorder, the experiments of single chapters
own          unlearn a model of your own
book         figures, prose, the build
"""
