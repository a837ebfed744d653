"""``posttrain check --deep``: what can be seen of a run before it trains, with its real tokenizer and data.

The model is there in shapes only (:mod:`posttrain.models.skeleton`); rows become tokens and labels through
the run's own trainer, built on a model of a few weights (:mod:`posttrain.deep.stand_in`). Each module looks
at one thing and returns a :class:`posttrain.deep.findings.Section`.
"""
