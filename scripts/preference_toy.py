"""Where probability goes in DPO, and how Flex-DPO and an imitation term hold it.

A toy of the kind of the 3D-Properties paper (arXiv 2406.07327): four prompts with ten possible answers each,
one chosen and one rejected, drawn at random. A three-layer network gives the distribution over all ten, so
the mass on answers in no pair can be counted, which a language model does not allow. SGD of rate 5, 50 steps,
beta 0.1, mean over ten seeds of network and answers. ::

    python scripts/preference_toy.py

prints within a few seconds::

    mean over 10 seeds            chosen    rejected  unseen
    reference                     0.104     0.099     0.797
    DPO                           0.530     1.2e-14   0.470
    Flex-DPO, beta_rejected 0.05  0.855     9.1e-13   0.145
    DPO + 0.02 NLL                0.934     1.5e-14   0.066

The order DPO > Flex-DPO and DPO > DPO + NLL of the unseen mass is that of the paper's claim.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from posttrain.preference.flex_dpo import flex_weights
from posttrain.preference.rpo import imitation_loss

PROMPTS, ANSWERS, STEPS, RATE, BETA = 4, 10, 50, 5.0, 0.1
METHODS: dict[str, dict[str, float]] = {
    "DPO": {},
    "Flex-DPO, beta_rejected 0.05": {"beta_rejected": 0.05},
    "DPO + 0.02 NLL": {"weight": 0.02},
}


def train(seed: int, *, beta_rejected: float = BETA, weight: float = 0.0, steps: int = STEPS) -> list[float]:
    """Return the mean mass on chosen, rejected and unseen answers after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = torch.nn.Sequential(
            torch.nn.Linear(PROMPTS, 32),
            torch.nn.Tanh(),
            torch.nn.Linear(32, 32),
            torch.nn.Tanh(),
            torch.nn.Linear(32, ANSWERS),
        )
    answers = torch.stack([torch.randperm(ANSWERS, generator=generator)[:2] for _ in range(PROMPTS)])
    prompts = torch.eye(PROMPTS)
    is_chosen = torch.arange(2 * PROMPTS) < PROMPTS

    def logps() -> torch.Tensor:
        return network(prompts).log_softmax(dim=1).gather(1, answers).t().flatten()

    with torch.no_grad():
        reference = logps()
    optimizer = torch.optim.SGD(network.parameters(), lr=RATE)
    for _ in range(steps):
        now = logps()
        ratios = now - reference
        scores = flex_weights(ratios.detach(), is_chosen, beta=BETA, beta_rejected=beta_rejected) * ratios
        chosen, rejected = (BETA * scores).chunk(2)
        loss = -torch.nn.functional.logsigmoid(chosen - rejected).mean()
        answer = now[:PROMPTS].unsqueeze(1)  # of one token
        loss = loss + weight * imitation_loss(answer, torch.ones_like(answer)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        chosen, rejected = logps().exp().chunk(2)
    return [float(x.mean()) for x in (chosen, rejected, 1 - chosen - rejected)]


def means(seeds: int = 10) -> Mapping[str, list[float]]:
    """Return the masses of each method, mean over seeds 0, 1, ..."""
    settings: dict[str, dict[str, float]] = {"reference": {"steps": 0}, **METHODS}
    return {
        name: torch.tensor([train(seed, **options) for seed in range(seeds)]).mean(dim=0).tolist()  # type: ignore[arg-type]
        for name, options in settings.items()
    }


def main() -> None:
    """Print the table."""
    print(f"{'mean over 10 seeds':<30}{'chosen':<10}{'rejected':<10}unseen")
    for name, (chosen, rejected, unseen) in means().items():
        print(f"{name:<30}{chosen:<10.3f}{rejected:<10.2g}{unseen:.3f}")


if __name__ == "__main__":
    main()
