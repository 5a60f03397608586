from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..fields import setting
from ..part import Figure, Head, Mode, Part, Run, Tail
from .data import FILES

NATS = "nats/token"
RUN = ("run",)
UNNAMED: dict[str, Any] = {"only": RUN, "in_run_id": False}


@dataclass
class InitConfig(Part):
    """From which weights a run starts (docs/workloads.md)."""

    name: str = setting("none", "drawn from the seed, or another run's weights", group="init")
    run: str | None = setting(
        None, "whose weights: a run's folder, its weights.pt or checkpoint.pt, or STUDY/RUN_ID", **UNNAMED
    )
    sha256: str | None = setting(None, "checksum of that file; filled in, then enforced", only=RUN)
    text: str = setting(
        "source",
        "on which text forgetting is measured: source, that of the weights; none; or one of `data`",
        choices=("source", "none", "shakespeare", "pydoc", "path"),
        **UNNAMED,
    )
    file: Any = setting(None, "of text=path: that text, as data.file takes it", **FILES, **UNNAMED)
    text_sha256: str | None = setting(None, "checksum of that text; filled in, then enforced", only=RUN)
    keep: bool = setting(
        False,
        "the weights at the end are kept, as weights.pt, for other runs to start from",
        unnamed_at=False,
    )

    place = 20
    timed = False
    words = {"run": "another run’s weights"}
    evals = {
        "init_val_loss": (NATS, "the same on windows of the text that the weights come from; with `init=run`")
    }
    figures = (
        Figure(
            "init_start_loss",
            NATS,
            "validation loss on the text that the weights come from, before the first step",
            Head(
                "Old text, before",
                "old before",
                note="old text: the one that the weights come from, its validation loss",
            ),
        ),
        Figure("init_val_loss", NATS, "the same after the last step", Head("Old text, after", "old after")),
        Figure(
            "forgotten",
            NATS,
            "by how much that loss rose: what the run forgot",
            Head("Forgotten", "forgotten", note="forgotten: by how much that rose"),
        ),
        Figure(
            "weights_moved",
            "",
            "‖W − W₀‖ over ‖W₀‖: how far all weights are from where they started",
            Head("Weights moved", "moved", note="moved: the distance from the start over the norm there"),
        ),
        Figure("weights_bytes", "bytes", "of the kept weights", averaged=False),
    )
    picture = "forgetting"
    table = "Learning and forgetting"

    def is_pinned(self) -> bool:
        """Return whether every checksum that the run's name needs is filled in."""
        return self.name == "none" or bool(self.sha256 and (self.text == "none" or self.text_sha256))

    def changes_nothing(self) -> bool:
        return self.name == "none" and not self.keep

    def refuses(self, run: Run) -> Iterator[str]:
        if self.name == "run" and not self.run:
            yield "init=run needs init.run, the folder of the run whose weights this one starts from."
        if (self.text == "path") != (self.file is not None):
            yield "init.text=path and init.file=FILE, the text on which forgetting is measured, go together."

    def unfit(self, mode: Mode) -> Iterator[str]:
        if mode is Mode.EBM and not self.changes_nothing():
            setting = "init=run" if self.name == "run" else "init.keep"
            yield f"{setting}: it keeps its model by itself, and starts from its seed; choose init=none"

    def tail(self) -> Iterator[Tail]:
        if self.name == "run":
            yield Tail("_init", "from another run’s weights", "from weights")
