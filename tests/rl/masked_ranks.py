"""Run by test_rl_masked_ranks.py under one or several processes: every row of the second half is cut off."""

import sys

import rollout_ranks
import support


class HalfCut(rollout_ranks.FixedRollouts):
    """Rows of the first half end; those of the second, all rows of the second rank of two, do not."""

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        ids, extra = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        first = self.accelerator.process_index * len(ids)
        half = len(ids) * self.accelerator.num_processes / 2
        return [[*row, 1] if first + i < half else row for i, row in enumerate(ids)], extra


if __name__ == "__main__":
    rollout_ranks.FixedRollouts = HalfCut
    rollout_ranks.main(sys.argv[1], sys.argv[2])
    support.leave()
