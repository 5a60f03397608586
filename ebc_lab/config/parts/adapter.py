from collections.abc import Iterator
from dataclasses import dataclass

from ..fields import number, setting
from ..part import Mode, Part, Run, Tail

LORA = ("lora",)
TARGETS = {"hidden": ("q", "k", "v", "o", "mlp_in", "mlp_out"), "qv": ("q", "v")}


@dataclass
class AdapterConfig(Part):
    """What is trained of the model: all of it, or low-rank matrices beside its own (docs/workloads.md)."""

    name: str = setting("none", "all weights, or low-rank matrices alone", group="adapter")
    rank: int = setting(8, "of the trained matrices", low=1, high=4096, only=LORA)
    alpha: float = setting(16.0, "what they add is multiplied by alpha/rank", above=0, high=1e6, only=LORA)
    targets: str = setting(
        "hidden",
        "the matrices that get them: all hidden ones, or those of queries and values",
        choices=tuple(TARGETS),
        only=LORA,
    )

    off = "none"
    place = 25
    words = {"lora": "low-rank adapters"}
    libraries = {"lora": "peft"}
    required = {"lora": ("peft", "lora")}
    unfit_for = dict.fromkeys(Mode, "it trains the plain GPT; choose adapter=none")

    def refuses(self, run: Run) -> Iterator[str]:
        if self.changes_nothing():
            return
        others = {
            "quantizer": ("none", "levels are those of the whole matrix"),
            "projection": ("none", "a constraint is one on the whole matrix"),
            "model": ("gpt", "the matrices are found by their names in the GPT"),
        }
        for group, (usual, why) in others.items():
            choice = getattr(run, group).name
            if choice != usual:
                yield f"adapter=lora does not go with {group}={choice}: {why}; choose {group}={usual}."
        if run.compile == "on":
            yield "adapter=lora does not go with compile=on: leave compile at off."

    def tail(self) -> Iterator[Tail]:
        if not self.changes_nothing():
            rank = number(self.rank)
            name, which = ("", "") if self.targets == "hidden" else (self.targets, f" of {self.targets}")
            yield Tail(f"_lora{rank}{name}", f"LoRA of rank {rank}{which}", f"LoRA {rank}{which}")
