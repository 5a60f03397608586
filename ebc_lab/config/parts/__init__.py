"""The parts of a run: every `Part` defined in this folder, in the order in which a run's name contains them.

The docstring of a part's class is its description, which docs/settings.md prints.
"""

import pkgutil
from importlib import import_module

from ..part import Part, Run

for _module in pkgutil.iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
PARTS = tuple(sorted(Part.__subclasses__(), key=lambda part: (part.place, part.group_name)))
PART: dict[str, type[Part]] = {part.group_name: part for part in PARTS}


def parts_of(run: Run) -> list[Part]:
    """Return every part of a run, with its settings, in the order of `PARTS`."""
    return [part.from_run(run) for part in PARTS]
