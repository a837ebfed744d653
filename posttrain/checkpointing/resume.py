"""A Trainer mixin that resumes bit for bit at any step and never leaves a half-written checkpoint.

Saving
    A checkpoint is written into ``OUTPUT_DIR/_saving`` and renamed to ``checkpoint-N`` when every rank is
    done. A folder called ``checkpoint-N`` is therefore complete, whatever killed the run; old checkpoints are
    only deleted after the rename.

Resuming
    transformers restores weights, optimiser, scheduler, scaler and random states, and skips the rows it has
    seen. This adds, per rank, what it leaves out: rollouts that are buffered between generations, the place
    in them, sums behind the numbers that are logged every few steps, the state of methods, and what decides
    the order of the rows in the epoch that was cut (its number, for every sampler and for streams, which have
    no length; the random state it began with). Where ``sync_ref_model`` moves the reference, a checkpoint
    also holds it, once, in ``reference.safetensors``.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
import sys
from collections import defaultdict, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from transformers.training_args import TrainingArguments

from posttrain.checkpointing.folders import newest_checkpoint
from posttrain.checkpointing.whole import damage, list_files, refusal
from posttrain.fully_sharded import FullySharded
from posttrain.sharding import gathered, is_split, rows_here
from posttrain.watchdog.phases import phase
from posttrain.watchdog.trainer import WatchedTrainer

logger = logging.getLogger(__name__)

_STAGING = "_saving"  # the leading underscore keeps it out of Hub uploads
_FORMAT = 2
_REFERENCE = "reference.safetensors"
# What the loop keeps between two logs; it is reset when training starts, so it is restored after that.
_LOOP = ("_tr_loss", "_total_loss_scalar", "_globalstep_last_logged")
# What TRL's trainers keep on themselves, where present.
_TRAINER = ("_step", "_total_train_tokens", "_buffered_inputs")


# accelerate calls the device of CPU rank 1 "cpu:1"; torch can write tensors there but not load them back
torch.serialization.register_package(
    15, lambda _: None, lambda storage, location: storage if location.startswith("cpu:") else None
)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or does not fit the run that wants to resume from it."""


class _RestoreLoop(TrainerCallback):
    """Puts the loop's sums back once the loop has reset them."""

    def __init__(self, trainer: ExactResume) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        del args, state, control, kwargs
        for name, value in self.trainer._pending_loop.items():
            setattr(self.trainer, name, value)
        self.trainer._pending_loop = {}


