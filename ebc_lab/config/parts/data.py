"""The text that models are trained on, or the images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..fields import setting
from ..machine import installed
from ..part import Part


@dataclass
class DataConfig:
    """The text that models are trained on, or the images."""

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
    if data.name == "digits" and not installed("sklearn"):
        yield "data=digits comes with the library scikit-learn: pip install 'ebc-lab[lowbit]'."


DATA = Part("data", DataConfig, place=10, refuses=_refuses)
