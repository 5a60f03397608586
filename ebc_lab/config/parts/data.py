from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..fields import setting
from ..part import Part, Run

BIN = ("bin",)
TEXTS = "a file, a list of files, a folder (its .txt files and those below it) or a pattern"
FILES: dict[str, Any] = {"texts": True, "most": 10_000}
SHARDS: dict[str, Any] = {"only": BIN, "in_run_id": False, "most": 10_000}
NO_FILES: dict[str, Any] = {"file": None, "files": [], "val_files": []}  # for a text found by its name
SAME_TEXT = ("name", "sha256", *NO_FILES)  # settings that may differ although the text is the same


@dataclass
class DataConfig(Part):
    """The text that models are trained on, or the images."""

    name: str = setting(
        "auto", "which text; auto: tiny Shakespeare, or Python's documentation", group="data", in_run_id=False
    )
    file: Any = setting(None, f"the text, UTF-8: {TEXTS}", only=("path",), in_run_id=False, **FILES)
    sha256: str | None = setting(
        None, "checksum of the text; filled in when a study is resolved, then enforced"
    )
    files: list[str] = setting([], "shards of training tokens, paths or patterns, in order", **SHARDS)
    val_files: list[str] = setting([], "shards of validation tokens, likewise", **SHARDS)
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

    place = 10
    required = {"digits": ("scikit-learn", "lowbit")}  # the library contains these images

    def __post_init__(self) -> None:
        if type(self.file) is int:  # a file or folder whose name is a number: data.file=2024
            self.file = str(self.file)

    def refuses(self, run: Run) -> Iterator[str]:
        if self.name == "path" and not self.file:
            yield "data=path needs data.file=FILE, a UTF-8 text."
        if self.name != "bin":
            return
        for key in ("files", "val_files"):
            if not getattr(self, key):
                yield f"data=bin needs data.{key}=PATTERN, shards of tokens: 'folder/*_train_*.bin'."
        workload = run.workload.name
        if workload != "gpt":
            yield f"data=bin is read as it is trained on, workload={workload} wants all: choose another."
        for key in set_for_a_text(run):
            yield f"data=bin is tokens already, too many to look at: leave {key} at its default."


def set_for_a_text(run: Run) -> Iterator[str]:
    """Yield those of a run's settings that need a text of characters and are not at their defaults."""
    if run.tokens.name != "characters":
        yield "tokens"
    if run.partition.name != "uniform":
        yield "partition"
    if run.final_windows > 0:
        yield "final_windows"
    if run.stabilizer.name == "ebc" and run.budget.probe_tokens == "held":
        yield "budget.probe_tokens=held"


def data_of_another_text(data: DataConfig, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of `data` for an arm or other entry that names its own text. The entry inherits the
    study's kind of text and, if it keeps that kind, the study's files, but never the checksum."""
    files = NO_FILES if settings.get("name", data.name) != data.name else {}
    return {"name": data.name, **files, "sha256": None, **settings}
