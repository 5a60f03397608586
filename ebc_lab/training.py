"""One run: build, loop, evaluate, checkpoint, classify the outcome.

A run is resumed from `checkpoint.pt` to the same weights, bit for bit on a CPU: batches and initial weights are functions of
the seed, everything else that the next step depends on is in the checkpoint.
"""

from __future__ import annotations

import ctypes
import errno
import io
import math
import time
import traceback
from collections.abc import Callable, Generator, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import model as models
from . import optimizers, projections, shocks, stabilizers
from .config import RunConfig, UserError, digest, identity, resolve_controller
from .data import Batches, check_length, locate, overlapping_windows, windows
from .ebc import EllipsotopeClip, NonFiniteUpdateError, StabilizedOptimizer, StepStats
from .schedules import lr_schedule
from .telemetry import (
    EVAL_COLUMNS,
    STEP_COLUMNS,
    Stream,
    read_columns,
    read_sealed,
    recovery,
    summarise,
    write_sealed,
    write_whole,
)

SKIPS_TO_DIVERGE = 10  # consecutive skipped steps
EVAL_TOKENS = 2048  # tokens of one evaluation forward
HELD_SHARE = 0.02  # of the training text, its end, where the budget is measured on held-back text
COMPILED_SHAPES = 256  # and modes, that one process may compile a model for
FLUSH_STEPS = 50  # steps between flushes of the streams, so that a reader can follow


Progress = Generator[None, None, dict[str, Any]]  # of a run: it yields between blocks of steps, and its value is the result


class Interrupted(Exception):
    """The run was asked to stop; its checkpoint is written."""


class DeviceFailed(Exception):
    """The GPU under a run is gone or broken; says how. Another process may carry the run on."""


def set_up_torch(run: RunConfig) -> None:
    """Threads as the run's identity says: the thread count changes bits on a CPU."""
    if torch.get_num_threads() != run.threads_per_run:
        torch.set_num_threads(run.threads_per_run)
    keep_freed_memory()


