"""One run: build it, take its steps, evaluate, and end with a result.

A run resumes from checkpoint.pt to the same weights, bit for bit on a CPU: batches and initial weights are
functions of the seed, and everything else that the next step depends on is in the checkpoint.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ebc_lab import workloads
from ebc_lab.components import forensics, hooks_of, numerics_of, stabilizers
from ebc_lab.components import optimizer as optimizers
from ebc_lab.components import projection as projections
from ebc_lab.components.forensics import ForensicClip
from ebc_lab.components.hook import Built, Hook
from ebc_lab.components.lr_schedule import lr_schedule
from ebc_lab.config.identity import digest, identity, with_derived_settings
from ebc_lab.config.parts.budget import BudgetConfig
from ebc_lab.config.schema import RunConfig
from ebc_lab.ebc import EllipsotopeClip, NonFiniteUpdateError, StabilizedOptimizer, StepInputs
from ebc_lab.ebc.flat import lay_flat
from ebc_lab.ebc.options import BOUNDED
from ebc_lab.records.columns import CURVE_COLUMNS
from ebc_lab.records.paths import RunFiles
from ebc_lab.records.streams import holds
from ebc_lab.records.weights import About
from ebc_lab.workloads.gpt import effective_weights
from ebc_lab.workloads.losses import evaluate
from ebc_lab.workloads.starts import about_of, placed

from . import checkpoint, divergence, result
from .ends import Interrupted, Say, quiet
from .graphs import StepGraphs, why_eager
from .pending import Packed, PendingSteps, Values
from .process import OwnRandomness, forward_of, set_up_torch
from .ranks import ALONE, Ranks
from .recording import Recording, Unrecorded, recorded

FLUSH_STEPS = 50  # steps between flushes of the streams, so that a reader can follow
BLOCK_STEPS = {"cpu": 1, "cuda": 50}  # steps between two readings of what the device has computed


class Training:
    """One run in its folder, at the step of its checkpoint if there is one. `run()` trains it to its end.

    `say` is told why it starts from its first step although it had a checkpoint. `ranks`: this process among
    those that train the run; only the first one reads what comes of it, and writes. `workload`: in the place
    of the one that the run names.

    Raises UserError where the text or a replayed schedule is missing or damaged, or a checkpoint is another
    run's.
    """

    def __init__(
        self,
        run: RunConfig,
        directory: Path,
        say: Say = quiet,
        ranks: Ranks = ALONE,
        workload: workloads.Workload | None = None,
    ):
        self.run_config = run = placed(with_derived_settings(run), [directory.parent])
        self.ranks = ranks
        self.directory = directory
        self.files = RunFiles(directory)
        self.identity = digest(identity(run))
        set_up_torch(run)
        device = torch.device(run.device)
        # of its own: steps are captured on it
        self.stream = torch.cuda.Stream() if run.device == "cuda" else None
        with self._on_stream():
            numerics = numerics_of(run)
            kinds: list[type[Hook]] = [numerics, *hooks_of(run)]

            self.workload = workload or workloads.load(run, device, numerics.workloads)
            self.model = self.workload.build().to(device)
            if run.param_dtype != "float32":
                self.model.to(getattr(torch, run.param_dtype))
            for kind in kinds:
                kind.install(run, self.model)
            lay_flat(self.model.parameters())
            self.forward = forward_of(self.model, run)
            self.trained = ranks.training(self.forward)

            matrices = [p for p in self.workload.matrices(self.model) if p.requires_grad]
            self.optimizer = self._stabilized(kinds, matrices)
            built = Built(self.model, matrices, self.optimizer, self.workload.vocabulary)
            self.numerics = numerics(run, built)
            # of a step that ends the run
            self.refusals: tuple[type[Exception], ...] = (NonFiniteUpdateError, *numerics.refusals)
            self.hooks: list[Hook] = [self.numerics, *(kind(run, built) for kind in kinds[1:])]

            self.batches, self.probe_batches = self.workload.batches()
            self.fixed_windows = self.workload.held_out("val", run.eval_windows, exact=numerics.exact_windows)
            # where a graph looks for the learning rate and for the batch
            self.rate = torch.zeros((), device=device)
            self.source = torch.zeros_like(self.batches.source_at(0))

            self.random = OwnRandomness(run.seed, device)
            # the checkpoint that the first process of the run has, for all of them
            found = ranks.from_first(lambda: self._saved_here(say))
            saved = found.state if found else None
            reached = checkpoint.Reached()
            if saved:
                resumed = (self._parts(), self.optimizer.prober, self.random)
                reached = checkpoint.restore(self.files.checkpoint, saved, *resumed)
        self.step = reached.step
        self.skips = reached.skips
        self.train_s = reached.train_s
        self.wall_s = reached.wall_s
        self.lr_at = lr_schedule(run.lr_schedule, run.optimizer.lr, run.steps, directory.parent)
        self.pending = PendingSteps(BLOCK_STEPS[run.device], device)
        built_of = (run, self.optimizer, self.workload, self.hooks)
        held_back = self.probe_batches is not None
        self.eager = list(why_eager(*built_of, held_back=held_back, processes=ranks.count))
        self.graphs = StepGraphs() if self.stream is not None and not self.eager else None
        self.recording = self._recording(saved) if ranks.first else Unrecorded()

    def _recording(self, saved: Mapping[str, Any] | None) -> Recording:
        hooked = [column for hook in self.hooks for column in hook.eval_columns]
        columns = (self._further_columns(), [*self.workload.eval_columns, *hooked])
        return Recording(self.files, self._groups(), checkpoint.marks_of(saved), *columns)

    def _on_stream(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def _stabilized(
        self, kinds: Sequence[type[Hook]], matrices: Sequence[nn.Parameter]
    ) -> StabilizedOptimizer:
        run = self.run_config
        directions = self.workload.directions(self.model)
        # first: it may move the initial weights
        projection = projections.build(matrices, run.projection, directions)
        # the hooks' base optimizers go before the run's own
        replaced = (kind.make_bases(run, self.model, matrices) for kind in kinds)
        bases = next(filter(None, replaced), None)
        bases = bases or optimizers.build(self.model, run.optimizer, matrices, run.dtype)
        for kind in kinds:
            kind.prepare(run, bases)
        return stabilizers.build(
            self.model,
            bases,
            projection,
            self.ranks.share_of(run),
            self.forward,
            groups=stabilizers.groups_of(self.model, run, self.workload),
            effective=functools.partial(effective_weights, self.model),
            arithmetic=numerics_of(run).arithmetic,
        )

    def _parts(self) -> dict[str, checkpoint.Part]:
        """Return everything with a state that a checkpoint holds."""
        parts: dict[str, checkpoint.Part] = {hook.name: hook for hook in self.hooks if hook.name}
        parts["workload"] = self.workload
        stateful = {name: part for name, part in parts.items() if part.state_dict()}
        return {"model": self.model, "optimizer": self.optimizer, **stateful}

    def _further_columns(self) -> list[str]:
        """Return what steps.csv has beside its usual columns."""
        run = self.run_config
        ebc = run.stabilizer.name == "ebc"
        exponent = ("exponent",) if ebc and run.budget.exponent == "auto" else ()
        radius = BudgetConfig.columns if ebc and run.budget.radius is not None else ()
        hooked = [column for hook in self.hooks for column in hook.columns]
        curve = CURVE_COLUMNS if run.curve_every else ()
        return [*self.workload.step_columns, *exponent, *radius, *hooked, *curve]

    def _groups(self) -> list[str]:
        """Return the groups whose contributions and sensitivities are recorded."""
        budget = self.run_config.budget
        measured = budget.name in BOUNDED or budget.sensitivity_every
        return list(self.optimizer.groups) if isinstance(self.optimizer, EllipsotopeClip) and measured else []

    def _saved_here(self, say: Say) -> checkpoint.Saved | None:
        """Return the checkpoint, unless the rows before it are no longer those that were recorded."""
        saved = checkpoint.read(self.files, self.identity, say)
        for name, mark in checkpoint.marks_of(saved.state if saved else None).items():
            if not holds(self.directory / name, mark):
                say(f"{name} is not what the checkpoint was written after: it starts from its first step")
                return None
        return saved

    def save_checkpoint(self) -> None:
        if not self.ranks.first:
            return
        self.recording.sync()
        reached = checkpoint.Reached(self.step, self.skips, self.train_s, self.wall_s)
        marks = self.recording.marks()
        path, prober = self.files.checkpoint, self.optimizer.prober
        with self._on_stream():
            state = (self._parts(), prober, self.random)
            checkpoint.save(path, self.identity, reached, marks, *state, self.about)

    @functools.cached_property
    def about(self) -> About:
        """What the weights are of, for a run that starts from them."""
        return about_of(self.run_config)

    # -- the loop --------------------------------------------------------------------------------------------

    def run(
        self,
        *,
        checkpoint_every_s: float = math.inf,
        should_stop: Callable[[], bool] = lambda: False,
        on_progress: Callable[[int], None] = lambda step: None,
    ) -> dict[str, Any]:
        """Train to the end and return the result.

        Raises Interrupted, with a checkpoint written, once `should_stop()` is true.
        """
        run = self.run_config
        begun = saved = time.perf_counter()
        before = self.wall_s
        first = self.step
        cause: str | None = None
        ended: str | None = None  # by a hook

        def alive() -> None:
            on_progress(self.step)

        try:
            while self.step < run.steps:
                started = time.perf_counter()
                begin = self.step
                self.take_steps(run.eval_every - begin % run.eval_every)
                cause = self.record_steps()
                now = time.perf_counter()
                self.train_s += now - started
                if cause:
                    break
                if self.step % run.eval_every == 0 or self.step == run.steps:
                    ended = self._record_evaluation(alive)
                    if ended:
                        break
                if self.step // FLUSH_STEPS > begin // FLUSH_STEPS:
                    self.recording.flush()
                alive()
                stop = self.ranks.agreed(should_stop()) and self.step < run.steps
                self.wall_s = before + time.perf_counter() - begun
                if (stop or now - saved >= checkpoint_every_s) and self.step > first:
                    self.save_checkpoint()
                    saved = now
                if stop:
                    raise Interrupted
            return self._finish(cause, ended, alive) | {"wall_s": before + time.perf_counter() - begun}
        finally:
            self.recording.close()

    def advance(self, count: int) -> str | None:
        """Take and record `count` steps, without evaluations; returns the cause if the run has diverged."""
        end = min(self.step + count, self.run_config.steps)
        cause = None
        while self.step < end and not cause:
            self.take_steps(end - self.step)
            cause = self.record_steps()
        return cause

    def take_steps(self, most: int) -> None:
        """Have the device take up to `most` steps, a block at most; `record_steps` reads what they did."""
        block = min(most, self.pending.capacity, self.run_config.steps - self.step)
        with self._on_stream(), self.random.drawn():
            for step in range(self.step + len(self.pending), self.step + block):
                self._take_step(step)

    def _take_step(self, step: int) -> None:
        # the learning rate, as a number first: schedules of delta* read it on the host
        lr = self.lr_at(step)
        for hook in self.hooks:
            lr = hook.rate(step, lr)
        self._set_rate(lr)
        t = self.optimizer.begin_step()

        usual = not (self.workload.event_at(step) or any(hook.event_at(step) for hook in self.hooks))
        kind = self.optimizer.kind(t) if self.graphs and usual else None
        graph = self.graphs if self.graphs and self.graphs.wants(kind) else None
        self.optimizer.deferred = graph is not None
        if self.graphs:
            self.rate.fill_(lr)
            self._set_rate(self.rate)

        values: Values | Packed
        if graph:
            self.source.copy_(self.batches.source_at(step))
            values = graph.run(kind, lambda: Packed.of(self._computed(t, *self.batches.rows(self.source))))
        else:
            inputs, targets = self.batches.at(step)
            for hook in self.hooks:
                targets = hook.targets(step, targets)
            values = self._computed(t, self.ranks.rows(inputs), self.ranks.rows(targets), lr)
        self.pending.add(lr, values)

    def _set_rate(self, lr: float | Tensor) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def _computed(self, t: int, inputs: Tensor, targets: Tensor, lr: float = 0.0) -> Values:
        """Take step `t` at the scheduled learning rate `lr` -> everything recorded of it, still on the
        device."""
        try:
            values, last, states = self.forward_backward(t, inputs, targets, lr)
        except self.numerics.refusals:  # a value is not finite
            self.optimizer.zero_grad()
            loss = torch.full((), math.nan, device=targets.device)
            return {"loss": loss, "failed": torch.ones_like(loss, dtype=torch.bool)}

        try:
            stats = self.optimizer.take_step(last)
        except self.refusals:
            return {**values, "failed": torch.ones_like(values["loss"], dtype=torch.bool)}
        finally:
            self.optimizer.zero_grad()

        for hook in self.hooks:
            values |= hook.after(t, stats)
        further = self.workload.after_step(t, stats, states, self.optimizer.renew_rows)
        return {**values, **recorded(stats), **further}

    def forward_backward(
        self, t: int, inputs: Tensor, targets: Tensor, lr: float
    ) -> tuple[dict[str, Tensor], StepInputs, Any]:
        """Leave this process's gradients of step `t` in `p.grad`, as the hooks change them -> the parts of
        the loss and the hooks' columns, the inputs of the optimizer's step, and what the workload kept.

        Raises what `numerics.refusals` names where a value is not finite.
        """
        probe = None  # this process's rows of held-back text that choose c
        if self.probe_batches is not None:
            held_inputs, held_targets = self.probe_batches.at(t)
            probe = self.ranks.rows(held_inputs), self.ranks.rows(held_targets)
        batch = StepInputs(t, inputs, targets=targets, probe=probe)
        columns: dict[str, Tensor] = {}
        for hook in self.hooks:
            columns |= hook.before(t, batch)
        losses, last, states = self.numerics.backward(batch, self.trained, self.workload, self.saving)
        values = {**self.ranks.mean(losses), **columns}
        for hook in self.hooks:
            values |= hook.gradients(t, values["loss"], lr)
        return values, last, states

    def saving(self) -> ExitStack:
        """Return what surrounds a forward whose activations are kept for backward."""
        stack = ExitStack()
        for hook in self.hooks:
            stack.enter_context(hook.saving())
        return stack

    def record_steps(self) -> str | None:
        """Read and record the pending steps; returns the cause if the run has diverged at one of them."""
        with self._on_stream():
            taken = self.pending.take()
        for lr, values in taken:
            step = self.step
            self.step += 1
            lr *= values.get("lr_factor", 1.0)  # type: ignore[operator]
            cause = divergence.fatal(step, values)
            self.recording.step(step, lr, values, failed=cause is not None)
            if cause is None:
                self.skips = self.skips + 1 if values["skipped"] else 0
                cause = divergence.stuck(self.skips, step)
            if cause:
                return cause
        return None

    # -- evaluation and the end ------------------------------------------------------------------------------

    def _record_evaluation(self, alive: Callable[[], None]) -> str | None:
        """Evaluate, and return why a hook ends the run here; None where it goes on. Processes share the fixed
        windows; what else there is to see is the first one's, and the others end with it."""
        self.ranks.refuse_drift(list(self.model.parameters()), self.step)
        among = self.ranks if self.ranks.count > 1 else None
        figures = self._evaluate(self.fixed_windows, alive, among)
        if not self.ranks.first:
            self._judged(lambda model: {})
            return "the first process ends it" if self.ranks.agreed(False) else None
        evaluated, loss = self.workload.evaluated, figures["loss"]
        figures |= self._judged(
            lambda model: {
                **evaluated(model, self.step, loss, self.files),
                **_joined(hook.evaluated(model) for hook in self.hooks),
            }
        )
        tokens = self.step * self.run_config.tokens_per_step
        self.recording.evaluation(self.step, figures, tokens=tokens, train_s=self.train_s)
        self.recording.flush()
        ended = None
        if self.step < self.run_config.steps:
            ended = next(filter(None, (hook.ends(self.step, loss) for hook in self.hooks)), None)
        self.ranks.agreed(ended is not None)
        return ended

    def _evaluate(
        self,
        pairs: Iterable[tuple[Tensor, Tensor]],
        alive: Callable[[], None],
        among: Ranks | None = None,
    ) -> dict[str, float]:
        """Return what `evaluate` finds at the weights by which the optimizer is judged."""
        sums = self.numerics.sums
        return self._judged(lambda model: evaluate(model, self.run_config, pairs, alive, sums, among))

    def _judged(self, measure: Callable[[nn.Module], Mapping[str, Any]]) -> dict[str, Any]:
        """Return what `measure` finds of the model at the weights by which the optimizer is judged."""
        with self._on_stream():
            self.optimizer.eval()
            try:
                return dict(measure(self.model))
            finally:
                self.optimizer.train()

    def _finish(self, cause: str | None, ended: str | None, alive: Callable[[], None]) -> dict[str, Any]:
        run = self.run_config
        if not self.ranks.first:
            return {}
        self.recording.sync()

        def evaluated(split: str) -> dict[str, float]:
            if run.final_windows:
                tokens = self.workload.tokens[split]
                pairs = forensics.overlapping_windows(tokens, run.model.context, run.final_windows)
            else:
                pairs = self.workload.held_out(split)
            return self._evaluate(pairs, alive)

        clip = self.optimizer
        return result.finished(
            run,
            self.files,
            self.recording.marks(),
            cause,
            ended,
            evaluated,
            summary=lambda columns: _joined(hook.summary(columns) for hook in self.hooks),
            packed=self._keep_model,
            characters=self.workload.characters_per_token,
            steps=self.step,
            guard_count=clip.guard.count if isinstance(clip, ForensicClip) else 0,
            train_s=self.train_s,
            probe_s=self.optimizer.prober.seconds,
        )

    def _keep_model(self) -> dict[str, Any]:
        """Keep the model by whose weights the run was judged -> figures of it."""
        figures = _joined(hook.figures(self.optimizer.bases) for hook in self.hooks)
        for hook in self.hooks:
            # one that keeps nothing is not asked: going to those weights and back may round the present ones
            if type(hook).finished is not Hook.finished:
                figures |= self._judged(functools.partial(hook.finished, files=self.files))
        return figures | self._judged(lambda model: self.workload.finished(model, self.step, self.files))


def _joined(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    return {name: value for part in parts for name, value in part.items()}
