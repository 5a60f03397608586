"""The text that models are trained on, or the images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..fields import setting
from ..part import Need, Part

BIN = ("bin",)
NO_FILES: dict[str, Any] = {"file": None, "files": [], "val_files": []}  # of a text that is found by its name
SAME_TEXT = ("name", "sha256", *NO_FILES)  # what may differ between two ways to name one text


@dataclass
class DataConfig:
    """The text that models are trained on, or the images."""

    name: str = setting(
        "auto", "which text; auto: tiny Shakespeare, or Python's documentation", group="data", in_run_id=False
    )
    file: str | None = setting(None, "the text, UTF-8", only=("path",), in_run_id=False)
    sha256: str | None = setting(
        None, "checksum of the text; filled in when a study is resolved, then enforced"
    )
    files: list[str] = setting(
        [], "shards of training tokens, paths or patterns, in order", only=BIN, in_run_id=False, most=10_000
    )
    val_files: list[str] = setting(
        [], "shards of validation tokens, likewise", only=BIN, in_run_id=False, most=10_000
    )
    vocabulary: int = setting(
        50304, "tokens that the model knows: more than the largest in the shards", low=2, high=65536, only=BIN
    )
    val_tokens: int = setting(
        10_485_760,
        "that the validation split predicts, from the first of its shards on, and the test split after them",
        "tokens",
        low=1,
        high=10**9,
        only=BIN,
    )
    order: str = setting(
        "in_order",
        "batches are the shards from their beginning, the same for every seed; or windows drawn by the seed",
        choices=("in_order", "random"),
        only=BIN,
    )


def of_its_own(data: DataConfig, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what settings of a text of one's own say beside a run's `data`: without its checksum, and
    without its files where they name another kind of text."""
    files = NO_FILES if settings.get("name", data.name) != data.name else {}
    return {"name": data.name, **files, "sha256": None, **settings}


def _refuses(data: DataConfig) -> Iterator[str]:
    if data.name == "path" and not data.file:
        yield "data=path needs data.file=FILE, a UTF-8 text."
    lacking = [key for key in ("files", "val_files") if not getattr(data, key)]
    if data.name == "bin" and lacking:
        yield f"data=bin needs data.{lacking[0]}=PATTERN, shards of tokens: 'folder/*_train_*.bin'."


def _needs(data: DataConfig) -> Iterator[Need]:
    if data.name == "digits":  # which come with it
        yield Need("data=digits", "scikit-learn", "lowbit")


def _clashes(data: DataConfig, run: Any) -> Iterator[str]:
    if data.name != "bin":
        return
    if run.workload.name != "gpt":
        yield f"data=bin is read as it is trained on, workload={run.workload.name} wants all: choose another."
    for key, wants_text in {
        "tokens": run.tokens.name != "characters",
        "partition": run.partition.name != "uniform",
        "final_windows": run.final_windows > 0,
        "budget.probe_tokens=held": run.stabilizer.name == "ebc" and run.budget.probe_tokens == "held",
    }.items():
        if wants_text:
            yield f"data=bin is tokens already, too many to look at: leave {key} at its default."


DATA = Part("data", DataConfig, place=10, refuses=_refuses, needs=_needs, clashes=_clashes)
