"""The parts of a run, in the order in which they show in its name: every `Part` of a file in this folder.

What a file is about is said where its settings are: docs/settings.md prints it from there.
"""

import pkgutil
from importlib import import_module

from ..part import Part, Run

for _module in pkgutil.iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
PARTS = tuple(sorted(Part.__subclasses__(), key=lambda part: (part.place, part.group_name)))
PART: dict[str, type[Part]] = {part.group_name: part for part in PARTS}


def parts_of(run: Run) -> list[Part]:
    """Return the settings of every part of a run, in the order of `PARTS`."""
    return [part.from_run(run) for part in PARTS]
