"""Held-out evaluation: pass@k, maj@k, coverage and diversity, with intervals over problems.

``evaluate.evaluate`` runs a model on a data set, ``results.compare`` sets two results against each other,
``generate.sample`` draws completions, ``estimators`` has the formulas, ``seeds`` those over seeds, and
``sparsity.compare_checkpoints`` says which weights changed. Only ``generate``, ``evaluate``, ``checkpoint``,
``changes`` and ``sparsity`` import torch.
"""
