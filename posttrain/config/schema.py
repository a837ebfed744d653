"""What a run configuration may say.

One pydantic model per section, strict about names and ranges. Nothing here imports torch. Two sections
are open-ended and checked elsewhere: ``trainer`` against the fields of the TRL configuration class
(:mod:`posttrain.config.trainer_check`), ``methods`` against the parameters of each method
(:mod:`posttrain.config.method_check`).
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from posttrain.config.paths import usable_path
from posttrain.config.problems import nearest
from posttrain.config.sentences import RULE
from posttrain.config.tasks import TASKS, Task
from posttrain.patterns import UNREADABLE
from posttrain.rollout.settings import RolloutSettings
from posttrain.watchdog.phases import LIMITS

HELD_OUT_SEED = 1_000_003
"""Of the held-out part, unless another is given; that of the training part is 0."""

# Sections that may be left empty in YAML ("trainer:" with nothing under it).
_EMPTY_MEANS_DEFAULT = ("model", "rewards", "methods", "trainer", "rollout")


class Section(BaseModel):
    """Base of every section: unknown keys are refused, values are not mutated after checking."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _refuse(field: str, message: str) -> PydanticCustomError:
    """Return the error of a rule between fields; ``field`` is the one to change."""
    # braces in the message would be read as a template
    return PydanticCustomError(RULE, "{message}", {"message": message, "field": field})


