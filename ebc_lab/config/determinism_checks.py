"""What is refused of a run before anything is written because its numbers would not be what is promised: what
is not exact under determinism=verity, and what several processes would train otherwise than one."""

from __future__ import annotations

from collections.abc import Iterator

from ebc_lab.ebc.options import WITH_ARITHMETIC

from .dicts import to_dict
from .errors import any_of, need
from .identity import resolved
from .schema import RunConfig

OPTIMIZERS = ("adam", "adamw")
STABILIZERS = ("none", "ebc")
LR_SCHEDULES = ("constant", "warmup_linear", "trapezoid")  # the others ask the platform's maths library
OF_ONE_PROCESS = {  # what looks at the activations or the targets of one process's rows
    "stabilizer": ("energy_raw", "energy_rms", "custom"),
    "controller": ("agreement", "confidence"),
}
MOST_TOKENS = 2**21 - 1  # of a batch, whose sums are exact

Refusal = tuple[bool, str, str]  # whether it applies, what is given, and what to do


def check_determinism(run: RunConfig) -> None:
    """Refuse what determinism=verity cannot make exact. Raises UserError."""
    if not run.determinism.exact:
        return
    parts = run.determinism.micro_batches
    need(
        run.batch_size % parts == 0,
        f"determinism.micro_batches={parts} must divide batch_size={run.batch_size}.",
    )
    tokens = run.batch_size * run.model.context
    need(
        tokens <= MOST_TOKENS,
        f"determinism=verity adds up {MOST_TOKENS:,} tokens a step at the most, and this batch has "
        f"{tokens:,}: make batch_size or model.context smaller.",
    )
    for refusals in (_of_arithmetic(run), _of_optimizer(run), _of_the_rest(run)):
        for refused, given, remedy in refusals:
            need(not refused, f"determinism=verity does not go with {given}: {remedy}.")
    if run.stabilizer.name == "ebc":
        for refused, given, remedy in _of_ebc(run):
            need(not refused, f"EBC under determinism=verity does not go with {given}: {remedy}.")


def _of_arithmetic(run: RunConfig) -> Iterator[Refusal]:
    """Where its own operations stand in for torch's."""
    yield (run.dtype == "bfloat16", "dtype=bfloat16", "its sums are those of float32; choose dtype=float32")
    yield (run.param_dtype != "float32", f"param_dtype={run.param_dtype}", "choose param_dtype=float32")
    yield (
        run.compile == "on",
        "compile=on",
        "a compiler reorders and fuses what has to be rounded as it is written; choose compile=off",
    )
    yield (run.model.dropout > 0, "model.dropout", "it is not built; leave it at 0")
    yield (
        run.workload.name != "gpt",
        f"workload={run.workload.name}",
        "only the GPT is; choose workload=gpt",
    )
    yield (run.model.name != "gpt", f"model={run.model.name}", "its layers are torch's; choose model=gpt")
    yield (
        run.accumulate > 1,
        "accumulate",
        "determinism.micro_batches splits a batch, and no bit changes; leave accumulate=1",
    )


def _of_optimizer(run: RunConfig) -> Iterator[Refusal]:
    optimizer, schedule = run.optimizer, run.lr_schedule.name
    yield (
        optimizer.name == "axiom",
        "optimizer=axiom",
        "its 4-bit and low-rank parts could be exact, but they are not built so; choose optimizer=adam",
    )
    yield (
        optimizer.name not in OPTIMIZERS,
        f"optimizer={optimizer.name}",
        f"choose {any_of(OPTIMIZERS)}",
    )
    yield (
        optimizer.name == "adam" and optimizer.weight_decay > 0,
        "optimizer.weight_decay under optimizer=adam",
        "its decay is decoupled; choose optimizer=adamw",
    )
    yield (
        schedule not in LR_SCHEDULES,
        f"lr_schedule={schedule}",
        f"its factors may differ between machines; choose {any_of(LR_SCHEDULES)}",
    )
    yield (run.policy.name != "constant", f"policy={run.policy.name}", "choose policy=constant")
    yield (run.projection.name != "none", f"projection={run.projection.name}", "choose projection=none")


