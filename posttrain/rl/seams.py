"""Every place where posttrain touches the inside of ``trl.GRPOTrainer``, and nothing else.

A second generation inside a step has a module of its own on top of this one, :mod:`posttrain.rl.rollouts`.

Checked against TRL 1.16; ``tests/rl/test_rl_seams.py`` holds one contract test per seam, so that an upgrade
of TRL breaks a test with a readable name. Upstream's loss is never copied: what methods change goes in
through its inputs (advantages) or is added to its result with the same divisor.

======================================  =======================================================
seam                                    what is relied on
======================================  =======================================================
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
======================================  =======================================================
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import broadcast
from peft import PeftModel
from torch.utils.data import Sampler
from trl import GRPOTrainer as TRLGRPOTrainer
from trl.models.utils import disable_gradient_checkpointing, prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import (
    RepeatSampler,
    add_fused_lm_head,
    create_model_from_path,
    disable_dropout_in_model,
    get_callable_name,
    get_config_model_id,
    use_adapter,
)

from posttrain.kernels.head import Scored, watch_head
from posttrain.rl.formulas import aggregate, group_advantages

# What a forward needs beside ids and mask; present for multimodal models only.
_FORWARD_KEYS = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)

# A batch whose log-probabilities are NaN until GRPOSeams.scored.
_POSTPONED = "posttrain/postponed"


def reward_name(function: Any) -> str:
    """Return the name TRL gives to a reward function, a reward model or the path of one."""
    if isinstance(function, str):
        return function.split("/")[-1]
    if isinstance(function, torch.nn.Module):
        config: Any = function.config
        return str(get_config_model_id(config).split("/")[-1])
    return str(get_callable_name(function))


class EpochRepeatSampler(RepeatSampler):
    """TRL's sampler whose order depends on (seed, epoch) alone, so that a resumed run sees the same rows.

    An uninterrupted run gets the order of ``RepeatSampler``; upstream restarts at the first epoch's order
    after a resume, because its generator is not saved.
    """

    def set_epoch(self, epoch: int) -> None:
        """Put the generator where it stands at the start of ``epoch`` (0-based)."""
        if self.shuffle:
            assert self.seed is not None  # TRL passes args.seed
            self.generator.manual_seed(self.seed)
            for _ in range(epoch):
                torch.randperm(self.num_samples, generator=self.generator)


class GRPOSeams(TRLGRPOTrainer):
    """TRL's trainer with four hooks; with :attr:`hooked` False it is TRL, bit for bit."""

    # What TRL's annotations leave open: they are those of transformers' Trainer.
    args: Any  # a GRPOConfig; its fields are typed for the command line, not for what __post_init__ leaves
    model: Any
    ref_model: Any
    _logs: Any
    _own_reference: Any
    num_generations: int
    num_generations_eval: int
    max_completion_length: int

    #: Set by the subclass before ``super().__init__``: whether the hooks are called at all.
    hooked: bool = False
    #: Whether ``ref_per_token_logps`` must be in every batch, also with ``beta=0``.
    wants_reference: bool = False
    #: Whether the model with its adapter differs from the base from the start; set like :attr:`hooked`.
    _adapter_acts_at_start: bool = False
    #: Whether ``posttrain/old_logps`` must be in every on-policy batch.
    wants_old_logps: bool = False
    #: Whether :meth:`refresh_reference` may be called.
    wants_movable_reference: bool = False
    #: Whether ``posttrain/embeddings`` must be in every batch.
    wants_embeddings: bool = False
    #: Whether :attr:`live_head` must be there in the loss.
    wants_head: bool = False
    #: The same for the policy that generated: off-policy :meth:`on_old_head` is called in its log-prob pass.
    wants_old_head: bool = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._open_batch: dict[str, Any] | None = None
        self._gathered_rewards: torch.Tensor | None = None
        self._scored: tuple[Any, Any, Any] = ([], [], [])
        self._own_reference = None
        self._old_pass_is_next = self._postponing = False
        self._old_statistics: dict[str, torch.Tensor] = {}
        self.live_head: Scored | None = None
        self._reference_moved = False
        super().__init__(*args, **kwargs)
        if self.wants_reference or self.wants_movable_reference:
            self._build_reference()
        if self.wants_movable_reference:
            self._refuse_sharded_reference()

    # ---- hooks ------------------------------------------------------------------------------------------

    def before_generation(self) -> None:
        """Act on the policy or the reference, in training, while no rollout is in use."""

    def on_sampled(self, batch: dict[str, Any]) -> None:
        """Look at a generation batch as TRL made it, log-probabilities of the sampler included if given."""

    def on_rewards(self, rewards: torch.Tensor) -> torch.Tensor:
        """Reshape the gathered (rows of all ranks, functions) rewards."""
        return rewards

    def on_generated(self, inputs: Any, batch: dict[str, Any], rewards: torch.Tensor) -> dict[str, Any]:
        """Replace or add rows of a generation batch; around :meth:`on_rollout`."""
        del inputs
        return self.on_rollout(self.scored(batch), rewards)

    def on_rollout(self, batch: dict[str, Any], rewards: torch.Tensor) -> dict[str, Any]:
        """Change a generation batch; ``rewards`` is the gathered matrix."""
        del rewards
        return batch

    def on_tokens(self, batch: dict[str, Any], logps: torch.Tensor, entropies: torch.Tensor) -> torch.Tensor:
        """Return the advantages of a micro-batch, given its live statistics."""
        del logps, entropies
        return batch["advantages"]

    def on_old_head(self, scored: Scored) -> dict[str, torch.Tensor]:
        """Return (rows, C) tensors for the batch, from the LM head of the policy that generated."""
        del scored
        return {}

    def on_micro_batch(self, batch: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        """Return the rows of a micro-batch that the loss sees, and the factor that keeps its divisor."""
        return batch, 1.0

    def on_loss(self, loss: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor:
        """Add to the loss of a micro-batch."""
        del batch
        return loss

    # ---- seams ------------------------------------------------------------------------------------------

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any
    ) -> Any:
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._scored = (completions, completion_ids_list, prompts)
        self._gathered_rewards = self.on_rewards(rewards)
        return self._gathered_rewards

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        if self.hooked and self.mode == "train":
            self.before_generation()
        batch = self.raw_rollout(inputs)
        self.on_sampled(batch)
        if self.hooked:
            assert self._gathered_rewards is not None
            batch = self.on_generated(inputs, batch, self._gathered_rewards)
        return batch

    def raw_rollout(self, inputs: Any) -> dict[str, Any]:
        """Generate and verify ``inputs`` as TRL does; :meth:`scored` is still to come. Collective."""
        self._old_pass_is_next, self._old_statistics = self.wants_old_head and self.off_policy, {}
        # the correction for the sampler and methods that look at the old head need TRL's pass where it is
        corrected = self.use_vllm and self.vllm_importance_sampling_correction
        self._postponing = self.rows_may_go and not corrected and not self._old_pass_is_next
        try:
            batch = super()._generate_and_score_completions(inputs)
        finally:
            postponed, self._postponing = self._postponing, False
        batch.update(self._old_statistics)
        if postponed:
            batch[_POSTPONED] = True
        return batch

    @property
    def rows_may_go(self) -> bool:
        """Whether rows can be thrown away between :meth:`raw_rollout` and :meth:`scored`.

        TRL's own passes over the batch then wait for the rows that stay.
        """
        return False

    def scored(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return a batch of :meth:`raw_rollout` with the log-probabilities that are missing. Collective."""
        batch = dict(batch)
        if batch.pop(_POSTPONED, False):
            if "old_per_token_logps" in batch:
                batch["old_per_token_logps"] = self._logps_of_batch(self.model, batch, self._rows_per_forward)
            if "ref_per_token_logps" in batch:
                batch["ref_per_token_logps"] = self._reference_logps(batch)
        if self.wants_embeddings:
            batch.update(self._embedded(batch))
        elif self.wants_old_logps and "old_per_token_logps" not in batch:
            # under another name, so that TRL's own loss stays strictly on-policy
            batch["posttrain/old_logps"] = self._logps_of_batch(self.model, batch, self._rows_per_forward)
        if self.wants_reference and "ref_per_token_logps" not in batch:
            batch["ref_per_token_logps"] = self._reference_logps(batch)
        return batch

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        if self._postponing:
            ids, columns = args[0], args[2]
            return torch.full((len(ids), columns), torch.nan, device=ids.device), None, None
        with self._watching(model, *args[:3]):
            result = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        if self._open_batch is not None:
            logps, entropies, _ = result
            self._open_batch["advantages"] = self.on_tokens(self._open_batch, logps, entropies)
        return result

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        if not self.hooked:
            return super()._compute_loss(model, inputs)
        # a copy: buffered rollouts are used again in later iterations
        self._open_batch, share = self.on_micro_batch(dict(inputs))
        try:
            loss = super()._compute_loss(model, self._open_batch)
            loss = self.on_loss(loss, self._open_batch)
            return loss if isinstance(share, float) and share == 1.0 else loss * share
        finally:
            self._open_batch = self.live_head = None

    @contextlib.contextmanager
    def _watching(
        self, model: Any, input_ids: torch.Tensor, mask: torch.Tensor, columns: int
    ) -> Iterator[None]:
        """Pick up what goes into the LM head in the loss and in the old log-prob pass, if somebody asked."""
        in_loss = self._open_batch is not None
        wanted = self.wants_head or (self.wants_old_head and not self.off_policy)
        if not (wanted if in_loss else self._old_pass_is_next):
            yield
            return
        self._old_pass_is_next = False
        seen: list[Scored] = []
        parts: list[dict[str, torch.Tensor]] = []
        policy = self.accelerator.unwrap_model(model)
        policy = policy.get_base_model() if isinstance(policy, PeftModel) else policy

        def receive(scored: Scored) -> None:
            if in_loss:
                seen.append(scored)
            else:
                # at once, so that the hidden states of a whole generation batch are never held
                parts.append(self.on_old_head(scored))

        with watch_head(policy, input_ids, mask, columns, receive, temperature=self.temperature):
            yield
        if in_loss:
            # none where something stands in for the forward: who cannot do without says so
            assert len(seen) <= 1
            self.live_head = seen[0] if seen else None
        else:
            self._old_statistics = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}

    def _get_train_sampler(self, dataset: Any = None) -> Sampler:
        upstream: Any = super()._get_train_sampler(dataset)
        return EpochRepeatSampler(
            data_source=upstream.data_source,
            mini_repeat_count=upstream.mini_repeat_count,
            batch_size=upstream.batch_size,
            repeat_count=upstream.repeat_count,
            shuffle=upstream.shuffle,
            seed=upstream.seed,
        )

    # ---- what the seams give ----------------------------------------------------------------------------

    @property
    def mode(self) -> str:
        """``"train"`` or ``"eval"``, as TRL decides it."""
        return "train" if self.model.training else "eval"

    @property
    def off_policy(self) -> bool:
        """Whether rollouts are used after the policy has moved, so that TRL keeps old log-probs."""
        every = self.args.steps_per_generation * self.num_iterations
        return self.args.gradient_accumulation_steps % every != 0

    @property
    def group_size(self) -> int:
        """Completions per prompt in the current mode."""
        return self.num_generations if self.mode == "train" else self.num_generations_eval

    def loss_mask(self, batch: dict[str, Any]) -> torch.Tensor:
        """(B, C), 1 on tokens written by the model."""
        mask = batch["completion_mask"]
        return mask if "tool_mask" not in batch else mask * batch["tool_mask"]

    def aggregate(self, values: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor:
        """Reduce a (B, C) term with the divisor this run's loss uses for ``batch``."""
        items = batch["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        if self.mode == "train":
            items = items * self.accumulation / self.args.steps_per_generation
        return aggregate(
            values,
            self.loss_mask(batch),
            self.loss_type,
            accumulation=self.accumulation,
            max_completion_length=self.max_completion_length,
            items=items,
        )

    def kl_term(self, batch: dict[str, Any], logps: torch.Tensor) -> torch.Tensor:
        """(B, C), what TRL adds to its per-token loss for ``beta``, with gradient through ``logps``."""
        difference = batch["ref_per_token_logps"] - logps
        estimate = difference.exp() - difference - 1
        if self.args.use_bias_correction_kl:
            log_ratio = logps - batch.get("old_per_token_logps", logps.detach())
            if self.importance_sampling_level == "sequence":
                mask = self.loss_mask(batch)
                tokens = mask.sum(-1, keepdim=True).clamp(min=1.0)
                log_ratio = (log_ratio * mask).sum(-1, keepdim=True) / tokens
            estimate = estimate * log_ratio.exp()
        return self.beta * estimate

    def unclip_term(self, batch: dict[str, Any], logps: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        """(B, C), what turns TRL's clipped policy term into -A r at the tokens ``where``, (B, C) bool.

        For negative advantages below ``1 - epsilon``; elsewhere it is 0. With gradient through ``logps``.
        """
        advantages = batch["advantages"]
        columns = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
        ratio = (logps - batch.get("old_per_token_logps", logps.detach())).exp()
        cut = where & (columns < 0)
        term = torch.where(cut, -columns * (ratio - (1 - self.epsilon_low)).clamp(max=0), 0.0)
        return term * batch["importance_sampling_ratio"] if "importance_sampling_ratio" in batch else term

    @property
    def accumulation(self) -> float:
        """Micro-steps of the current optimiser step, the divisor of every mean; 1 in evaluation."""
        return self.current_gradient_accumulation_steps if self.mode == "train" else 1.0

    def texts_of(self, batch: dict[str, Any]) -> list[str]:
        """Return this rank's completions of a generation batch as text, without special tokens."""
        ids, mask = batch["completion_ids"], batch["completion_mask"].bool()
        rows = [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]
        return list(self._tokenizer.batch_decode(rows, skip_special_tokens=True))

    def scored_completions(self) -> tuple[list[Any], list[bool], list[Any]]:
        """Return this rank's completions in the reward stage, which ones were cut, and their prompts."""
        completions, ids, prompts = self._scored
        ends = {*self.eos_token_ids, self._tokenizer.pad_token_id}
        return list(completions), [not row or row[-1] not in ends for row in ids], list(prompts)

    def advantages_of(self, rewards: torch.Tensor, group_size: int) -> torch.Tensor:
        """Return the advantages of a gathered (rows, functions) matrix under this run's settings."""
        return group_advantages(
            rewards,
            self.reward_weights.to(rewards.device),
            group_size,
            scale=self.scale_rewards,
            aggregation=self.multi_objective_aggregation,
        )

    def log_advantages(self, advantages: torch.Tensor) -> None:
        """Correct the advantages of the latest generation batch (all ranks) in the table of completions."""
        log = self._logs["advantages"]
        for _ in range(min(len(log), advantages.numel())):
            log.pop()
        log.extend(advantages.tolist())

    def group_rewards(
        self, rewards: torch.Tensor, group_size: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return this rank's (reward, tied) from the gathered (rows, functions) matrix.

        ``reward`` is TRL's weighted sum, NaN for a row that no function scored. ``tied`` tells whether all
        scored rows of the group have equal rewards; with ``normalize_then_sum`` that means equal in every
        function, because each is normalised by itself.
        """
        weights = self.reward_weights.to(rewards.device)
        reward = (rewards * weights).nansum(dim=1)
        reward[torch.isnan(rewards).all(dim=1)] = torch.nan
        columns = rewards if self.multi_objective_aggregation == "normalize_then_sum" else reward.unsqueeze(1)
        group_size = group_size or self.group_size
        grouped = columns.view(-1, group_size, columns.size(1))
        low = torch.where(grouped.isnan(), torch.inf, grouped).amin(dim=1)
        high = torch.where(grouped.isnan(), -torch.inf, grouped).amax(dim=1)
        tied = (low >= high).all(dim=1).repeat_interleave(group_size)
        rows = rewards.size(0) // self.accelerator.num_processes
        local = slice(self.accelerator.process_index * rows, (self.accelerator.process_index + 1) * rows)
        return reward[local], tied[local]

    def last_completions(self) -> list[dict[str, Any]]:
        """Return the latest generation batch of all ranks as rows, newest last."""
        rewards = {name: list(values) for name, values in self._logs["rewards"].items()}
        extra = {name: list(values) for name, values in self._logs["extra"].items()}
        rows = []
        for i, (prompt, completion, advantage) in enumerate(
            zip(self._logs["prompt"], self._logs["completion"], self._logs["advantages"], strict=True)
        ):
            row = {"prompt": prompt, "completion": completion, "advantage": advantage}
            row["rewards"] = {name: values[i] for name, values in rewards.items()}
            row.update({name: values[i] for name, values in extra.items() if i < len(values)})
            rows.append(row)
        return rows

    # ---- the reference policy ---------------------------------------------------------------------------

    def _build_reference(self) -> None:
        """Make the initial policy available where TRL does not: with ``beta=0``, or hidden in an adapter."""
        policy = self.accelerator.unwrap_model(self.model)
        if isinstance(policy, PeftModel):
            own = self._adapter_acts_at_start or self.wants_movable_reference
            if own and "ref" not in policy.peft_config:
                self._copy_adapter(policy)
            return
        if self.beta != 0.0:
            return
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            # parameters may be sharded: read the checkpoint again instead of copying them
            init_kwargs = dict(self.args.model_init_kwargs or {})
            init_kwargs.setdefault("dtype", policy.dtype)
            init_kwargs["device_map"] = None
            init_kwargs.setdefault("attn_implementation", policy.config._attn_implementation)
            init_kwargs.setdefault("trust_remote_code", self.args.trust_remote_code)
            reference = create_model_from_path(get_config_model_id(policy.config), **init_kwargs)
        else:
            reference = copy.deepcopy(policy)
            reference.__dict__.pop("forward", None)  # TRL's patched forward belongs to the policy
        if self.args.disable_dropout:
            disable_dropout_in_model(reference)
        reference.requires_grad_(False).eval()
        add_fused_lm_head(
            reference, temperature=self.temperature, cast_lm_head_to_fp32=self.args.cast_lm_head_to_fp32
        )
        if self.is_deepspeed_enabled:
            self._own_reference = prepare_deepspeed(reference, self.accelerator)
        elif self.is_fsdp_enabled:
            self._own_reference = prepare_fsdp(reference, self.accelerator)
        else:
            self._own_reference = self.accelerator.prepare_model(reference, evaluation_mode=True)

    def _copy_adapter(self, policy: Any) -> None:
        """Keep a frozen copy named ``ref`` of the adapter: the initial policy is the base with it."""
        trained = policy.active_adapters[0]
        config = copy.deepcopy(policy.peft_config[trained])
        if hasattr(config, "init_lora_weights"):
            config.init_lora_weights = True  # PiSSA and its kin would change the base a second time
        devices = [policy.device] if policy.device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # adding an adapter draws its initial values
            policy.add_adapter("ref", config)
        for name, parameter in policy.named_parameters():
            if f".{trained}." in name:
                copied = policy.get_parameter(name.replace(f".{trained}.", ".ref."))
                copied.data.copy_(parameter.data)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        policy = self.model if model is None else model
        if isinstance(policy, PeftModel) and {"ref", "default"} <= policy.peft_config.keys():
            # transformers loads adapters from subfolders (the reference) and then forgets the one beside them
            policy.load_adapter(resume_from_checkpoint, "default", is_trainable=True)

    @contextlib.contextmanager
    def _reference_model(self) -> Iterator[torch.nn.Module]:
        reference = self._own_reference if self._own_reference is not None else self.ref_model
        if reference is not None:
            yield reference
            return
        policy = self.accelerator.unwrap_model(self.model)
        training = policy.training
        policy.eval()  # dropout belongs to training: the reference is one fixed policy
        try:
            with use_adapter(policy, adapter_name="ref" if "ref" in policy.peft_config else None):
                yield self.model
        finally:
            policy.train(training)

    def _refuse_sharded_reference(self) -> None:
        plugin = self.accelerator.state.deepspeed_plugin if self.is_deepspeed_enabled else None
        if self.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3):
            raise ValueError(
                "the reference cannot be moved while parameters are sharded (FSDP, DeepSpeed ZeRO-3): use "
                "ZeRO-2 or plain data parallelism, with an adapter if memory is short"
            )

    def _reference_tensors(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return the tensors in which reference and policy can differ, in pairs."""
        policy = self.accelerator.unwrap_model(self.model)
        if isinstance(policy, PeftModel):
            trained = policy.active_adapters[0]
            return [
                (policy.get_parameter(name.replace(f".{trained}.", ".ref.")), parameter)
                for name, parameter in policy.named_parameters()
                if f".{trained}." in name
            ]
        reference = self._own_reference if self._own_reference is not None else self.ref_model
        return list(zip(reference.parameters(), policy.parameters(), strict=True))

    def refresh_reference(self) -> None:
        """Make the current policy the reference, of the adapter or of all weights."""
        for reference, policy in self._reference_tensors():
            reference.data.copy_(policy.data)
        self._reference_moved = True

    def reference_state(self) -> dict[str, Any]:
        """Return whether the reference moved and, on the main process, its tensors then."""
        write = self._reference_moved and self.accelerator.is_main_process
        pairs = self._reference_tensors() if write else []
        return {"moved": self._reference_moved, "tensors": [tensor.detach().cpu() for tensor, _ in pairs]}

    def load_reference_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`reference_state` returned. Collective."""
        self._reference_moved = state["moved"]
        if not self._reference_moved:
            return
        references = [reference for reference, _ in self._reference_tensors()]
        if self.accelerator.is_main_process:
            for reference, saved in zip(references, state["tensors"], strict=True):
                reference.data.copy_(saved)
        for reference in references:
            broadcast(reference.data)

    def _embedded(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Return each row's mean final hidden state, and the old log-probs of that forward if wanted."""
        mask = self.loss_mask(batch)
        parts: list[torch.Tensor] = []
        policy: Any = self.accelerator.unwrap_model(self.model)
        policy = policy.get_base_model() if isinstance(policy, PeftModel) else policy

        def pool(module: torch.nn.Module, args: Any, output: Any) -> None:
            del module, args
            done = sum(len(part) for part in parts)
            hidden = output.last_hidden_state[:, -mask.size(1) :].float()
            rows = mask[done : done + len(hidden)].unsqueeze(2)
            # a product would let a NaN of a padded position through
            parts.append(hidden.masked_fill(rows == 0, 0.0).sum(dim=1) / rows.sum(dim=1).clamp(min=1))

        handle = policy.base_model.register_forward_hook(pool)
        try:
            logps = self._logps_of_batch(self.model, batch, self._rows_per_forward)
        finally:
            handle.remove()
        found = {"posttrain/embeddings": torch.cat(parts)}
        if self.wants_old_logps and "old_per_token_logps" not in batch:
            found["posttrain/old_logps"] = logps
        return found

    def _reference_logps(self, batch: dict[str, Any]) -> torch.Tensor:
        """(B, C) log-probabilities of a generation batch under the initial policy."""
        rows = self._rows_per_forward  # the reference is in evaluation mode, the run may be in training
        with self._reference_model() as reference:
            return self._logps_of_batch(reference, batch, rows)

    @property
    def _rows_per_forward(self) -> int:
        training = self.mode == "train"
        return self.args.per_device_train_batch_size if training else self.args.per_device_eval_batch_size

    def _logps_of_batch(self, model: torch.nn.Module, batch: dict[str, Any], rows: int) -> torch.Tensor:
        """(B, C) log-probabilities of a generation batch under ``model``, ``rows`` at a time, no gradient."""
        with (
            torch.no_grad(),
            disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
        ):
            logps, _, _ = self._get_per_token_logps_and_entropies(
                model,
                torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
                torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
                batch["completion_ids"].size(1),
                batch_size=rows,
                **{key: batch[key] for key in _FORWARD_KEYS if key in batch},
            )
        return logps