class AdapterConfig(Section):
    """A PEFT adapter to train instead of all weights."""

    type: Literal["lora"] = "lora"
    r: int = Field(default=16, ge=1, description="Rank of the update.")
    alpha: float | None = Field(
        default=None, gt=0, description="Numerator of the scale alpha/r; 2 r when unset."
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout on the adapter input.")
    target_modules: str | list[str] = Field(
        default="all-linear",
        description="'all-linear', a regular expression, or module name endings.",
    )
    rslora: bool = Field(default=False, description="Scale by alpha/sqrt(r) instead of alpha/r.")
    dora: bool = Field(default=False, description="Decompose into magnitude and direction (DoRA).")
    modules_to_save: list[str] | None = Field(default=None, description="Modules trained in full beside it.")


class ModelConfig(Section):
    """Which checkpoint to start from."""

    path: str = Field(
        default="embedded:char-llama",
        min_length=1,
        description="Hub id, local folder, or 'embedded:char-llama' for the small model built in code.",
    )
    revision: str | None = Field(default=None, description="Branch, tag or commit on the Hub.")
    tokenizer: str | None = Field(
        default=None, description="Hub id or folder of the tokenizer when it is not beside the model."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="Type of the loaded weights."
    )
    attn_implementation: str | None = Field(default=None, description="Attention kernel, as in transformers.")
    trust_remote_code: bool = Field(
        default=False, description="Run Python shipped with the checkpoint. Off unless you trust it."
    )
    adapter: AdapterConfig | None = Field(
        default=None, description="Train an adapter; all weights are trained when unset."
    )

    _usable = field_validator("path", "tokenizer")(usable_path)


class SplitConfig(Section):
    """How much of a source to use, and which part."""

    split: str | None = Field(default=None, description="Hub split; 'train' or 'test' when unset.")
    file: str | None = Field(default=None, description="Another local file for this split.")
    size: int | None = Field(
        default=None, ge=1, description="Number of rows; all rows when unset (2000 for generated tasks)."
    )
    seed: int = Field(default=0, ge=0, description="Seed of the generated task, or of the row sample.")

    _usable = field_validator("file")(usable_path)


class LabelNoiseConfig(Section):
    """Wrong labels on purpose: chosen and rejected exchanged in some training rows, in no held-out one."""

    share: float | None = Field(
        default=None, gt=0, le=1, description="Share of the training rows, drawn with 'seed'."
    )
    seed: int = Field(default=0, ge=0, description="Seed of the draw.")
    file: str | None = Field(
        default=None, min_length=1, description="File that names the rows instead, by the values of 'column'."
    )
    column: str | None = Field(default=None, min_length=1, description="Column that file and data both have.")

    _usable = field_validator("file")(usable_path)

    @model_validator(mode="after")
    def _one_way(self) -> LabelNoiseConfig:
        if (self.share is None) == (self.file is None):
            raise _refuse(
                "file" if self.file is not None else "share",
                "label noise is either a share of the rows, {share: 0.2, seed: 0}, or the rows a file names, "
                "{file: flips.jsonl, column: id}",
            )
        if (self.file is None) != (self.column is None):
            raise _refuse("column", "'file' and 'column' go together: {file: flips.jsonl, column: id}")
        return self


class ProbeConfig(Section):
    """Answers in no pair that a preference run scores now and then, to see where probability goes."""

    file: str | None = Field(
        default=None,
        min_length=1,
        description="File with prompt and completion; unset: training prompts, answers of other prompts.",
    )
    size: int | None = Field(
        default=None, ge=1, description="Number of rows; 64 when unset, all rows of a file."
    )
    seed: int = Field(default=0, ge=0, description="Seed of the draw.")

    _usable = field_validator("file")(usable_path)


class DataConfig(Section):
    """Where prompts (and answers) come from."""

    source: str = Field(
        min_length=1,
        description="'reasoning_gym:TASK', a local .jsonl/.json/.csv/.parquet file, or a Hub id.",
    )
    params: dict[str, Any] = Field(default_factory=dict, description="Parameters of a reasoning-gym task.")
    columns: dict[Annotated[str, Field(min_length=1)], str] = Field(
        default_factory=dict, description="Renaming, contract name to source column: {prompt: question}."
    )
    train: SplitConfig = SplitConfig()
    eval: SplitConfig = SplitConfig(seed=HELD_OUT_SEED)
    system_prompt: str | None = Field(
        default=None, description="System message put before every prompt (chat models)."
    )
    prompt_pattern: str | None = Field(
        None,
        description="Regular expression with one group: a text prompt becomes what the group matches, before "
        "the template. For boilerplate around the question.",
    )
    prompt_template: str | None = Field(
        default=None,
        description="Text with {column} fields that builds the prompt, for example '{question}\\nAnswer:'.",
    )
    chat_template: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="auto: the tokenizer's chat template when it has one, plain text when not.",
    )
    max_prompt_tokens: int | None = Field(
        default=None, ge=1, description="Longest prompt allowed, counted in tokens."
    )
    over_length: Literal["refuse", "filter"] = Field(
        default="refuse",
        description="What to do with longer prompts, and with pairs that trainer.max_length leaves no room "
        "for: stop, or drop them and say how many. Prompts are never cut.",
    )
    label_noise: LabelNoiseConfig | None = Field(
        default=None, description="Exchange chosen and rejected in some training rows, to test robustness."
    )
    probe: ProbeConfig | None = Field(
        default=None, description="Score answers in no pair during a preference run; {} for the defaults."
    )

    _usable = field_validator("source")(usable_path)

    @field_validator("params", "columns", "train", "eval", mode="before")
    @classmethod
    def _null_drops(cls, value: Any, info: ValidationInfo) -> Any:
        """Take null for the default; on a command line ``{}`` merges into what the file has."""
        return (
            cls.model_fields[str(info.field_name)].get_default(call_default_factory=True)
            if value is None
            else value
        )

    @model_validator(mode="before")
    @classmethod
    def _another_seed(cls, data: Any) -> Any:
        """Draw held-out rows with a seed of their own, also where ``eval`` only says how many."""
        if isinstance(data, dict) and isinstance(data.get("eval"), dict):
            data = {**data, "eval": {"seed": HELD_OUT_SEED, **data["eval"]}}
        return data


class RewardConfig(Section):
    """One reward; in YAML a bare name (``verifier``) or ``{name: {...}}``."""

    name: str = Field(
        min_length=1,
        description="'verifier' (the source's own), 'math', 'expression', 'format', 'word_list', "
        "'soft_overlong', 'python:package.module.function', or 'model:PATH' (a trained reward model).",
    )
    weight: float = Field(default=1.0, allow_inf_nan=False, description="Weight in the sum of rewards.")
    deadline: float = Field(
        default=10.0, gt=0, le=3600, description="Seconds one answer may take before its process is killed."
    )
    workers: int = Field(default=1, ge=1, le=64, description="Verifier processes per rank.")
    unparseable: float | None = Field(
        default=0.0,
        allow_inf_nan=False,
        description="Reward of an answer that cannot be parsed; null leaves the row out.",
    )
    max_failures: float = Field(
        default=0.2,
        ge=0,
        le=1,
        description="Stop when more than this share of a batch ends in error or timeout.",
    )
    params: dict[str, Any] = Field(default_factory=dict, description="Parameters of this verifier.")