def _of_the_rest(run: RunConfig) -> Iterator[Refusal]:
    quantizer, memory, shock = run.quantizer, run.memory, run.shock.name
    yield (
        run.stabilizer.name not in STABILIZERS,
        f"stabilizer={run.stabilizer.name}",
        "choose stabilizer=none, or stabilizer=ebc with budget=shadow",
    )
    yield (
        {quantizer.name, quantizer.gradients, quantizer.state} != {"none"},
        "a quantizer",
        "choose quantizer=none",
    )
    yield (
        memory.hooks or memory.activations != "none",
        f"memory={memory.name}",
        "it needs a batch's whole gradients, and activations as they are; choose memory=none",
    )
    yield (
        run.partition.name != "uniform",
        f"partition={run.partition.name}",
        "clusters are found by sums in any order; choose partition=uniform",
    )
    yield (
        shock == "corrupt_gradient",
        f"shock={shock}",
        "its noise may differ between machines; choose shock=label_noise, lr_spike or none",
    )
    yield (run.curve_every > 0, "curve_every", "leave it at 0")


def _of_ebc(run: RunConfig) -> Iterator[Refusal]:
    """What EBC would compute beside the arithmetic that it is given."""
    values = {**to_dict(run.budget), "budget": run.budget.name, "controller": resolved(run).controller.name}
    groups = ("budget", "controller")
    for key, allowed in WITH_ARITHMETIC.items():
        name = key if key in groups else f"budget.{key}"
        instead = any_of([f"{name}={value}" for value in allowed])
        yield values[key] not in allowed, f"{name}={values[key]}", f"choose {instead}"


def check_processes(run: RunConfig, processes: int) -> None:
    """Refuse what several processes that train a run together would compute otherwise than one. Raises
    UserError."""
    if processes == 1:
        return
    asked = f"launcher.processes_per_run={processes}"
    for refused, given, remedy in _of_several(run):
        need(not refused, f"{asked} does not go with {given}: {remedy}.")
    part = run.batch_size // run.accumulate
    of = "batch_size" if run.accumulate == 1 else "each of the accumulate parts of batch_size"
    need(part % processes == 0, f"{asked} must divide {of}, which is {part}.")
    probe = run.budget.probe_sequences
    need(
        probe % processes == 0,
        f"{asked} must divide budget.probe_sequences={probe}, whose rows all processes measure together.",
    )
    rows = min(-(-run.audit_tokens // run.model.context), part - probe)
    need(
        rows % processes == 0,
        f"{asked} must divide the {rows} row(s) of an audit, which are audit_tokens={run.audit_tokens} of "
        f"{run.model.context} tokens each, or what the {part} rows leave: choose another audit_tokens.",
    )


def _of_several(run: RunConfig) -> Iterator[Refusal]:
    """What has been seen, or must be expected, to differ by more than rounding."""
    quantizer, memory = run.quantizer, run.memory
    alone = "leave launcher.processes_per_run=1"
    mode = f"determinism={run.determinism.name}"
    yield run.determinism.name != "none", mode, f"gradients are added up in another order; {alone}"
    yield run.capability != "auto", "capability", f"it is there to compare bits; {alone}"
    yield run.workload.name != "gpt", f"workload={run.workload.name}", "choose workload=gpt"
    yield run.model.name != "gpt", f"model={run.model.name}", f"it may draw numbers of its own; {alone}"
    yield run.model.dropout > 0, "model.dropout", "each process would draw its own; leave it at 0"
    yield run.param_dtype != "float32", f"param_dtype={run.param_dtype}", "choose param_dtype=float32"
    yield (
        memory.hooks or memory.activations != "none",
        f"memory={memory.name}",
        "it works on the gradients and activations of one process; choose memory=none",
    )
    yield (
        (quantizer.gradients, quantizer.state) != ("none", "none"),
        "quantizer.gradients or quantizer.state",
        "their levels turn a rounding into a step; leave them at none",
    )
    yield run.policy.name != "constant", f"policy={run.policy.name}", "choose policy=constant"
    own = {"stabilizer": run.stabilizer.name, "controller": resolved(run).controller.name}
    for group, names in OF_ONE_PROCESS.items():
        refused = own[group] in names and (group == "stabilizer" or run.stabilizer.name == "ebc")
        yield refused, f"{group}={own[group]}", f"it looks at the rows of one process; {alone}"
