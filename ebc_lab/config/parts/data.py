"""The text that models are trained on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..fields import setting
from ..part import Part


@dataclass
class DataConfig:
    """The text that models are trained on."""

    name: str = setting(
        "auto", "which text; auto: tiny Shakespeare, or Python's documentation", group="data", named=False
    )
    file: str | None = setting(None, "the text, UTF-8", only=("path",), named=False)
    sha256: str | None = setting(
        None, "checksum of the text; filled in when a study is resolved, then enforced"
    )


def _refuses(data: DataConfig) -> Iterator[str]:
    if data.name == "path" and not data.file:
        yield "data=path needs data.file=FILE, a UTF-8 text."


DATA = Part("data", DataConfig, place=10, refuses=_refuses)
