"""`AXIOM_Trainer`: trains a model with `AXIOM`, validates, and keeps checkpoints and results (docs/axiom.md).

with AXIOM_Trainer(model, train_loader, val_loader, lr=5e-4) as trainer:
    results = trainer.fit(1000)  # also written as axiom.json and axiom.png
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable
from dataclasses import asdict
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .checks import AnomalyError
from .optimizer import AXIOM
from .trainer_batches import Batches, counted, in_eval_mode, loss_of, on_device
from .trainer_files import (
    check_random,
    check_weights,
    check_writable,
    read_checkpoint,
    with_own_settings,
    write_checkpoint,
)
from .trainer_results import Course, check_course, figures, write_results

LARGEST_LOSS = 709  # beyond it exp is infinite in float64


class AXIOM_Trainer:
    """Trains a model for a number of steps, with little memory beside its weights.

    Args:
        model: called as model(input_ids, labels=labels); returns a scalar or an object with `.loss`. Its
            parameters that require a gradient are trained.
        train_loader: of batches, begun again when it is exhausted. A batch is a pair (input_ids, labels) or a
            dict with these keys; the other keys of a dict are given to the model by name. Without labels,
            or of input_ids alone, labels are input_ids, and -100, which a loss leaves out, where a dict's
            attention_mask is 0. The model has to shift them by one, as causal ones of transformers do.
        val_loader: the same, for validation.
        lr: learning rate, after a linear warm-up constant. It may be set between calls of `fit`.
        weight_decay, max_grad_norm, rank: of `AXIOM`.
        eval_interval: steps from one validation to the next; the first is before any step, and each `fit`
            ends with one. 0: these only.
        log_interval: steps from one printed line to the next; 0: nothing is printed.
        checkpoint_interval: steps from one checkpoint to the next; 0: none.
        checkpoint_dir: folder of the checkpoints, `<results_prefix>_step_<step>.pt`.
        save_results: whether `fit` writes `<results_prefix>.json` and `<results_prefix>.png` in the end.
        device: where to train; without it where the model is, or on CUDA if the model is on the CPU and there
            is one.
        hooks: whether the weights move inside backward, and gradients live one tensor at a time.
        warmup_steps: at step t of them the learning rate is lr·t/warmup_steps.
        lr_scale: of the hooks, see `AXIOM.register_hooks`.
        results_dir: folder of the results.

    A checkpoint does not hold the position of `train_loader`: after `load_checkpoint` it is begun anew. Give
    one that starts at the batch of `trainer.step`, and a resumed run has the bits of one that was never
    interrupted: the loader draws from a random stream of its own, and validation changes no stream.

    Raises:
        ValueError: a setting out of its range, or a model without anything to train.
    """

    def __init__(
        self,
        model: nn.Module,
        train_loader: Iterable[Any],
        val_loader: Iterable[Any] | None = None,
        lr: float = 5e-4,
        weight_decay: float = 0.01,
        max_grad_norm: float | None = None,
        eval_interval: int = 200,
        log_interval: int = 100,
        checkpoint_interval: int = 0,
        checkpoint_dir: str | os.PathLike[str] = "checkpoints",
        save_results: bool = True,
        results_prefix: str = "axiom",
        device: str | torch.device | None = None,
        *,
        hooks: bool = True,
        warmup_steps: int = 100,
        lr_scale: float = 1.0,
        rank: int = 0,
        results_dir: str | os.PathLike[str] = ".",
    ):
        self.model = model
        self.val_loader = val_loader
        self.lr = lr
        self.eval_interval = eval_interval
        self.log_interval = log_interval
        self.checkpoint_interval = checkpoint_interval
        self.checkpoint_dir = Path(checkpoint_dir)
        self.save_results = save_results
        self.results_prefix = results_prefix
        self.warmup_steps = warmup_steps
        self.lr_scale = lr_scale
        self.results_dir = Path(results_dir)
        self._check_settings(hooks)
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        if not trained:
            raise ValueError("no parameter of the model requires a gradient: unfreeze what is to be trained.")
        self.device = chosen_device(device, trained[0][1].device)
        self.optimizer = AXIOM(trained, lr, weight_decay, max_grad_norm, rank=rank)
        model.to(self.device)
        self._course = Course()
        self._batches = Batches(train_loader)
        self._usage: dict[str, float] | None = None  # the optimizer's, once cleaned up
        if hooks:
            self.optimizer.register_hooks(lr_scale)

    def __enter__(self) -> AXIOM_Trainer:
        return self

    def __exit__(self, *_: object) -> None:
        self.cleanup()

    @property
    def step(self) -> int:
        """Count the steps taken, those before a resumption included."""
        return len(self._course.train_losses)

    # -- training --------------------------------------------------------------------------------------------

    def fit(self, steps: int) -> dict[str, Any]:
        """Train for `steps` more steps; return `results()`, which are written too, if they are to be saved.

        Raises:
            AnomalyError: a loss or a gradient is not finite. No result is written, `results()` has what was
                reached, and the weights are those of the last step; but under hooks tensors with a finite
                gradient have moved where another's was not.
            ValueError: steps is below 1, or a batch, a loss or a loader cannot be used, or is empty.
            OSError: a folder that is needed cannot be written.
            ImportError: results are to be saved, and matplotlib is missing.
        """
        self._refuse_cleaned()
        check_count("steps", steps, 1)
        # whether the results can be written is asked before hours of training
        if self.save_results:
            check_writable("results_dir", self.results_dir)
            if find_spec("matplotlib") is None:
                raise ImportError(
                    "matplotlib, which draws the results, is missing: install it, or set save_results=False."
                )
        if self.checkpoint_interval:
            check_writable("checkpoint_dir", self.checkpoint_dir)
        target = self.step + steps
        began = time.perf_counter() - self._course.wall_s
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        try:
            if not self._course.val_steps:
                self._validate()
            self.model.train()
            while self.step < target:
                self._train_step()
                if due(self.step, self.log_interval):
                    self._log(target)
                if due(self.step, self.eval_interval) or self.step == target:
                    self._validate()
                self._course.wall_s = time.perf_counter() - began
                if due(self.step, self.checkpoint_interval):
                    self.save_checkpoint()
        except BaseException:
            self._set_hooks(self.optimizer.hooked)
            raise
        results = self.results()
        if self.save_results:
            write_results(results, self.results_dir, self.results_prefix)
        return results

    def _train_step(self) -> None:
        began = time.perf_counter()
        input_ids, labels, others = on_device(self._batches.next(), self.device)
        step = self.step + 1
        self.optimizer.set_lr(self.lr * min(1.0, step / max(1, self.warmup_steps)))
        loss = loss_of(self.model(input_ids, labels=labels, **others))
        value = loss.item()
        if not math.isfinite(value):
            raise AnomalyError(
                f"the loss of step {step} is {value}: the weights are those of step {step - 1}. "
                "Lower the learning rate, or look at the batch."
            )
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        course = self._course
        course.train_losses.append(value)
        course.tokens += input_ids.numel()
        course.train_s += time.perf_counter() - began
        course.peak_gradient_bytes = max(course.peak_gradient_bytes, self.optimizer.peak_gradient_bytes)
        if self.device.type == "cuda":
            reached = torch.cuda.max_memory_allocated(self.device)
            course.peak_vram_bytes = max(course.peak_vram_bytes or 0, reached)

    def _set_hooks(self, wanted: bool) -> None:
        """Register the hooks anew, or remove them; nothing is left of a step that broke off."""
        self.optimizer.remove_hooks()
        self.optimizer.zero_grad()
        if wanted:
            self.optimizer.register_hooks(self.lr_scale)

    def _log(self, target: int) -> None:
        recent = self._course.train_losses[-self.log_interval :]
        speed = self._course.tokens / self._course.train_s
        print(
            f"step {self.step:>6}/{target}  loss {sum(recent) / len(recent):.4f}  "
            f"lr {self.optimizer.get_lr():.2e}  {speed:,.0f} tokens/s",
            flush=True,
        )

    # -- validation ------------------------------------------------------------------------------------------

    def _validate(self) -> None:
        """Add a point to the validation curve, where there is a loader for it."""
        if self.val_loader is None:
            return
        loss, ppl = self.evaluate()
        self._course.val_losses.append(loss)
        self._course.val_steps.append(self.step)
        self._course.val_ppls.append(ppl)
        if self.log_interval:
            print(f"step {self.step:>6}  validation loss {loss:.4f}  perplexity {ppl:.4g}", flush=True)

    @torch.no_grad()
    def evaluate(self, max_batches: int | None = None) -> tuple[float, float]:
        """Return (loss, perplexity) on the validation loader, or its first batches, not disturbing training.

        The mean over labels other than -100. A model that shifts labels has one fewer in each row, which
        matters only where rows differ in length.

        Raises ValueError: max_batches is below 1, or there are no validation data.
        """
        if max_batches is not None:
            check_count("max_batches", max_batches, 1)
        if self.val_loader is None:
            raise ValueError("there is no val_loader to evaluate on: give the trainer one.")
        total, weight = 0.0, 0
        devices = [self.device] if self.device.type == "cuda" else []
        with in_eval_mode(self.model), torch.random.fork_rng(devices):
            for batch in islice(self.val_loader, max_batches):
                input_ids, labels, others = on_device(batch, self.device)
                count = counted(labels)
                if count:  # the mean over no label is NaN
                    total += count * loss_of(self.model(input_ids, labels=labels, **others)).item()
                    weight += count
        if not weight:
            raise ValueError(
                "val_loader has no batch with labels: give one that is not empty and can be iterated again."
            )
        loss = total / weight
        return loss, math.inf if loss > LARGEST_LOSS else math.exp(loss)

    # -- results and checkpoints -----------------------------------------------------------------------------

    def results(self) -> dict[str, Any]:
        """Return what has been reached. A figure that is not finite, or does not exist yet, is None.

        train_improvement_pct compares the losses of the first and the last step; val_improvement_pct the
        perplexities. tokens_per_sec counts input_ids, and training steps only. compression_*: times smaller
        than AdamW's in float32. peak_vram_gb is in units of 1e9 bytes: of a GPU's memory, so 0.0 on a CPU.
        """
        return figures(self._course, self._usage or self.optimizer.memory_usage(verbose=False))

    def save_checkpoint(self, step: int | None = None, path: str | os.PathLike[str] | None = None) -> Path:
        """Write model, optimizer, curves, random states and whether there are hooks; return the file.

        Args:
            step: the number in the file's name, by default of the steps taken.
            path: another name.

        The file is complete or not there; its checksum precedes what torch.save writes. Raises OSError when
        it cannot be written.
        """
        self._refuse_cleaned()
        name = f"{self.results_prefix}_step_{self.step if step is None else step}.pt"
        place = self.checkpoint_dir / name if path is None else Path(path)
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "curves": asdict(self._course),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "loader_rng": self._batches.rng,
            "hooks": self.optimizer.hooked,
        }
        write_checkpoint(place, state)
        return place

    def load_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Continue as the trainer that wrote the checkpoint, with hooks if it had them; nothing is executed.

        Learning rate, weight decay, limits and intervals stay those of this trainer; train_loader is begun
        anew.

        Raises:
            ValueError: the file is damaged, or of another model or rank; nothing has changed.
            OSError: it cannot be read.
        """
        self._refuse_cleaned()
        state = read_checkpoint(Path(path))
        try:
            course = Course(**state["curves"])
            check_course(course)
            check_weights(state["model"], self.model.state_dict())
            optimizer = with_own_settings(state["optimizer"], self.optimizer)
            check_random(state, self.device)
            hooks = state["hooks"]
        except (LookupError, TypeError, AttributeError, RuntimeError, ValueError) as error:
            why = " ".join(str(error).split())
            raise ValueError(
                f"{path} is not of this trainer ({why}): build model and trainer as they were when it was "
                "written."
            ) from None
        self._set_hooks(hooks)  # which may refuse: before anything else
        self.optimizer.load_state_dict(optimizer)
        self.model.load_state_dict(state["model"])
        self._course = course
        self._batches.begin_anew(state["loader_rng"])
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)

    # -- the end, and what is refused ------------------------------------------------------------------------

    def cleanup(self) -> None:
        """Remove the hooks and free the optimizer's state. The model and `results()` stay; `fit` does not."""
        if self._usage is not None:
            return
        self._usage = self.optimizer.memory_usage(verbose=False)
        self._set_hooks(False)
        self.optimizer.state.clear()
        self._batches.begin_anew(None)

    def _refuse_cleaned(self) -> None:
        if self._usage is not None:
            raise RuntimeError("this trainer was cleaned up, its optimizer's state is gone: make a new one.")

    def _check_settings(self, hooks: bool) -> None:
        for name in ("eval_interval", "log_interval", "checkpoint_interval", "warmup_steps"):
            check_count(name, getattr(self, name), 0)
        if self.lr_scale != 1 and not hooks:
            raise ValueError(
                f"lr_scale={self.lr_scale} acts under hooks only: set hooks=True, or leave it at 1."
            )
        if not self.results_prefix or Path(self.results_prefix).name != self.results_prefix:
            raise ValueError(
                f"results_prefix={self.results_prefix!r} must be the beginning of a file's name, without a "
                "folder: name that in results_dir."
            )


def chosen_device(wanted: str | torch.device | None, models: torch.device) -> torch.device:
    """Choose where to train, CUDA with its number."""
    device = torch.device(wanted) if wanted is not None else models
    if wanted is None and models.type == "cpu" and torch.cuda.is_available():
        device = torch.device("cuda")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def due(step: int, interval: int) -> bool:
    """Tell whether a step ends an interval; never of an interval of 0."""
    return interval > 0 and step % interval == 0


def check_count(name: str, value: Any, least: int) -> None:
    """Raise ValueError unless the value is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}.")
