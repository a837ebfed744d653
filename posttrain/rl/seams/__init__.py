"""Every place where posttrain touches the inside of ``trl.GRPOTrainer``, and nothing else.

:mod:`~posttrain.rl.seams.batch` reads what TRL keeps of a generation, :mod:`~posttrain.rl.seams.reference`
keeps a reference policy, :mod:`~posttrain.rl.seams.vllm` starts an engine and syncs it,
:mod:`~posttrain.rl.seams.trainer` has the hooks.

Checked against TRL 1.16; ``tests/rl/test_rl_seams.py`` holds one contract test per seam, so that an upgrade
of TRL breaks a test with a readable name. Upstream's loss is never copied: what methods change goes in
through its inputs (advantages) or is added to its result with the same divisor.

======================================  =======================================================
seam                                    what is relied on
======================================  =======================================================
``_generate``                           samples all completions of a batch, and nothing else
``_calculate_rewards``                  returns the gathered (rows of all ranks, functions) matrix
``_generate_and_score_completions``     row-shaped tensors in its dict reach the loss
``_get_per_token_logps_and_entropies``  is called first in the loss, with gradient; off-policy it is called
                                        first in generation too, with the policy that generated
fused LM head                           what the backbone returns goes through the head, nothing between
``_compute_loss``                       reads ``inputs["advantages"]`` after that call; (B, C) is allowed
``_compute_loss``                       reads ``inputs["ref_per_token_logps"]`` after that call
KL term                                 :meth:`GRPOSeams.kl_term` reproduces it
clipped policy term                     :meth:`GRPOSeams.unclip_term` is what its lower clip takes away
backbone                                its last output columns are the completion tokens
advantages                              :func:`posttrain.rl.formulas.group_advantages` reproduces them
divisors                                :func:`posttrain.rl.formulas.aggregate` reproduces each
``_get_train_sampler``                  a RepeatSampler with its own generator
``reward_func_names``                   :func:`reward_name` gives them
``_logs``                               the latest prompts, completions, rewards and advantages
``_metrics``, ``_logs``                 are all that a generation leaves in the log: a second one is undone
``generation_config``,                  hold the temperature of the sampling alone, read at each generation
``vllm_generation``
``vllm_generation.LLM``                 is the name the constructor calls to start an engine
``vllm_generation.sync_weights``        is called once before the first generation after a step
======================================  =======================================================
"""

from posttrain.rl.seams.trainer import EpochRepeatSampler, GRPOSeams, reward_name

__all__ = ["EpochRepeatSampler", "GRPOSeams", "reward_name"]