class EvaluateConfig(Section):
    """Held-out evaluation, before and after training."""

    k: list[Annotated[int, Field(ge=1)]] = Field(
        default=[1, 4, 16], min_length=1, description="k of pass@k and maj@k."
    )
    samples: int = Field(default=16, ge=1, description="Completions per problem; at least the largest k.")
    temperature: float = Field(default=1.0, ge=0, description="Sampling temperature; 0 is greedy.")
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_new_tokens: int | None = Field(
        default=None, ge=1, description="Longest completion; the trainer's limit when unset."
    )
    batch_size: int = Field(default=256, ge=1, description="Sequences generated together.")
    confidence: float = Field(default=0.95, gt=0.5, lt=1, description="Level of the bootstrap intervals.")
    resamples: int = Field(default=2000, ge=100, description="Bootstrap resamples.")
    seed: int = Field(default=0, ge=0)
    before: bool = Field(default=True, description="Also evaluate the starting model, on the same problems.")
    every: int | None = Field(
        default=None,
        ge=1,
        description="Also evaluate every so many optimiser steps, logged as held_out/...; never when unset.",
    )

    @model_validator(mode="after")
    def _enough_samples(self) -> EvaluateConfig:
        if max(self.k) > self.samples:
            raise _refuse(
                "samples",
                f"pass@{max(self.k)} needs at least {max(self.k)} samples, found samples={self.samples}",
            )
        return self


class ExportConfig(Section):
    """What to write at the end, and where to publish it."""

    dir: str | None = Field(default=None, description="Folder of the export; RUN/export when unset.")
    format: Literal["auto", "adapter", "merged", "full", "delta"] = Field(
        default="auto",
        description="auto: the adapter when one was trained, the full model otherwise. delta: only the "
        "weights that changed.",
    )
    push: str | None = Field(default=None, description="Hub repository (user/name) to upload to.")
    private: bool = Field(default=True, description="Whether a repository created by the push is private.")

    _usable = field_validator("dir")(usable_path)


class SelectionConfig(Section):
    """Which weights train; in YAML a bare name (``hft``) or ``{hft: {ratio: 0.5}}``."""

    method: str | None = Field(
        default=None,
        min_length=1,
        description="A selector ('posttrain methods' lists them), or package.module:ClassName.",
    )
    params: dict[str, Any] = Field(default_factory=dict, description="Parameters of the selector.")
    plan: str | None = Field(
        default=None,
        min_length=1,
        description="A plan file in place of a selector ('posttrain plan make' writes one).",
    )
    backend: Literal["auto", "freeze", "packed", "composed", "masked"] = Field(
        default="auto", description="What enforces it; auto chooses and logs why."
    )
    weight_decay: Literal["off", "selected", "to_base"] = Field(
        default="off",
        description="Whether trainer.weight_decay acts on single selected scalars: not, towards 0, or "
        "towards the weights before training. Unselected ones never decay, tensors that train whole do.",
    )
    age_correction: bool = Field(
        default=True, description="Adam's bias correction by the steps a scalar has trained."
    )
    master_weights: bool = Field(
        default=True,
        description="Keep an fp32 copy of bf16 weights that train whole, 8 bytes more per scalar; without it "
        "steps too small for bf16 are lost.",
    )
    round: int = Field(default=0, ge=0, description="Round of a sequence; hft draws anew in each.")
    examples: int = Field(
        default=1024, ge=1, description="Training rows that a selector may score weights on."
    )

    _usable = field_validator("plan")(usable_path)

    @model_validator(mode="before")
    @classmethod
    def _one_selector(cls, data: Any) -> Any:
        from posttrain.selection.registry import available

        if not isinstance(data, dict):
            return data
        unknown = [key for key in data if key not in cls.model_fields]
        several = [key for key in unknown if key in available()]
        if len(several) > 1:
            raise _refuse(
                several[1],
                f"one selection has one selector, found {' and '.join(several)}: keep one",
            )
        name = data.get("method") or next(iter(several), None)
        fields = available()[name].model_fields if isinstance(name, str) and name in available() else ()
        for key in unknown:
            if key in fields:
                raise _refuse(
                    key,
                    f"{key!r} is a parameter of {name}, so it goes below it: selection: "
                    f"{{{name}: {{{key}: ...}}}}",
                )
        return data

    @model_validator(mode="after")
    def _one_source(self) -> SelectionConfig:
        if (self.method is None) == (self.plan is None):
            raise _refuse(
                "plan" if self.plan is not None else "method",
                "a selection is either a selector or a plan file: selection: hft, or selection: "
                "{plan: file.safetensors}",
            )
        if self.plan is not None and self.params:
            raise _refuse("params", "a plan file takes no parameters: drop 'params', or name a selector")
        return self


