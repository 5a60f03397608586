"""A picture in both of its drawings: the wide one, and on demand the one for a phone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from .figure import Facts, Sheet
from .narrow import arrange


@dataclass(frozen=True)
class Picture:
    """A sheet with its place among a study's pictures.

    `name`: stem of its files; `arm`: whose picture it is, empty where it is of several.
    """

    name: str
    section: str
    sheet: Sheet
    on_phone: Callable[[], Sheet]  # draws the same for a phone
    arm: str = ""

    @property
    def entry(self) -> dict[str, str]:
        """Its line in the study's catalogue."""
        about = {"title": self.sheet.title, "alt": self.sheet.alt}
        return {"name": self.name, "section": self.section, **about, "arm": self.arm}


def picture(
    name: str, section: str, facts: Facts, draw: Callable[..., Sheet | None], *of: Any, arm_of: str = ""
) -> Iterator[Picture]:
    """Yield the picture that `draw` makes of the facts and `of`, if any. `arm_of`: the arm whose it is."""

    def on_phone() -> Sheet:
        sheet = draw(replace(facts, phone=True), *of)
        assert sheet  # as there is a wide one
        arrange(sheet)
        return sheet

    if sheet := draw(facts, *of):
        yield Picture(name, section, sheet, on_phone, arm_of)
