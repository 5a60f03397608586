"""What is refused of a run's memory settings and of its optimizer before anything is written."""

from __future__ import annotations

from ebc_lab.ebc.options import LAGGED

from .errors import need
from .schema import RunConfig
from .workload_checks import installed

EXTRA = "pip install 'ebc-lab[axiom]'"
OF_TORCHAO = ("adam8bit", "adam4bit")


def check_memory(run: RunConfig) -> None:
    """Refuse what does not go with updates inside backward or packed activations. Raises UserError."""
    optimizer = run.optimizer
    need(
        optimizer.name not in OF_TORCHAO or installed("torchao"),
        f"optimizer={optimizer.name} needs the library torchao: {EXTRA}.",
    )
    need(optimizer.name != "galore" or optimizer.rank >= 1, "optimizer=galore needs optimizer.rank >= 1.")
    need(
        run.memory.activations == "none" or run.compile != "on",
        f"memory.activations={run.memory.activations} packs what an uncompiled forward saves: leave compile "
        "at off.",
    )
    ebc = run.stabilizer.name == "ebc"
    if run.memory.hooks:
        _check_hooks(run)
    need(
        not ebc or run.budget.name != LAGGED or run.memory.hooks,
        "budget=lagged looks at earlier steps because hooks leave it no choice: choose budget=shadow, which "
        "measures the step itself, or memory=hooks with optimizer=axiom.",
    )


def _check_hooks(run: RunConfig) -> None:
    """Refuse what needs gradients, or the weights before the step, after backward. Raises UserError."""
    optimizer, stabilizer, budget = run.optimizer.name, run.stabilizer.name, run.budget
    ebc = stabilizer == "ebc"
    need(
        optimizer == "axiom",
        f"memory.hooks make the update inside backward, which optimizer={optimizer} does not: choose "
        "optimizer=axiom.",
    )
    needs_step = f"budget={budget.name}" if ebc else f"stabilizer={stabilizer}"
    need(
        stabilizer == "none" or (ebc and budget.name == LAGGED),
        f"{needs_step} looks at the whole step before it is applied, and under memory.hooks there is no such "
        "moment: choose stabilizer=none, stabilizer=ebc with budget=lagged, or memory.hooks=false.",
    )
    free = ebc and (budget.grouping == "matrices" or budget.sensitivity_every or budget.exponent != "square")
    need(
        not free and (not ebc or run.controller.name != "agreement"),
        "budget=lagged scales every weight and sees no whole step: leave budget.grouping, "
        "budget.sensitivity_every and budget.exponent at their defaults, and controller at none that "
        "compares losses.",
    )
    refused = {
        "accumulate": run.accumulate != 1,
        "model.dropout": run.model.dropout > 0,
        "curve_every": run.curve_every > 0,
        "quantizer.gradients": run.quantizer.gradients != "none",
        "policy": run.policy.name != "constant",
        "shock": run.shock.name == "corrupt_gradient",
        "budget.probe_tokens": ebc and budget.probe_tokens != "train",
    }
    for key, found in refused.items():
        need(
            not found,
            f"{key} needs gradients, or the weights before the step, once backward has ended: leave it at "
            "its default, or choose memory.hooks=false.",
        )