class S3FTConfig(Section):
    """Own answers and rephrasings in place of gold ones, before supervised training; the first reward judges.

    See :mod:`posttrain.sft.s3ft`.
    """

    samples: int = Field(default=1, ge=1, description="Own answers per prompt.")
    select: Literal["logprob", "shortest"] = Field(
        default="logprob",
        description="Among several right ones: highest mean log-probability, or fewest tokens.",
    )
    paraphrase: bool = Field(default=True, description="Rephrase the gold answer where no own one is right.")
    paraphrase_template: str = Field(
        default="{prompt}\n\nA correct answer, as a guide:\n{gold}\n\n"
        "Now answer in your own words. Do not mention the guide.",
        description="What the rephrasing is asked with: fields {prompt} and {gold}.",
    )
    leak_pattern: str | None = Field(
        default=None,
        description="Regular expression; a rephrasing in which it is found is not right: '(?i)the guide'.",
    )
    threshold: float = Field(
        default=1.0, description="Score of the first reward from which an answer is right."
    )
    temperature: float = Field(default=0.0, ge=0, description="Sampling temperature; 0 is greedy.")
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_new_tokens: int = Field(
        default=512, ge=1, description="Longest answer; one that is cut there is not right."
    )
    batch_size: int = Field(
        default=64, ge=1, description="Sequences generated together; as many rows are written down together."
    )
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _makes_sense(self) -> S3FTConfig:
        if self.samples > 1 and self.temperature == 0:
            raise _refuse(
                "temperature",
                f"temperature 0 gives the same answer {self.samples} times: set one above 0, or samples: 1",
            )
        try:
            re.compile(self.leak_pattern or "")
        except UNREADABLE as error:
            raise _refuse("leak_pattern", f"this is not a regular expression: {error}") from None
        if "{gold}" not in self.paraphrase_template or "{prompt}" not in self.paraphrase_template:
            raise _refuse("paraphrase_template", "the template needs the fields {prompt} and {gold} in it")
        return self


class WarmStartConfig(Section):
    """Supervised fine-tuning on the source's own answers before reinforcement learning."""

    when: Literal["untrained", "always"] = Field(
        default="untrained",
        description="untrained: only when model.path is an embedded model, whose weights are random.",
    )
    size: int = Field(
        default=20_000, ge=1, description="Rows of the source to train on; drawn with train.seed + 1."
    )
    trainer: dict[str, Any] = Field(default_factory=dict, description="Fields of TRL's SFTConfig.")


