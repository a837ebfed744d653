"""Held-out evaluation: pass@k, maj@k, coverage and diversity, with intervals over problems.

``evaluate.evaluate`` runs a model on a data set, ``results.compare`` sets two results against each other,
``generate.sample`` draws completions, ``estimators`` has the formulas. Only ``generate`` and ``evaluate``
import torch.
"""