class ExactResume(WatchedTrainer, FullySharded):
    """Mixin; put it before the TRL trainer in the bases."""

    # of TRL's trainers; transformers' own has neither
    _metrics: dict[str, Any]
    _logs: dict[str, Any]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._pending_loop: dict[str, Any] = {}
        self._staging: Path | None = None
        self._epoch_start: torch.Tensor = torch.get_rng_state()
        super().__init__(*args, **kwargs)
        self.add_callback(_RestoreLoop(self))

    # ---- what is saved ----------------------------------------------------------------------------------

    def extra_state(self) -> dict[str, Any]:
        """Return what this rank needs beyond transformers' own checkpoint. Subclasses add to it."""
        state: dict[str, Any] = {
            "format": _FORMAT,
            "shape": self._batch_shape(),
            "loop": {name: getattr(self, name) for name in _LOOP},
            "trainer": {name: getattr(self, name) for name in _TRAINER if hasattr(self, name)},
            "epoch_start": self._epoch_start,
        }
        if hasattr(self, "_metrics"):
            state["metrics"] = {mode: dict(values) for mode, values in self._metrics.items()}
        if hasattr(self, "_logs"):
            state["logs"] = _plain_logs(self._logs)
        return state

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`extra_state` returned.

        Raises:
            CheckpointError: The state is of another version of posttrain, or the batch layout changed while
                rollouts were buffered.
        """
        if state["format"] != _FORMAT:
            raise CheckpointError(
                f"the checkpoint's state has format {state['format']}, this version of posttrain reads "
                f"{_FORMAT}: resume with the version that wrote it, or start a new run from its weights"
            )
        found, needed = state["shape"], self._batch_shape()
        if found != needed and self._needs_buffer(state):
            changed = [
                f"{key}: {found.get(key)} then, {needed[key]} now"
                for key in needed
                if found.get(key) != needed[key]
            ]
            raise CheckpointError(
                "the checkpoint holds rollouts that are not used up, and they do not fit this run "
                f"({'; '.join(changed)}). Resume with the old settings, or from a checkpoint on a generation "
                "boundary."
            )
        self._pending_loop = {
            name: _to_device(value, self.args.device) for name, value in state["loop"].items()
        }
        self._epoch_start = state["epoch_start"]
        for name, value in state["trainer"].items():
            setattr(self, name, _to_device(value, self.args.device))
        if found != needed:
            self._restart_rollouts()
        for mode, values in state.get("metrics", {}).items():
            self._metrics[mode] = defaultdict(list, values)
        if "logs" in state:
            _restore_logs(self._logs, state["logs"])

    def _restart_rollouts(self) -> None:
        """Generate at once, and count micro-steps as if the run had always had this layout."""
        if hasattr(self, "_buffered_inputs"):
            self._step = self.state.global_step * self.args.gradient_accumulation_steps
            self._buffered_inputs = None

    def _batch_shape(self) -> dict[str, Any]:
        names = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation")
        shape = {
            name: getattr(self.args, name, None) for name in (*names, "num_iterations", "num_generations")
        }
        return {**shape, "world_size": self.args.world_size}

    @staticmethod
    def _needs_buffer(state: dict[str, Any]) -> bool:
        every = (state["shape"]["steps_per_generation"] or 1) * (state["shape"]["num_iterations"] or 1)
        step: int = state["trainer"].get("_step", 0)
        return step % every != 0

    # ---- saving -----------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with phase("saving"):
            self._save_whole(model, trial)

    def _save_whole(self, model: Any, trial: Any) -> None:
        run_dir = Path(super()._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staged, final = run_dir / _STAGING / name, run_dir / name
        if self.args.should_save:
            shutil.rmtree(run_dir / _STAGING, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        best = self.state.best_model_checkpoint
        try:
            with self._stage(run_dir / _STAGING):
                super()._save_checkpoint(model, trial)
            staged.mkdir(parents=True, exist_ok=True)
            if not self.args.save_only_model:
                torch.save(self.extra_state(), staged / _state_file(self.args.process_index))
                self._save_reference(staged)
            self.accelerator.wait_for_everyone()  # every rank's files are listed
            if self.args.should_save:
                self._correct_best_checkpoint(run_dir, best)
                self.state.save_to_json(str(staged / "trainer_state.json"))
                list_files(staged)
                _flush_to_disk(staged)
        except (OSError, RuntimeError, SafetensorError) as error:
            # torch reports a full disk as a RuntimeError of its zip writer; any other is not about writing
            if isinstance(error, RuntimeError) and "inline_container" not in str(error):
                raise
            if self.args.should_save:
                shutil.rmtree(run_dir / _STAGING, ignore_errors=True)
            last = newest_checkpoint(run_dir)
            kept = f"the last good one is {last.name}" if last else "no earlier one exists"
            raise CheckpointError(
                f"could not write checkpoint {self.state.global_step} under {run_dir}: {error}; {kept}. "
                "Free disk space (or lower save_total_limit) and resume."
            ) from error
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            _replace(staged, final)
            rotate_checkpoints(
                output_dir=str(run_dir),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))

    def _moving_reference(self) -> torch.nn.Module | None:
        """Return the reference that ``sync_ref_model`` moves, or None; without wrappers."""
        reference = getattr(self, "ref_model", None)
        if reference is None or not getattr(self.args, "sync_ref_model", False):
            return None
        inside: torch.nn.Module = self.accelerator.unwrap_model(reference)
        return inside

    def _save_reference(self, folder: Path) -> None:
        reference = self._moving_reference()
        if reference is None:
            return
        parameters = dict(reference.named_parameters())
        if any(hasattr(p, "ds_id") for p in parameters.values()):
            logger.warning(
                "the reference that sync_ref_model moves is sharded and not in the checkpoint: a resume "
                "would begin with the initial one"
            )
        elif any(is_split(p) for p in parameters.values()):
            whole = {
                n: w.cpu()
                for n, w in ((n, gathered(p)) for n, p in parameters.items())
                if self.args.should_save
            }
            if self.args.should_save:
                save_file(whole, folder / _REFERENCE)
        elif self.args.should_save:
            save_model(reference, str(folder / _REFERENCE))

    def _load_reference(self, folder: Path) -> None:
        reference = self._moving_reference()
        if reference is None:
            return
        parameters = dict(reference.named_parameters())
        if (folder / _REFERENCE).exists() and any(is_split(p) for p in parameters.values()):
            saved = load_file(folder / _REFERENCE)
            for name, parameter in parameters.items():
                rows, first = rows_here(parameter.data)
                rows.copy_(saved[name][first:][: len(rows)])
            return
        if (folder / _REFERENCE).exists():
            load_model(reference, folder / _REFERENCE)
            return
        logger.warning(
            "%s does not hold the reference that sync_ref_model has moved: it is the initial one again",
            folder,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is None:  # uploads follow the rename
            super()._push_from_checkpoint(checkpoint_folder)

    @contextlib.contextmanager
    def _stage(self, folder: Path) -> Iterator[None]:
        self._staging = folder
        try:
            yield
        finally:
            self._staging = None

    def _correct_best_checkpoint(self, run_dir: Path, before: str | None) -> None:
        """Point ``best_model_checkpoint`` at its final place; transformers looked in the staging folder."""
        self.state.best_model_checkpoint = before
        if self.state.best_global_step:
            best = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            if best.exists() or self.state.best_global_step == self.state.global_step:
                self.state.best_model_checkpoint = str(best)

    # ---- resuming ---------------------------------------------------------------------------------------

    def train(
        self, resume_from_checkpoint: str | os.PathLike[str] | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Train as the trainer does, from a checkpoint only if it is as it was written.

        Raises:
            CheckpointError: It is damaged.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = newest_checkpoint(str(self.args.output_dir)) or True
        if isinstance(resume_from_checkpoint, (str, os.PathLike)):
            folder = Path(resume_from_checkpoint)
            resume_from_checkpoint = str(folder)
            if folder.is_dir() and (found := damage(folder)):
                raise CheckpointError(refusal(folder, found))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with _loading(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _loading(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _loading(checkpoint):
            self._load_all_state(checkpoint)

    def _load_all_state(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        self._load_reference(Path(checkpoint))
        own, first = (Path(checkpoint) / _state_file(rank) for rank in (self.args.process_index, 0))
        path = own if own.exists() else first  # a rank that the run did not have: methods agree on all ranks
        if path.exists():
            self.load_extra_state(torch.load(path, map_location="cpu", weights_only=True))
            return
        logger.warning(
            "%s holds no posttrain state (plain TRL wrote it, or save_only_model was set): the resume is "
            "exact only on a generation boundary, and methods start anew.",
            checkpoint,
        )
        self._restart_rollouts()

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        """Return (epoch, micro-steps in it) to go on from."""
        with _loading(resume_from_checkpoint):
            position: tuple[int, int] = super()._init_training_state(
                max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
            )
        stream = num_train_epochs == sys.maxsize
        if resume_from_checkpoint is None or not stream or self.args.ignore_data_skip:
            return position
        # transformers takes a stream for one endless epoch and would skip past its end; what it logs as the
        # epoch is its number plus the part of max_steps taken in it
        saved = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / TRAINER_STATE_NAME))
        epoch = max(math.ceil(saved.epoch or 0.0) - 1, 0)
        done = ((saved.epoch or 0.0) - epoch) * saved.max_steps * self.args.gradient_accumulation_steps
        return epoch, round(done)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # resumed from its last checkpoint, a finished run would take one step more
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        epoch, checkpoint = kwargs["epoch"], kwargs["resume_from_checkpoint"]
        _set_epoch(kwargs["train_dataloader"], epoch)
        if checkpoint is not None and epoch == kwargs["epochs_trained"]:
            if kwargs["steps_trained_in_current_epoch"] > 0:
                # samplers without a generator of their own draw the epoch's order now
                torch.set_rng_state(self._epoch_start)
            else:
                self._load_rng_state(checkpoint)
        self._epoch_start = torch.get_rng_state()
        super()._run_epoch(*args, **kwargs)


@contextlib.contextmanager
def _loading(checkpoint: str | None) -> Iterator[None]:
    """Name the file where loading fails because its bytes have changed; other errors stay what they are."""
    try:
        yield
    except Exception as error:
        found = None if checkpoint is None else damage(Path(checkpoint), deep=True)
        if found is None:
            raise
        raise CheckpointError(refusal(Path(str(checkpoint)), found)) from error


def _set_epoch(loader: Any, epoch: int) -> None:
    """Tell the samplers under a data loader which epoch begins.

    accelerate looks two wrappers deep only; a resumed loader on several ranks has three.
    """
    layers = [loader]
    while layers:
        layer = layers.pop()
        if layer is not loader and hasattr(layer, "set_epoch"):
            layer.set_epoch(epoch)
        inner = (getattr(layer, name, None) for name in ("batch_sampler", "sampler"))
        layers += [sampler for sampler in inner if sampler is not None]


def _state_file(rank: int) -> str:
    return f"posttrain_state_{rank}.pt"


def _plain_logs(logs: dict[str, Any]) -> dict[str, Any]:
    """Return TRL's table of the latest completions as plain lists; images are left to the next generation."""
    plain: dict[str, Any] = {
        name: _plain(list(logs[name])) for name in ("prompt", "completion", "advantages")
    }
    for name in ("rewards", "extra"):
        plain[name] = {column: _plain(list(values)) for column, values in logs[name].items()}
    return plain