class WatchdogConfig(Section):
    """When a run of several processes stops because one of them is lost: limits in seconds, null for never.

    The limit of a phase counts while the other ranks wait, and is at least three times the longest that a
    rank has worked in it so far. See :mod:`posttrain.watchdog`.
    """

    enabled: bool = Field(default=True, description="false: ranks that die or hang are not noticed.")
    silence: float = Field(
        default=20.0, ge=5, description="Without a sign of life of a process; a killed one is seen at once."
    )
    collective: float | None = Field(
        default=900.0, gt=0, description="All ranks waiting for each other, as after a network failure."
    )
    loading: float | None = Field(default=LIMITS["loading"], gt=0, description="Data, model, first phases.")
    data: float | None = Field(default=LIMITS["data"], gt=0, description="The next training rows.")
    generation: float | None = Field(default=LIMITS["generation"], gt=0, description="Sampling completions.")
    rewards: float | None = Field(
        default=LIMITS["rewards"],
        gt=0,
        description="Reward functions, once another rank is done. Verifiers have a 'deadline' beside it.",
    )
    weight_sync: float | None = Field(default=LIMITS["weight_sync"], gt=0, description="Weights to vLLM.")
    log_probs: float | None = Field(
        default=LIMITS["log_probs"], gt=0, description="Log-probabilities of old policy and reference."
    )
    backward: float | None = Field(default=LIMITS["backward"], gt=0, description="Forward and backward.")
    optimizer: float | None = Field(default=LIMITS["optimizer"], gt=0, description="The optimiser step.")
    callbacks: float | None = Field(
        default=LIMITS["callbacks"], gt=0, description="Logging, trackers and callbacks behind a step."
    )
    saving: float | None = Field(default=LIMITS["saving"], gt=0, description="Writing a checkpoint.")
    evaluation: float | None = Field(default=LIMITS["evaluation"], gt=0, description="Held-out evaluation.")
    export: float | None = Field(default=LIMITS["export"], gt=0, description="Export, upload and report.")


class RunConfig(Section):
    """A whole run."""

    task: Task = Field(description="Which kind of training.")
    run_dir: str = Field(
        default="runs/default", min_length=1, description="Folder that holds everything the run writes."
    )
    model: ModelConfig = ModelConfig()
    data: DataConfig
    rewards: list[RewardConfig] = Field(
        default_factory=list, description="Rewards; in a ttrl run one at most, for the metrics."
    )
    methods: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="Methods by name, with parameters."
    )
    trainer: dict[str, Any] = Field(
        default_factory=dict, description="Fields of the TRL config class of the task."
    )
    rollout: RolloutSettings = Field(
        default=RolloutSettings(), description="Of rlvr and ttrl runs: what TRL has no fields for."
    )
    selection: SelectionConfig | None = Field(
        default=None, description="Which weights train; all that are trainable when unset."
    )
    s3ft: S3FTConfig | None = Field(
        default=None,
        description="Rewrite the training rows first (task sft): own answers where they are right.",
    )
    warm_start: WarmStartConfig | None = None
    evaluate: EvaluateConfig | None = None
    export: ExportConfig | None = None
    watchdog: WatchdogConfig | None = Field(
        default=None, description="When a lost or hanging rank stops the others; the defaults when unset."
    )
    threads: int | None = Field(
        default=None, ge=1, description="CPU threads of torch; torch's own choice when unset."
    )

    _usable = field_validator("run_dir")(usable_path)

    @model_validator(mode="before")
    @classmethod
    def _shorthands(cls, data: Any) -> Any:
        """Accept ``rewards: [verifier, {math: {weight: 2}}]`` and ``methods: {ace: }``."""
        return expand_shorthands(data)

    @model_validator(mode="after")
    def _task_needs(self) -> RunConfig:
        if self.task == "rlvr" and not self.rewards:
            raise _refuse(
                "rewards",
                "task 'rlvr' needs at least one entry under 'rewards', for example rewards: [verifier]",
            )
        spec = TASKS[self.task]
        if spec.pairs and self.data.source.startswith("reasoning_gym:"):
            raise _refuse(
                "data.source",
                f"task {self.task!r} learns from pairs of answers, which generated tasks have none of: set "
                "data.source to a file or Hub set with prompt, chosen and rejected",
            )
        if not spec.pairs and self.data.label_noise is not None:
            raise _refuse(
                "data.label_noise",
                f"task {self.task!r} has no chosen and rejected to exchange: drop the section, or set task: "
                "preference or reward",
            )
        if self.task != "preference" and self.data.probe is not None:
            raise _refuse(
                "data.probe",
                f"a probe is scored by preference runs only, found task {self.task!r}: drop the section",
            )
        if not spec.generates and self.rollout != RolloutSettings():
            raise _refuse("rollout", f"task {self.task!r} samples nothing to train on: drop the section")
        if spec.scores and self.rewards:
            raise _refuse(
                "rewards",
                f"task {self.task!r} trains a reward model on pairs and calls no rewards: drop the section",
            )
        if self.task == "preference" and self.rewards and self.evaluate is None:
            raise _refuse(
                "rewards",
                "'rewards' in a preference run only judge the continuations that the evaluation samples: add "
                "an 'evaluate' section or drop them",
            )
        if spec.pairs and self.evaluate is not None and self.evaluate.k != [1]:
            raise _refuse(
                "evaluate.k",
                f"k is of pass@k, and task {self.task!r} measures preferences: drop it",
            )
        judged = self.evaluate is not None or self.s3ft is not None
        if judged and self.rewards and self.rewards[0].name == "soft_overlong":
            raise _refuse(
                "rewards",
                "the first reward decides what is correct, and soft_overlong only counts "
                "tokens: list it after the reward that judges the answer",
            )
        if self.s3ft is not None and self.task != "sft":
            raise _refuse("s3ft", "s3ft rewrites supervised data: set task: sft, or drop the section")
        if self.s3ft is not None and not self.rewards:
            raise _refuse(
                "rewards",
                "s3ft needs a judge: add a reward that knows the answers, for example rewards: [verifier]",
            )
        if self.task == "sft" and self.rewards and self.evaluate is None and self.s3ft is None:
            raise _refuse(
                "rewards",
                "'rewards' in an sft run only serve the evaluation and s3ft: add an 'evaluate' section or "
                "drop them",
            )
        return self


