"""The fields of TRL's configuration classes, read from the installed source, not imported.

:func:`trainer_fields` gives name, type, default and choices of every field that ``trainer:`` may
hold. Ranges are in :mod:`posttrain.config.trainer_ranges`, rules between fields in
:mod:`posttrain.config.trainer_rules`.
"""

from __future__ import annotations

import functools

from posttrain.config.tasks import TaskSpec
from posttrain.config.upstream import SourceField, class_body, dataclass_fields

OWNED = {
    "output_dir": "set 'run_dir' at the top level; checkpoints go into it",
    "resume_from_checkpoint": "leave it out and run 'posttrain train CONFIG --resume'",
    "reward_weights": "set 'weight' of each entry under 'rewards', as in rewards: [{verifier: {weight: 2}}]",
    "trust_remote_code": "set 'model.trust_remote_code'",
    "local_rank": "leave it out; the launcher (accelerate, torchrun) sets it",
    "parallelism_config": "leave it out; 'accelerate launch --config_file' sets it",
    "do_train": "leave it out; the verb decides: 'posttrain train'",
    "do_predict": "leave it out; evaluation is under 'evaluate'",
}
"""Fields that posttrain sets itself, with the place to use instead."""

RENAMED = {
    "batch_size": "per_device_train_batch_size",
    "bsz": "per_device_train_batch_size",
    "epochs": "num_train_epochs",
    "evaluation_strategy": "eval_strategy",
    "group_by_length": "train_sampling_strategy: group_by_length",
    "group_size": "num_generations",
    "kl_coef": "beta",
    "logging_dir": "run_dir at the top level; it holds the logs",
    "lr": "learning_rate",
    "lr_scheduler": "lr_scheduler_type",
    "max_completion_tokens": "max_completion_length",
    "max_new_tokens": "max_completion_length",
    "max_prompt_length": "data.max_prompt_tokens; longer prompts are refused or filtered, never cut",
    "max_seq_length": "max_length",
    "max_seq_len": "max_length",
    "model_name_or_path": "model.path",
    "no_cuda": "use_cpu",
    "num_epochs": "num_train_epochs",
    "num_rollouts": "num_generations",
    "optimizer": "optim",
    "overwrite_output_dir": "run_dir with another folder; a run never overwrites one",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "rollout_batch_size": "generation_batch_size",
    "steps": "max_steps",
    "vllm_guided_decoding_regex": "vllm_structured_outputs_regex",
    "warmup_ratio": "warmup_steps; a value below 1 is a share of all steps",
    "wandb_project": "project",
}
"""Other names of fields: older ones, and those of other toolkits."""


GONE = {
    "DPOConfig": {
        "rpo_alpha": "write loss_type: [sigmoid, sft] and loss_weights: [1.0, RPO_ALPHA]",
        "reference_free": "drop it: TRL's losses are all against a reference, and sigmoid_norm is the one "
        "without length bias",
        "max_completion_length": "use max_length, which counts prompt and answer together",
        "max_target_length": "use max_length, which counts prompt and answer together",
        "generate_during_eval": "drop it; the 'evaluate' section samples continuations",
        "model_adapter_name": "drop it; 'model.adapter' makes one adapter",
        "ref_adapter_name": "drop it; the reference is the model that the run starts from",
        "force_use_ref_model": "drop it; the reference is the model that the run starts from",
        "ref_model_init_kwargs": "drop it; the reference is the model that the run starts from",
        "label_pad_token_id": "drop it; answers are masked without it",
        "padding_value": "drop it; the tokenizer's pad token is used",
        "is_encoder_decoder": "drop it; only decoders are trained",
        "use_logits_to_keep": "drop it; logits are never kept",
        "use_num_logits_to_keep": "drop it; logits are never kept",
        "dataset_kwargs": "drop it",
    },
}
"""Fields of earlier versions of TRL that have no other name now, with what to do instead."""


@functools.cache
def trainer_fields(spec: TaskSpec) -> dict[str, SourceField]:
    """Return the fields of a task's TRL configuration class by name, inherited ones first.

    Raises:
        ModuleNotFoundError, LookupError: TRL or transformers is missing or of a version we do not know.
    """
    fields: dict[str, SourceField] = {}
    for package, module, name in (
        ("transformers", "training_args", "TrainingArguments"),
        ("trl", "trainer.base_config", "_BaseConfig"),
        ("trl", f"trainer.{spec.config_module}", spec.config_class),
    ):
        fields |= dataclass_fields(class_body(package, module, name))
    return fields