def keep_freed_memory() -> None:
    """Tell glibc to keep what a step frees for the next one.

    Left alone it gives activations back to the system and takes page faults to get them again: thousands a step, a tenth of
    the step's time, more or less by chance of the heap's layout. Elsewhere than on glibc this does nothing.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    for parameter, value in ((-1, 2**31 - 1), (-3, 32 << 20)):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD at its largest
        mallopt(parameter, value)


def autocast(run: RunConfig) -> Any:
    """A fresh context for one forward: float32, or bfloat16 autocast with float32 parameters."""
    return torch.autocast(run.device, torch.bfloat16) if run.dtype == "bfloat16" else nullcontext()


def forward_of(model: nn.Module, run: RunConfig) -> nn.Module:
    """What training calls: the model, or under `compile=on` the model compiled, anew for each shape it meets.

    Those are the step's, the probe rows' and the audited rows' (some seconds each, once a process); evaluations, whose last
    batches have shapes of their own, call the model, and so does a run whose stabilizer listens to layers.
    """
    if run.compile != "on" or run.stabilizer.name in stabilizers.HOOKED:
        return model
    # beyond this limit it would go back to eager in silence: what a run computes would hang on the runs before it
    torch._dynamo.config.recompile_limit = COMPILED_SHAPES
    return torch.compile(model, dynamic=False)  # type: ignore[return-value]


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each token in float32; (B, T, V) and (B, T) -> (B·T,), nats."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")


@torch.no_grad()
def evaluate(
    model: nn.Module, run: RunConfig, pairs: Iterable[tuple[Tensor, Tensor]], alive: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Mean loss over disjoint windows, its standard error with windows as the sampling unit, accuracy, token count.

    `alive` is called now and then: a whole split may take a while.
    """
    sums, counts, hits = [], [], 0
    model.eval()
    for inputs, targets in pairs:
        rows = max(1, EVAL_TOKENS // inputs.shape[1])
        for start in range(0, len(inputs), rows):
            x, y = inputs[start : start + rows], targets[start : start + rows]
            with autocast(run):
                logits = model(x)
            sums.append(token_losses(logits, y).view(y.shape).double().sum(1).cpu())
            counts.append(torch.full((len(y),), float(y.shape[1]), dtype=torch.float64))
            hits += int((logits.argmax(-1) == y).sum())
            alive()
    model.train()
    total, n = torch.cat(sums), torch.cat(counts)
    tokens, k = float(n.sum()), len(n)
    mean = float(total.sum()) / tokens
    spread = float((total - n * mean).square().sum())
    se = math.sqrt(spread * k / (k - 1)) / tokens if k > 1 else math.nan
    return {"loss": mean, "se": se, "accuracy": hits / tokens, "tokens": tokens}


class Training:
    """The state of one run in its folder. `run()` carries it to its end, from the checkpoint if there is one."""

    def __init__(self, run: RunConfig, directory: Path):
        self.run_config = run = resolve_controller(run)
        self.directory = directory
        self.identity = digest(identity(run))
        set_up_torch(run)
        corpus = locate(run.data, quiet=True)
        check_length(corpus, run.model.context)
        device = torch.device(run.device)
        self.tokens = {k: torch.from_numpy(v).to(device) for k, v in corpus.tokens().items()}
        self.model = models.build(run.model, len(corpus.vocabulary), run.seed).to(device, getattr(torch, run.param_dtype))
        projection = projections.build(self.model, run.projection)  # first: it may move the initial weights
        bases = optimizers.build(self.model, run.optimizer)
        self.forward = forward_of(self.model, run)
        self.optimizer: StabilizedOptimizer = stabilizers.build(self.model, bases, projection, run, self.forward)
        self.lr_at = lr_schedule(run.lr_schedule, run.optimizer.lr, run.steps, directory.parent)
        text, self.probe_batches = self.tokens["train"], None
        whole = len(text)
        if run.stabilizer.name == "ebc" and run.budget.probe_tokens == "held":
            cut = round((1 - HELD_SHARE) * len(text))
            text, held = text[:cut], text[cut:]
            if len(held) < run.model.context + 1:
                raise UserError(
                    f"the corpus is too short for budget.probe_tokens=held: {len(held)} characters would be held back and a "
                    f"window takes {run.model.context + 1}; use a longer text, or probe_tokens=train."
                )
            self.probe_batches = Batches(held, run.budget.probe_sequences, run.model.context, run.seed)
        self.batches = Batches(text, run.batch_size, run.model.context, run.seed, of=whole)
        self.fixed_windows = windows(self.tokens["val"], run.model.context, run.eval_windows)
        self.vocabulary = len(corpus.vocabulary)
        self.step, self.skips, self.train_s, self.wall_s = 0, 0, 0.0, 0.0
        self.alive: Callable[[], None] = lambda: None
        torch.manual_seed(run.seed)  # dropout
        self._load_checkpoint()
        sensing = run.budget.name in ("surrogate", "calibrated") or run.budget.sensitivity_every
        self.groups = list(self.optimizer.groups) if isinstance(self.optimizer, EllipsotopeClip) and sensing else []
        extra = [f"{kind}_{g}" for kind in ("s", "beta") for g in self.groups]
        self.steps = Stream(directory / "steps.csv", [*STEP_COLUMNS, *extra], self.step)
        self.evals = Stream(directory / "evals.csv", EVAL_COLUMNS, self.step + 1 if self.step else 0)

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def save_checkpoint(self) -> None:
        self.steps.sync()
        self.evals.sync()
        state = {
            "identity": self.identity,
            "step": self.step,
            "skips": self.skips,
            "train_s": self.train_s,
            "wall_s": self.wall_s,
            "probe_s": self.optimizer.prober.seconds,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state() if self.run_config.device == "cuda" else None,
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_whole(self.directory / "checkpoint.pt", buffer.getvalue())

    def _load_checkpoint(self) -> None:
        path = self.directory / "checkpoint.pt"
        if not path.exists():
            return
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            foreign = state["identity"] != self.identity
        except Exception as error:
            raise UserError(
                f"{path} is damaged ({type(error).__name__}): delete it, and the run starts from its first step."
            ) from None
        if foreign:
            raise UserError(f"{path} belongs to another run: delete it, and this run starts from its first step.")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.skips = state["step"], state["skips"]
        self.train_s, self.wall_s = state["train_s"], state["wall_s"]
        self.optimizer.prober.seconds = state["probe_s"]
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"])

    # -- the loop ------------------------------------------------------------------------------------------------------

    def run(self, **hooks: Any) -> dict[str, Any]:
        """Train to the end and return the result; `hooks` are those of `blocks`."""
        return to_the_end(self.blocks(**hooks))

    def blocks(
        self,
        *,
        checkpoint_every_s: float = math.inf,
        should_stop: Callable[[], bool] = lambda: False,
        on_progress: Callable[[int], None] = lambda step: None,
    ) -> Progress:
        """Train to the end, giving way (`yield`) where another run may go on; the generator's value is the result.

        Raises Interrupted, with a checkpoint written, once `should_stop()` is true.
        """
        run = self.run_config
        begun = saved = time.perf_counter()
        before, first = self.wall_s, self.step
        cause: str | None = None
        self.alive = lambda: on_progress(self.step)
        try:
            while self.step < run.steps:
                started = time.perf_counter()
                cause = self._one_step()
                now = time.perf_counter()
                self.train_s += now - started
                if cause:
                    break
                if self.step % run.eval_every == 0 or self.step == run.steps:
                    self._record_evaluation()
                if self.step % FLUSH_STEPS == 0:
                    self.steps.file.flush()
                    self.evals.file.flush()
                self.alive()
                stop = should_stop() and self.step < run.steps
                self.wall_s = before + time.perf_counter() - begun
                if (stop or now - saved >= checkpoint_every_s) and self.step > first:
                    self.save_checkpoint()
                    saved = now
                if stop:
                    raise Interrupted
                yield
            result = self._finish(cause)
            result["wall_s"] = before + time.perf_counter() - begun
            return result
        finally:
            self.steps.close()
            self.evals.close()

    def _one_step(self) -> str | None:
        """One training step; returns the cause if the run has diverged."""
        run, step = self.run_config, self.step
        shock = run.shock if shocks.strikes(run, step) else None
        lr = shocks.learning_rate(shock, self.lr_at(step))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        inputs, targets = self.batches.at(step)
        targets = shocks.targets(shock, targets, self.vocabulary, run.seed)
        with autocast(run):
            logits = self.forward(inputs)
        loss = token_losses(logits, targets).mean()
        value = loss.item()
        self.step += 1
        if not math.isfinite(value):
            self.steps.append({"step": step, "loss": value, "lr": lr, "c": 0.0, "eta_eff": 0.0, "skipped": True})
            return f"the loss is {value} at step {step}"
        loss.backward()
        shocks.gradients(shock, self.model, run.seed)
        try:
            probe = self.probe_batches.at(step) if self.probe_batches else None
            stats = self.optimizer.step(inputs, logits, targets=targets, probe=probe)
        except NonFiniteUpdateError as error:
            self.steps.append({"step": step, "loss": value, "lr": lr, "c": 0.0, "eta_eff": 0.0, "skipped": True})
            return str(error)
        self.optimizer.zero_grad()
        self._record_step(step, value, lr, stats)
        self.skips = self.skips + 1 if stats.skipped else 0
        if self.skips >= SKIPS_TO_DIVERGE:
            return f"{SKIPS_TO_DIVERGE} steps in a row were skipped, the last at step {step}"
        return None

    def _record_step(self, step: int, loss: float, lr: float, stats: StepStats) -> None:
        def number(x: Tensor | None) -> float | None:
            return None if x is None else float(x)

        c = float(stats.clip_coefficient)
        row: dict[str, Any] = {
            "step": step,
            "loss": loss,
            "lr": lr,
            "c": c,
            "eta_eff": c * lr,
            "delta": number(stats.delta),
            "target_kl": stats.target_kl,
            "radius": number(stats.radius),
            "guard": number(stats.guard),
            "trial": number(stats.trial),
            "trial_kl": number(stats.trial_kl),
            "measurements": stats.measurements or None,
            "predicted_kl": number(stats.predicted_kl),
            "calibration": number(stats.calibration),
            "slope": number(stats.slope),
            "agreement": number(stats.agreement),
            "applied_kl": number(stats.applied_kl),
            "audit_tokens": stats.audit_tokens or None,
            "movement": number(stats.movement),
            "surrogate": number(stats.surrogate),
            "tightness": number(stats.tightness),
            "grad_norm": number(stats.grad_norm),
            "grad_scale": number(stats.gradient_scale),
            "skipped": stats.skipped,
        }
        for kind, values in (("s", stats.contributions), ("beta", stats.sensitivities)):
            if values is not None:
                row |= {f"{kind}_{g}": v for g, v in zip(self.groups, values.tolist(), strict=True) if not math.isnan(v)}
        self.steps.append(row)

    def _record_evaluation(self) -> None:
        run = self.run_config
        found = self._evaluate(self.fixed_windows)
        tokens = self.step * run.batch_size * run.model.context
        self.evals.append(
            {
                "step": self.step,
                "val_loss": found["loss"],
                "val_se": found["se"],
                "tokens": tokens,
                "train_s": self.train_s,
            }
        )

    def _evaluate(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
        """`evaluate` at the weights that the optimizer is judged by."""
        self.optimizer.eval()
        try:
            return evaluate(self.model, self.run_config, pairs, self.alive)
        finally:
            self.optimizer.train()

    def _finish(self, cause: str | None) -> dict[str, Any]:
        run = self.run_config
        self.steps.sync()
        self.evals.sync()
        steps = read_columns(self.directory / "steps.csv")
        figures = summarise(steps)
        initial, last = figures["initial_loss"], figures["last_loss"]
        if cause is None and last is not None and last > initial:
            cause = (
                f"the mean loss of the last {min(50, run.steps)} steps, {last:.3f}, is above the initial loss, {initial:.3f}"
            )
        evaluated: dict[str, dict[str, float]] = {}
        if cause is None:
            for split in run.evaluate:
                whole = windows(self.tokens[split], run.model.context)
                few = run.final_windows
                pairs = overlapping_windows(self.tokens[split], run.model.context, few) if few else whole
                evaluated[split] = self._evaluate(pairs)
            if not all(math.isfinite(e["loss"]) for e in evaluated.values()):
                cause, evaluated = "the loss is not finite on held-out text", {}
        result: dict[str, Any] = {"outcome": "diverged" if cause else "completed", "cause": cause, "steps": self.step}
        for split in ("val", "test"):
            found = evaluated.get(split)
            result[f"{split}_loss"] = found["loss"] if found else None
            result[f"{split}_se"] = found["se"] if found else None
        if {"val", "test"} <= set(evaluated):
            weight = {k: v["tokens"] for k, v in evaluated.items()}
            result["heldout_loss"] = sum(evaluated[k]["loss"] * w for k, w in weight.items()) / sum(weight.values())
        test = evaluated.get("test")
        result["test_bits_per_char"] = test["loss"] / math.log(2) if test else None
        result["test_accuracy"] = test["accuracy"] if test else None
        result |= figures
        result["guard_count"] = self.optimizer.guard.count if isinstance(self.optimizer, EllipsotopeClip) else 0
        if run.shock.name != "none":
            result |= recovery(steps["loss"], shocks.step_of(run))
        curve = read_columns(self.directory / "evals.csv")
        result["curve"] = np.stack([curve[k] for k in ("step", "val_loss", "train_s")], 1).tolist()
        trained = self.step * run.batch_size * run.model.context
        result["tokens_per_s"] = trained / self.train_s if self.train_s else None
        result["probe_pct"] = 100 * self.optimizer.prober.seconds / self.train_s if self.train_s else None
        result["train_s"] = self.train_s
        return result


STORAGE_ERRORS = (errno.EIO, errno.ENOSPC, errno.EROFS, errno.ESTALE, errno.EDQUOT)
OWN_FAULT = ("device-side assert", "illegal memory access", "misaligned address")  # CUDA errors that a run's code makes
OOM = (MemoryError, torch.OutOfMemoryError)


def is_oom(error: BaseException) -> bool:
    """An exhausted device or host allocator; torch's CPU allocator says so only in words, which differ by system."""
    words = ("can't allocate memory", "not enough memory", "Cannot allocate memory")
    return isinstance(error, OOM) or (isinstance(error, RuntimeError | OSError) and any(w in str(error) for w in words))


def is_device_failure(error: BaseException) -> bool:
    """A GPU that vanished, or whose context is broken: nothing more can be done with it in this process."""
    words = ("CUDA error", "CUDNN_STATUS_INTERNAL_ERROR", "No CUDA GPUs are available")
    return isinstance(error, RuntimeError) and any(w in str(error) for w in words)


def to_the_end(progress: Progress) -> dict[str, Any]:
    """The value of a run that has nobody to give way to."""
    while True:
        try:
            next(progress)
        except StopIteration as end:
            return dict(end.value)


def run_and_record(run: RunConfig, directory: Path, run_id: str, **hooks: Any) -> dict[str, Any]:
    """`recorded_run` by itself, to its end."""
    return to_the_end(recorded_run(run, directory, run_id, **hooks))


def recorded_run(run: RunConfig, directory: Path, run_id: str, **hooks: Any) -> Progress:
    """Carry one run to an outcome and write its `result.json`; a result that is already there is returned as it is.

    A generator that gives way between blocks of steps, so that one process can carry several runs in turn.

    `hooks` go to `Training.blocks`. A crash of the run becomes its outcome (`oom` or `failed`), with the traceback in
    `log.txt`. Raises Interrupted; UserError when the folder holds another run or a damaged file, which is left as it is;
    OSError when the folder itself cannot be written; and DeviceFailed when the GPU can do no more in this process (with no
    result, unless the run's own code has broken it).
    """
    path = directory / "result.json"
    name = digest(identity(run))
    if path.exists():
        found = read_sealed(path, f"delete {directory}, and the same command trains the run again")
        if found.get("identity") != name:
            raise UserError(f"{path} is another run's result: choose another folder, or delete this one.")
        return found
    directory.mkdir(parents=True, exist_ok=True)
    log = directory / "log.txt"
    started = time.perf_counter()
    with open(log, "a") as f:
        f.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {run_id} begins or resumes\n")
    broken = False
    try:
        result = yield from Training(run, directory).blocks(**hooks)
    except (Interrupted, KeyboardInterrupt, UserError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in STORAGE_ERRORS:
            raise
        with open(log, "a") as f:
            f.write(traceback.format_exc())
        cause = f"{type(error).__name__}: {error}".splitlines()[0][:500]
        broken = is_device_failure(error) and not is_oom(error)
        if broken and not any(w in cause for w in OWN_FAULT):
            raise DeviceFailed(cause) from error
        kind = "oom" if is_oom(error) else "failed"
        result = {"outcome": kind, "cause": cause, "steps": 0, "wall_s": time.perf_counter() - started}
    result = {"run_id": run_id, "identity": name, **result}
    write_sealed(path, result)
    if result["outcome"] in ("completed", "diverged"):
        (directory / "checkpoint.pt").unlink(missing_ok=True)
    with open(log, "a") as f:
        f.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {result['outcome']} {result.get('cause') or ''}\n")
    if broken:  # the run is to blame, and no other can be trained in this process any more
        raise DeviceFailed(result["cause"])
    return result