def expand_shorthands(data: Any) -> Any:
    """Return a configuration in its long form; what cannot be understood is left as it is.

    ``rewards: [verifier, {math: {weight: 2}}]`` names rewards, ``methods: [ace]`` and ``methods: {ace: }``
    take methods with their defaults, ``selection: hft`` and ``selection: {hft: {ratio: 0.5}, round: 1}`` a
    selector, and an empty section is its defaults.
    """
    if not isinstance(data, dict):
        return data
    data = {key: value for key, value in data.items() if value is not None or key not in _EMPTY_MEANS_DEFAULT}
    evaluate = data.get("evaluate")
    if data.get("task") in ("preference", "reward") and isinstance(evaluate, dict):
        # continuations per held-out prompt; there is no pass@k to estimate
        data["evaluate"] = {"k": [1], "samples": 4, **evaluate}
    rewards = data.get("rewards")
    if isinstance(rewards, (str, dict)):
        rewards = [rewards]
    if isinstance(rewards, list):
        data["rewards"] = [_reward_mapping(item) for item in rewards]
    methods = data.get("methods")
    if isinstance(methods, list):
        pairs = [_named(item) for item in methods]
        named = dict(pair for pair in pairs if pair is not None)
        methods = named if len(named) == len(pairs) else methods
    if isinstance(methods, dict):
        data["methods"] = {name: {} if params is None else params for name, params in methods.items()}
    selection = data.get("selection")
    if isinstance(selection, str):
        data["selection"] = {"method": selection}
    elif isinstance(selection, dict) and (name := selector_key(selection)) is not None:
        rest = {key: value for key, value in selection.items() if key != name}
        params = {} if selection[name] is None else selection[name]
        data["selection"] = {"method": name, "params": params, **rest}
    return data


def selector_key(selection: dict[str, Any]) -> str | None:
    """Return the key that names the selector in ``{hft: {ratio: 0.5}, round: 1}``, if it is written so."""
    from posttrain.selection.registry import available

    if "method" in selection or "params" in selection:
        return None
    fields = SelectionConfig.model_fields
    others = [key for key in selection if isinstance(key, str) and key not in fields]
    # a key that looks like a field and is no selector is a slip of the pen
    named = [key for key in others if key in available() or nearest(key, fields) is None]
    return named[0] if len(named) == 1 else None


def _named(item: Any) -> tuple[str, Any] | None:
    """Return (name, options) of ``name`` or ``{name: options}``, None for anything else."""
    if isinstance(item, str):
        return item, None
    if isinstance(item, dict) and len(item) == 1:
        ((name, options),) = item.items()
        return name, options
    return None


def _reward_mapping(item: Any) -> Any:
    pair = _named(item)
    if pair is None or pair[0] in RewardConfig.model_fields:
        return item
    name, options = pair
    return {"name": name, **(options or {})} if options is None or isinstance(options, dict) else item
