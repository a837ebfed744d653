"""Errors that end runs: what causes them, and what to try. The first row that matches is taken."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Known:
    """An error that is known.

    Attributes:
        name: Stable name.
        pattern: What its text (``Type: message``) matches, case ignored.
        cause: The likely cause.
        advice: What to try.
    """

    name: str
    pattern: str
    cause: str
    advice: str


KNOWN = (
    # what the watchdog says of another rank comes first: an error of that rank stands inside it
    Known(
        "rank_gone",
        r"is gone: its process ended",
        "the system ended it (out of memory: dmesg | grep -i 'killed process'), or native code crashed",
        "smaller batches or fewer verifier workers per process; python -X faulthandler shows a crash",
    ),
    Known(
        "rank_hung",
        r"and rank [\d, ]+ waits? for it",
        "something in that phase does not end on one rank",
        "read its stack under watchdog/; give the reward function a deadline, or raise that phase's limit "
        "under "
        "watchdog:",
    ),
    Known(
        "rank_silent",
        r"nothing was heard of rank|no longer answers",
        "its machine or the network is down, or the whole process stands still (swapping)",
        "look at that machine; a slow one needs a higher watchdog.silence",
    ),
    Known(
        "deadlock",
        r"all ranks have waited for each other",
        "ranks called different collectives: a callback, reward or method that acts on one rank only, or a "
        "cut "
        "network",
        "compare the stacks under watchdog/; code that computes on all ranks must run on all of them",
    ),
    Known(
        "gpu_memory_for_vllm",
        r"less than desired GPU memory utilization|No available memory for the cache blocks",
        "vLLM reserves its share of the card when it starts, and trainer or leftovers hold it already",
        "lower trainer.vllm_gpu_memory_utilization, set trainer.vllm_enable_sleep_mode: true, or end the "
        "processes "
        "that nvidia-smi lists",
    ),
    Known(
        "out_of_gpu_memory",
        r"OutOfMemoryError|CUDA out of memory|HIP out of memory|CUBLAS_STATUS_ALLOC_FAILED",
        "the step did not fit the card: activations grow with rows x tokens, gradients and optimiser state "
        "with "
        "what trains",
        "halve per_device_train_batch_size and double gradient_accumulation_steps (the same step to "
        "rounding); "
        "gradient_checkpointing: true; lower max_completion_length or max_length; model.adapter or a "
        "selection; "
        "dtype: bfloat16; ZeRO-3 or FSDP2 on several cards",
    ),
    Known(
        "out_of_memory",
        r"can't allocate memory|MemoryError|std::bad_alloc|Cannot allocate memory",
        "the machine's memory is used up",
        "smaller batches or a smaller model; fewer verifier workers (rewards.workers), each of which is a "
        "process",
    ),
    Known(
        "disk_full",
        r"No space left|disk (is )?full|Disk quota|inline_container|ENOSPC",
        "the disk filled up while something was written; earlier checkpoints are whole",
        "free space or lower trainer.save_total_limit, then go on with --resume",
    ),
    Known(
        "no_permission",
        r"PermissionError|Permission denied|Read-only file system|EROFS|EACCES",
        "this user may not write there: a folder of another user, or a disk mounted read-only",
        "chown it, or set run_dir (runs), HF_HOME (models and data) or TMPDIR to a folder of yours",
    ),
    Known(
        "verifier_failure",
        r"max_failures|The verifier is at fault|VerifierStartError|verifier process",
        "the reward function raises or takes too long, whatever the model answers",
        "mend it (the messages above name rows), or raise its deadline, workers or params.memory_gib; then "
        "--resume",
    ),
    Known(
        "not_finite",
        r"not finite|is nan|is inf|infinite rewards|FloatingPointError|`inf`, `nan`|grad.*norm.*(nan|inf)",
        "the learning rate is too high, float16 overflowed, or a reward or reference is not finite",
        "lower trainer.learning_rate, add warmup_steps, train in bfloat16 or float32; go on with --resume "
        "from the "
        "checkpoint before it",
    ),
    Known(
        "collective_timeout",
        r"collective operation timeout|Watchdog caught|NCCL (error|communicator)|ProcessGroupNCCL|Timed out "
        r"waiting|"
        r"DistBackendError|Connection (closed|reset) by peer|Socket Timeout|barrier.*time|did not reach|"
        r"stalled",
        "one process died or took another path, and the others waited for it: its error is the one to read",
        "look for the first error among all ranks; on one machine check /dev/shm and NCCL_P2P_DISABLE "
        "(posttrain doctor), between machines the network interface (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME)",
    ),
    Known(
        "device_assert",
        r"device-side assert",
        "an index outside its table, nearly always token ids beyond the model's vocabulary",
        "check that the tokenizer belongs to the model (vocabulary sizes), and run once with use_cpu: true "
        "to see "
        "where",
    ),
    Known(
        "no_kernels_for_gpu",
        r"no kernel image is available",
        "this torch build holds no code for this card",
        "posttrain doctor names the architectures; install a build that has the card's",
    ),
    Known(
        "adapter_targets",
        r"Target modules .* not found|target_modules",
        "the model has no modules of the names under model.adapter.target_modules",
        "target_modules: all-linear works for every model",
    ),
    Known(
        "no_gradient",
        r"does not require grad|None of the inputs have requires_grad",
        "nothing that trains reaches the loss: gradient checkpointing cuts it off from a frozen embedding, "
        "or all "
        "parameters are frozen",
        "gradient_checkpointing_kwargs: {use_reentrant: false}, or gradient_checkpointing: false",
    ),
    Known(
        "tracker_login",
        r"wandb.*(api_key|API key|login|not logged)|No API key configured|(Comet|Neptune|SwanLab).*(api|"
        r"token|login)",
        "the tracker under trainer.report_to wants an account, and there is nobody to ask",
        "log in once (wandb login), export WANDB_MODE=offline, or report_to: trackio, which needs no account",
    ),
    Known(
        "hub_access",
        r"GatedRepo|gated repo|401 Client|403 Client|RepositoryNotFound|offline mode|LocalEntryNotFound|"
        r"couldn't connect",
        "the model or data is not on this machine and could not be fetched",
        "hf auth login (and accept the licence on the model's page), unset HF_HUB_OFFLINE, or give a local "
        "folder",
    ),
    Known(
        "broken_checkpoint",
        r"SafetensorError|HeaderTooLarge|InvalidHeader|MetadataIncompleteBuffer|PytorchStreamReader|"
        r"unexpected EOF",
        "a file of weights or state is cut short: a copy or download that did not end",
        "copy or download it again; of checkpoints, delete the damaged one and --resume takes the one before",
    ),
    Known(
        "nothing_changed",
        r"changes no weight|have the same weights: nothing to write",
        "training left every weight as it was: no gradient, a learning rate of 0, or updates smaller than "
        "the "
        "spacing of 16-bit numbers",
        "see grad_norm and learning_rate in metrics.jsonl; model.dtype: float32 with trainer.bf16: true, a "
        "higher "
        "learning rate, or an adapter",
    ),
    Known(
        "missing_optional",
        r"install\W+`?(bitsandbytes|flash[_-]?attn|liger[_-]kernel)|(bitsandbytes|flash[_-]?attn|"
        r"FlashAttention2?|liger[_-]kernel|deepspeed|vllm)\W.*"
        r"(not installed|not available|not found|No module|install|requires)|No module named '(bitsandbytes|"
        r"flash_attn|liger_kernel|deepspeed|vllm)",
        "the setting needs a package that is not in this environment",
        "install it, or go without: optim: adamw_torch for 8-bit optimisers, attn_implementation: sdpa for "
        "flash attention, use_vllm: false, use_liger_kernel: false",
    ),
    Known(
        "broken_packages",
        r"undefined symbol|cannot import name|ImportError|ModuleNotFoundError",
        "packages that do not go together",
        "posttrain doctor shows which",
    ),
    Known(
        "columns",
        r"KeyError|column",
        "the rows do not have a column the task needs",
        "posttrain check names columns and renamings (data.columns)",
    ),
)


def explain(text: str) -> Known | None:
    """Return what is known of an error, or None.

    Args:
        text: ``Type: message``.
    """
    return next((row for row in KNOWN if re.search(row.pattern, text, re.IGNORECASE)), None)
