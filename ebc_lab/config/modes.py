"""What a run as a whole may be, and the parts that do not go with it: exact, trained by several processes,
with updates inside backward, or an energy-based model."""

from __future__ import annotations

from collections.abc import Iterator

from .errors import UserError, require
from .identity import with_derived_settings
from .part import Mode, Unfit
from .parts import PARTS
from .schema import RunConfig

MOST_TOKENS = 2**21 - 1  # of a batch under determinism=verity, whose sums are exact
OF_EBC = ("budget", "controller")  # which nobody else reads


def check_modes(run: RunConfig) -> None:
    """Refuse what does not go with the modes that a run asks for. Raises UserError."""
    if run.determinism.exact:
        check_exact(run)
    if run.memory.hooks:
        _check_mode(run, Mode.IN_BACKWARD)
    if run.workload.name == "ebm":
        _check_mode(run, Mode.EBM)


def check_exact(run: RunConfig) -> None:
    """Refuse what determinism=verity cannot make exact. Raises UserError."""
    parts = run.determinism.micro_batches
    require(
        run.batch_size % parts == 0,
        f"determinism.micro_batches={parts} must divide batch_size={run.batch_size}.",
    )
    tokens = run.batch_size * run.model.context
    require(
        tokens <= MOST_TOKENS,
        f"determinism=verity adds up {MOST_TOKENS:,} tokens a step at the most, and this batch has "
        f"{tokens:,}: make batch_size or model.context smaller.",
    )
    _check_mode(run, Mode.EXACT)


def check_processes(run: RunConfig, processes: int) -> None:
    """Refuse what several processes that train a run together would compute otherwise than one. Raises
    UserError."""
    if processes == 1:
        return
    _check_mode(run, Mode.SEVERAL_PROCESSES, processes)
    asked = Mode.SEVERAL_PROCESSES.value.format(processes)
    part = run.batch_size // run.accumulate
    of = "batch_size" if run.accumulate == 1 else "each of the accumulate parts of batch_size"
    require(part % processes == 0, f"{asked} must divide {of}, which is {part}.")
    probe = run.budget.probe_sequences
    require(
        probe % processes == 0,
        f"{asked} must divide budget.probe_sequences={probe}, whose rows all processes measure together.",
    )
    rows = min(-(-run.audit_tokens // run.model.context), part - probe)
    require(
        rows % processes == 0,
        f"{asked} must divide the {rows} row(s) of an audit, which are audit_tokens={run.audit_tokens} of "
        f"{run.model.context} tokens each, or what the {part} rows leave: choose another audit_tokens.",
    )


def _check_mode(run: RunConfig, mode: Mode, processes: int = 1) -> None:
    for unfit in _unfit(run, mode):
        raise UserError(f"{mode.value.format(processes)} does not go with {unfit.setting}: {unfit.remedy}.")


def _unfit(run: RunConfig, mode: Mode) -> Iterator[Unfit]:
    """What does not go with a mode: of the run's own settings, and of each part that somebody reads."""
    yield from _unfit_of_run(run, mode)
    whole = with_derived_settings(run)
    for part in PARTS:
        unread = part.name in OF_EBC and run.stabilizer.name != "ebc" and mode is not Mode.EBM
        unfit = None if unread else part.unfit(getattr(whole, part.name), mode)
        if unfit:
            yield unfit


def _unfit_of_run(run: RunConfig, mode: Mode) -> Iterator[Unfit]:
    exact, several = mode is Mode.EXACT, mode is Mode.SEVERAL_PROCESSES
    if exact and run.dtype == "bfloat16":
        yield Unfit("dtype=bfloat16", "its sums are those of float32; choose dtype=float32")
    if mode is Mode.EBM and run.compile == "on":
        yield Unfit("compile=on", "its splats are picked anew at every step")
    if exact and run.compile == "on":
        why = "a compiler reorders and fuses what has to be rounded as it is written; choose compile=off"
        yield Unfit("compile=on", why)
    if mode is not Mode.IN_BACKWARD and run.param_dtype != "float32":
        yield Unfit(f"param_dtype={run.param_dtype}", "it needs float32; choose param_dtype=float32")
    if exact and run.accumulate > 1:
        why = "determinism.micro_batches splits a batch, and no bit changes; leave accumulate=1"
        yield Unfit("accumulate", why)
    if several and run.capability != "auto":
        yield Unfit("capability", "it is there to compare bits; leave launcher.processes_per_run=1")
    if exact and run.curve_every > 0:
        yield Unfit("curve_every", "leave it at 0")
    if mode is not Mode.IN_BACKWARD and run.sharpness_every > 0:
        why = "it takes second derivatives of the cross-entropy, in one process; leave it at 0"
        yield Unfit("sharpness_every", why)
    for key, usual in (("accumulate", 1), ("curve_every", 0)):
        if mode is Mode.IN_BACKWARD and getattr(run, key) != usual:
            why = f"it needs whole gradients, or the weights before the step; leave {key}={usual}"
            yield Unfit(key, why)
