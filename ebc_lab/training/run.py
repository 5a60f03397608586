"""One run: build, loop, evaluate, checkpoint, classify the outcome.

A run is resumed from `checkpoint.pt` to the same weights, bit for bit on a CPU: batches and initial weights are functions of
the seed, everything else that the next step depends on is in the checkpoint.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ebc_lab import workloads
from ebc_lab.components import optimizers, projections, shocks, stabilizers
from ebc_lab.components.schedules import lr_schedule
from ebc_lab.config.errors import UserError
from ebc_lab.config.identity import digest, identity, resolve_controller
from ebc_lab.config.schema import RunConfig, ShockConfig
from ebc_lab.ebc import EllipsotopeClip, NonFiniteUpdateError, StabilizedOptimizer
from ebc_lab.ebc.flat import lay_flat
from ebc_lab.ebc.options import BOUNDED
from ebc_lab.records.columns import EVAL_COLUMNS, STEP_COLUMNS
from ebc_lab.records.figures import recovery, summarise
from ebc_lab.records.files import write_atomic
from ebc_lab.records.paths import RunFiles
from ebc_lab.records.streams import Stream, read_columns
from ebc_lab.workloads.batches import Batches, overlapping_windows, windows
from ebc_lab.workloads.losses import evaluate

from .graphs import StepGraphs
from .pending import Packed, PendingSteps, Values
from .process import forward_of, set_up_torch
from .recording import COUNTED, RECORDED, recorded

SKIPS_TO_DIVERGE = 10  # consecutive skipped steps
HELD_SHARE = 0.02  # of the training text, its end, where the budget is measured on held-back text
FLUSH_STEPS = 50  # steps between flushes of the streams, so that a reader can follow
BLOCK_STEPS = {"cpu": 1, "cuda": 50}  # steps between two readings of what the device has computed
KEPT_OF_FAILED = ("loss",)  # of the record of a step that ended the run
KEPT_OF_BAD_GRADIENT = ("loss", "delta", "target_kl", "radius", "grad_norm")


T = TypeVar("T")
Progress = Generator[
    None, None, dict[str, Any]
]  # of a run: it yields between blocks of steps, and its value is the result


class Interrupted(Exception):
    """The run was asked to stop; its checkpoint is written."""


def to_the_end(progress: Generator[None, None, T]) -> T:
    """The value of a run that has nobody to give way to."""
    while True:
        try:
            next(progress)
        except StopIteration as end:
            value: T = end.value
            return value


class Training:
    """The state of one run in its folder. `run()` carries it to its end, from the checkpoint if there is one."""

    def __init__(self, run: RunConfig, directory: Path):
        self.run_config = run = resolve_controller(run)
        self.directory = directory
        self.identity = digest(identity(run))
        set_up_torch(run)
        device = torch.device(run.device)
        # each run of a process works on a stream of its own, so that several share the GPU
        self.stream = torch.cuda.Stream() if run.device == "cuda" else None
        with self._on_stream():
            self._build(run, device)

    def _on_stream(self) -> Any:
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def _build(self, run: RunConfig, device: torch.device) -> None:
        directory = self.directory
        self.workload = workloads.load(run, device)
        self.tokens = self.workload.tokens
        self.model = self.workload.build().to(device, getattr(torch, run.param_dtype))
        lay_flat(self.model.parameters())
        matrices = self.workload.matrices(self.model)
        projection = projections.build(matrices, run.projection)  # first: it may move the initial weights
        bases = optimizers.build(self.model, run.optimizer, matrices)
        self.forward = forward_of(self.model, run)
        self.optimizer: StabilizedOptimizer = stabilizers.build(
            self.model, bases, projection, run, self.forward
        )
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
        self.step, self.skips, self.train_s, self.wall_s = 0, 0, 0.0, 0.0
        self.pending = PendingSteps(BLOCK_STEPS[run.device], device)
        self.rates: list[float] = []  # the learning rate of each pending step
        self.failure: str | None = None  # an update refused at the last pending step
        self.rate = torch.zeros((), device=device)  # where a graph looks for the learning rate
        self.starts = torch.zeros(run.batch_size, dtype=torch.int64, device=device)  # … and for the batch
        capturable = (
            run.optimizer.name in optimizers.CAPTURABLE
            and self.workload.capturable
            and self.probe_batches is None
        )
        self.graphs = StepGraphs() if self.stream is not None and capturable else None
        self.alive: Callable[[], None] = lambda: None
        torch.manual_seed(run.seed)  # dropout
        self._load_checkpoint()
        sensing = run.budget.name in BOUNDED or run.budget.sensitivity_every
        self.groups: list[str] = (
            list(self.optimizer.groups) if isinstance(self.optimizer, EllipsotopeClip) and sensing else []
        )
        extra = [f"{kind}_{g}" for kind in ("s", "beta") for g in self.groups]
        self.steps = Stream(RunFiles(directory).steps, [*STEP_COLUMNS, *extra], self.step)
        self.evals = Stream(RunFiles(directory).evals, EVAL_COLUMNS, self.step + 1 if self.step else 0)

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
        with self._on_stream():
            torch.save(state, buffer)
        write_atomic(RunFiles(self.directory).checkpoint, buffer.getvalue())

    def _load_checkpoint(self) -> None:
        path = RunFiles(self.directory).checkpoint
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
            raise UserError(
                f"{path} belongs to another run: delete it, and this run starts from its first step."
            )
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
                begin = self.step
                self.take_steps(run.eval_every - begin % run.eval_every)
                if self.stream is not None:
                    yield  # the device is busy: another run's turn to fill it
                cause = self.record_steps()
                now = time.perf_counter()
                self.train_s += now - started
                if cause:
                    break
                if self.step % run.eval_every == 0 or self.step == run.steps:
                    self._record_evaluation()
                if self.step // FLUSH_STEPS > begin // FLUSH_STEPS:
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
                if self.stream is None:
                    yield
            result = self._finish(cause)
            result["wall_s"] = before + time.perf_counter() - begun
            return result
        finally:
            self.steps.close()
            self.evals.close()

    def advance(self, count: int) -> str | None:
        """Take and record `count` steps, without evaluations; returns the cause if the run has diverged."""
        end, cause = min(self.step + count, self.run_config.steps), None
        while self.step < end and not cause:
            self.take_steps(end - self.step)
            cause = self.record_steps()
        return cause

    def take_steps(self, most: int) -> None:
        """Have the device take up to `most` steps, a block at the most; `record_steps` reads what they were."""
        with self._on_stream():
            while (
                len(self.pending) < min(most, self.pending.capacity, self.run_config.steps - self.step)
                and not self.failure
            ):
                self._take_step(self.step + len(self.pending))

    def _take_step(self, step: int) -> None:
        run = self.run_config
        shock = run.shock if shocks.strikes(run, step) else None
        lr = shocks.learning_rate(shock, self.lr_at(step))
        t = self.optimizer.begin_step()
        kind = self.optimizer.kind(t) if self.graphs and not shock else None
        graphed = self.graphs is not None and self.graphs.wants(kind)
        self.optimizer.deferred = graphed
        self.rates.append(lr)
        if self.graphs is not None:
            self.rate.fill_(lr)
            lr = self.rate  # type: ignore[assignment]
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if graphed:
            assert self.graphs is not None
            self.starts.copy_(self.batches.starts_at(step))
            self.pending.add(
                self.graphs.run(kind, lambda: Packed.of(self._computed(t, *self.batches.rows(self.starts))))
            )
            return
        inputs, targets = self.batches.at(step)
        targets = shocks.targets(shock, targets, self.workload.vocabulary, run.seed)
        self.pending.add(self._computed(t, inputs, targets, shock))

    def _computed(self, t: int, inputs: Tensor, targets: Tensor, shock: ShockConfig | None = None) -> Values:
        """Forward, backward and update of step `t` -> all that is to be recorded of it, on the device."""
        run = self.run_config
        logits = self.workload.forward(self.forward, inputs)
        loss = self.workload.loss(logits, targets)
        loss.backward()
        shocks.gradients(shock, self.model, run.seed)
        values = {"loss": loss.detach()}
        try:
            probe = self.probe_batches.at(t) if self.probe_batches else None
            stats = self.optimizer.take_step(t, inputs, logits, targets=targets, probe=probe)
        except NonFiniteUpdateError as error:
            self.failure = str(error)
            return values
        finally:
            self.optimizer.zero_grad()
        return {**values, **recorded(stats)}

    def record_steps(self) -> str | None:
        """Read and record the steps that were taken; returns the cause if the run has diverged at one of them."""
        with self._on_stream():
            taken = self.pending.take()
        rates, failure = self.rates, self.failure
        self.rates, self.failure = [], None
        for i, (found, lr) in enumerate(zip(taken, rates, strict=True)):
            step, loss = self.step, found["loss"]
            self.step += 1
            assert isinstance(loss, float)
            cause = failure if i == len(taken) - 1 else None
            if found.get("failed"):
                cause = f"step {step}: the optimizer proposed a non-finite update."
            if not math.isfinite(loss):
                cause = f"the loss is {loss} at step {step}"
            self._record_step(step, lr, found, failed=cause is not None)
            if cause:
                return cause
            self.skips = self.skips + 1 if found["skipped"] else 0
            if self.skips >= SKIPS_TO_DIVERGE:
                return f"{SKIPS_TO_DIVERGE} steps in a row were skipped, the last at step {step}"
        return None

    def _record_step(self, step: int, lr: float, found: dict[str, Any], *, failed: bool) -> None:
        c = 0.0 if failed else found["clip_coefficient"]
        skipped = failed or bool(found["skipped"])
        if failed or found["bad_gradient"]:
            kept = KEPT_OF_FAILED if failed else KEPT_OF_BAD_GRADIENT
            found = {name: found[name] for name in kept if name in found}
        row: dict[str, Any] = {"step": step, "lr": lr, "c": c, "eta_eff": c * lr, "skipped": skipped}
        for column, name in RECORDED.items():
            value = found.get(name)
            if value is not None and (value == value or name == "loss"):  # NaN: not measured
                row[column] = int(value) if column in COUNTED else value
        for kind, values in (("s", found.get("contributions")), ("beta", found.get("sensitivities"))):
            if values is not None:
                row |= {
                    f"{kind}_{g}": v for g, v in zip(self.groups, values, strict=True) if not math.isnan(v)
                }
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
        with self._on_stream():
            self.optimizer.eval()
            try:
                return evaluate(self.model, self.run_config, pairs, self.alive)
            finally:
                self.optimizer.train()

    def _finish(self, cause: str | None) -> dict[str, Any]:
        run = self.run_config
        self.steps.sync()
        self.evals.sync()
        steps = read_columns(RunFiles(self.directory).steps)
        figures = summarise(steps)
        initial, last = figures["initial_loss"], figures["last_loss"]
        if cause is None and last is not None and last > initial:
            cause = f"the mean loss of the last {min(50, run.steps)} steps, {last:.3f}, is above the initial loss, {initial:.3f}"
        evaluated: dict[str, dict[str, float]] = {}
        if cause is None:
            for split in run.evaluate:
                whole = windows(self.tokens[split], run.model.context)
                few = run.final_windows
                pairs = overlapping_windows(self.tokens[split], run.model.context, few) if few else whole
                evaluated[split] = self._evaluate(pairs)
            if not all(math.isfinite(e["loss"]) for e in evaluated.values()):
                cause, evaluated = "the loss is not finite on held-out text", {}
        result: dict[str, Any] = {
            "outcome": "diverged" if cause else "completed",
            "cause": cause,
            "steps": self.step,
        }
        for split in ("val", "test"):
            found = evaluated.get(split)
            result[f"{split}_loss"] = found["loss"] if found else None
            result[f"{split}_se"] = found["se"] if found else None
        if {"val", "test"} <= set(evaluated):
            weight = {k: v["tokens"] for k, v in evaluated.items()}
            result["heldout_loss"] = sum(evaluated[k]["loss"] * w for k, w in weight.items()) / sum(
                weight.values()
            )
        test = evaluated.get("test")
        result["test_bits_per_char"] = test["loss"] / math.log(2) if test else None
        result["test_accuracy"] = test["accuracy"] if test else None
        result |= figures
        result["guard_count"] = (
            self.optimizer.guard.count if isinstance(self.optimizer, EllipsotopeClip) else 0
        )
        if run.shock.name != "none":
            result |= recovery(steps["loss"], shocks.step_of(run))
        curve = read_columns(RunFiles(self.directory).evals)
        result["curve"] = np.stack([curve[k] for k in ("step", "val_loss", "train_s")], 1).tolist()
        trained = self.step * run.batch_size * run.model.context
        result["tokens_per_s"] = trained / self.train_s if self.train_s else None
        result["probe_pct"] = 100 * self.optimizer.prober.seconds / self.train_s if self.train_s else None
        result["train_s"] = self.train_s
        return result