def _plain(value: Any) -> Any:
    """Return ``value`` in types that a safe load accepts; user-logged objects become their text."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()  # scalars of numpy and torch
    return value if value is None or type(value) in (str, int, float, bool) else str(value)


def _restore_logs(logs: dict[str, Any], plain: dict[str, Any]) -> None:
    for name in ("prompt", "completion", "advantages"):
        logs[name].clear()
        logs[name].extend(plain[name])
    for name in ("rewards", "extra"):
        for column, values in plain[name].items():
            logs[name][column] = deque(values, maxlen=logs["prompt"].maxlen)


def _to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _to_device(item, device) for key, item in value.items()}
    if isinstance(value, list):
        return [_to_device(item, device) for item in value]
    return value


def _replace(staged: Path, final: Path) -> None:
    """Move a complete folder into place; on a shared file system one of several nodes does it."""
    if final.exists():
        # a resumed run reached this step again: move the old folder aside before deleting it
        aside = staged.parent / f"old-{final.name}"
        final.rename(aside)
    try:
        staged.rename(final)
    except FileNotFoundError:
        if not final.exists():
            raise
    shutil.rmtree(staged.parent, ignore_errors=True)


def _flush_to_disk(folder: Path) -> None:
    """Ask the operating system to write the files out, so that a power cut cannot empty a renamed folder."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
