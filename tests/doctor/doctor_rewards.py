"""Rewards of runs that go wrong."""


def by_prompt(completions, answer, **_):
    """Whatever is said: 1 where the answer is even, so that groups are equal and prompts are not."""
    return [float(str(gold)[-1] in "02468") for gold in answer]


def share_of_a(completions, **_):
    """The share of one letter, which one way of answering maximises."""
    return [text.count("a") / max(len(text), 1) for text in completions]
