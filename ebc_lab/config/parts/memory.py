from collections.abc import Iterator
from dataclasses import dataclass

from ebc_lab.ebc.options import LAGGED

from ..fields import SEED, setting
from ..part import Figure, Head, Mode, Part, Run, Tail

PACKED = ("int4",)


@dataclass
class MemoryConfig(Part):
    """What a step keeps beside the weights (docs/axiom.md)."""

    name: str = setting(
        "none", "gradients, or activations, or both in little memory", group="memory", in_run_id=False
    )
    hooks: bool = setting(False, "the update is made inside backward, tensor by tensor; of optimizer=axiom")
    activations: str = setting(
        "none", "activations kept for backward: as they are, or in 4 bits", choices=("none", "int4")
    )
    seed: int = setting(
        0, "of their stochastic rounding, beside the run's", low=0, high=SEED, by="activations", only=PACKED
    )

    place = 110
    unfit_for = {
        Mode.EXACT: "it needs a batch's whole gradients, and activations as they are; choose memory=none",
        Mode.SEVERAL_PROCESSES: "it works on one process's gradients and activations; choose memory=none",
    }
    figures = (
        Figure(
            "state_bytes",
            "bytes",
            "of the optimizer's state",
            Head("State", "state", "size"),
            averaged=False,
        ),
        Figure(
            "gradient_bytes",
            "bytes",
            "of gradients at their height: all of them, or with hooks the largest tensor's",
            Head("Gradients", "gradients", "size", note="gradients: at their height"),
            averaged=False,
        ),
        Figure(
            "activation_bytes",
            "bytes",
            "of activations that a forward saves for backward, packed",
            Head("Activations, packed", "activations", "size", note="activations: that a backward needs"),
            averaged=False,
        ),
    )

    table = "Beside the weights"

    def changes_nothing(self) -> bool:
        # hooks change no bit until a gradient is not finite: then some tensors have already been updated
        return not self.hooks and self.activations == "none"

    def refuses(self, run: Run) -> Iterator[str]:
        if self.activations != "none" and run.compile == "on":
            yield (
                f"memory.activations={self.activations} packs what an uncompiled forward saves: leave "
                "compile at off."
            )
        if run.stabilizer.name == "ebc" and run.budget.name == LAGGED and not self.hooks:
            yield (
                "budget=lagged looks at earlier steps because hooks leave it no choice: choose "
                "budget=shadow, which measures the step itself, or memory=hooks with optimizer=axiom."
            )

    def tail(self) -> Iterator[Tail]:
        if self.activations != "none":
            yield Tail(f"_a{self.activations}", "4-bit activations")

    def warnings(self, run: Run) -> Iterator[str]:
        if self.hooks and run.stabilizer.name == "none":
            yield "memory.hooks: the plain optimizer; EBC inside backward is stabilizer=ebc budget=lagged."
