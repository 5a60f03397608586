"""What is refused of a run under determinism=verity before anything is written: what would not be exact."""

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
