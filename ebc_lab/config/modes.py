"""Checks that a run's settings fit the run's modes. The modes are exact training, training by several
processes, updates inside backward, and an energy-based model."""

from __future__ import annotations

from collections.abc import Iterator

from .errors import UserError, require
from .identity import with_derived_settings
from .part import Mode
from .parts import parts_of
from .schema import RunConfig

MOST_TOKENS = 2**21 - 1  # of a batch under determinism=verity, whose sums are exact


def check_modes(run: RunConfig) -> None:
    """Raise UserError if a setting conflicts with a mode of the run other than several processes."""
    if run.determinism.exact:
        check_exact(run)
    if run.memory.hooks:
        _check_mode(run, Mode.IN_BACKWARD)
    if run.workload.name == "ebm":
        _check_mode(run, Mode.EBM)


def check_exact(run: RunConfig) -> None:
    """Raise UserError for settings that determinism=verity cannot make exact."""
    parts, batch = run.determinism.micro_batches, run.batch_size
    require(batch % parts == 0, f"determinism.micro_batches={parts} must divide batch_size={batch}.")
    tokens = run.tokens_per_step
    require(
        tokens <= MOST_TOKENS,
        f"determinism=verity adds up {MOST_TOKENS:,} tokens a step at the most, and this batch has "
        f"{tokens:,}: make batch_size or model.context smaller.",
    )
    _check_mode(run, Mode.EXACT)


def check_processes(run: RunConfig, processes: int) -> None:
    """Raise UserError if several processes would not compute what one process would."""
    if processes == 1:
        return
    _check_mode(run, Mode.SEVERAL_PROCESSES, processes)
    asked = Mode.SEVERAL_PROCESSES.value.format(processes)
    rows = run.batch_size // run.accumulate
    batch = "batch_size" if run.accumulate == 1 else "each of the accumulate parts of batch_size"
    require(rows % processes == 0, f"{asked} must divide {batch}, which is {rows}.")
    probe = run.budget.probe_sequences
    require(
        probe % processes == 0,
        f"{asked} must divide budget.probe_sequences={probe}, whose rows all processes measure together.",
    )
    audited = min(-(-run.audit_tokens // run.model.context), rows - probe)
    require(
        audited % processes == 0,
        f"{asked} must divide the {audited} row(s) of an audit, which are audit_tokens={run.audit_tokens} of "
        f"{run.model.context} tokens each, or what the {rows} rows leave: choose another audit_tokens.",
    )


def _check_mode(run: RunConfig, mode: Mode, processes: int = 1) -> None:
    """Raise UserError if a mode excludes a setting of the run or of one of its parts."""
    ignored = ("budget", "controller") if run.stabilizer.name != "ebc" and mode is not Mode.EBM else ()
    parts = [part for part in parts_of(with_derived_settings(run)) if part.group_name not in ignored]
    for unfit in (*_unfit_of_run(run, mode), *(one for part in parts for one in part.unfit(mode))):
        raise UserError(f"{mode.value.format(processes)} does not go with {unfit}.")


def _unfit_of_run(run: RunConfig, mode: Mode) -> Iterator[str]:
    exact, several = mode is Mode.EXACT, mode is Mode.SEVERAL_PROCESSES
    if exact and run.dtype == "bfloat16":
        yield "dtype=bfloat16: its sums are those of float32; choose dtype=float32"
    if mode is Mode.EBM and run.compile == "on":
        yield "compile=on: its splats are picked anew at every step"
    if exact and run.compile == "on":
        why = "a compiler reorders and fuses what has to be rounded as it is written; choose compile=off"
        yield f"compile=on: {why}"
    if mode is not Mode.IN_BACKWARD and run.param_dtype != "float32":
        yield f"param_dtype={run.param_dtype}: it needs float32; choose param_dtype=float32"
    if exact and run.accumulate > 1:
        yield "accumulate: determinism.micro_batches splits a batch, and no bit changes; leave accumulate=1"
    if several and run.capability != "auto":
        yield "capability: it is there to compare bits; leave launcher.processes_per_run=1"
    if exact and run.curve_every > 0:
        yield "curve_every: leave it at 0"
    if mode is not Mode.IN_BACKWARD and run.sharpness_every > 0:
        why = "it takes second derivatives of the cross-entropy, in one process; leave it at 0"
        yield f"sharpness_every: {why}"
    for key, usual in (("accumulate", 1), ("curve_every", 0)):
        if mode is Mode.IN_BACKWARD and getattr(run, key) != usual:
            yield f"{key}: it needs whole gradients, or the weights before the step; leave {key}={usual}"
