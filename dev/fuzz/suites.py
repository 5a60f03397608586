"""Suites, choices and optimizers of one's own, and overrides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .changes import (
    Draw,
    changed_text,
    changed_tree,
    changed_yaml,
    odd,
)
from .target import (
    ROOT,
    Target,
    ask,
    tree_of,
    write_tree,
)


class Suites(Target):
    """Suites and choices in YAML, optimizers in Python, and overrides."""

    def make(self, folder: Path, more: Path | None) -> Any:
        from support.called import answered

        answered("new", "cautious", cwd=folder)
        starter = tree_of(folder)
        own = {
            f"{path.stem}.yaml": path.read_bytes() for path in sorted((ROOT / "conf/study").glob("*.yaml"))
        }
        own |= {path.name: path.read_bytes() for path in sorted((ROOT / "docs/evidence").glob("*.yaml"))}
        parts = {
            f"{group}/{path.name}": path.read_bytes()
            for group in (
                "optimizer",
                "budget",
                "scale",
                "launcher",
                "stabilizer",
                "lr_schedule",
                "model",
                "target",
            )
            for path in sorted((ROOT / "conf" / group).glob("*.yaml"))
        }
        code = {path.name: path.read_bytes() for path in sorted((ROOT / "docs/evidence").glob("*.py"))}
        from ebc_lab.config.overrides import schema_keys

        return starter, own, parts, code, sorted(schema_keys())

    def attack(self, draw: Draw, folder: Path) -> str:
        starter, suites, parts, code, keys = self.real
        given = ["data=path", "data.file=words.txt"]
        (folder / "words.txt").write_text("the cat sat on a mat. " * 400)
        match draw.below(8):
            case 0 | 1 | 2:
                name = draw.of(sorted(suites))
                (folder / name).write_bytes(changed_yaml(draw, suites[name]))
                write_tree(code, folder)
                given += [f"study=./{name}", "scale=smoke"]
            case 3 | 4:
                write_tree(changed_tree(draw, starter), folder)
                given += ["study=./cautious.yaml", "scale=smoke"]
            case 5:
                name = draw.of(sorted(parts))
                group, _, file = name.partition("/")
                (folder / file).write_bytes(changed_yaml(draw, parts[name]))
                given += [f"{group}=./{file}"]
            case 6:
                name = draw.of(sorted(parts))
                write_tree({f"conf/{Path(name).parent}/mine.yaml": changed_yaml(draw, parts[name])}, folder)
                given += [f"{Path(name).parent}=mine"]
            case _:
                given += ["scale=smoke"]
        for _ in range(draw.of([0, 1, 3])):
            value = odd(draw)
            written = value if isinstance(value, str) else json.dumps(value)
            given.append(f"{draw.of(keys)}={written}".replace("\0", ""))
            if draw.one_in(6):
                given[-1] = changed_text(draw, given[-1]).replace("\0", "")
        command = draw.of([["plan"]] * 6 + [["plan", "--json"]])
        given = [one for one in given if not one.startswith("-")]
        (folder / "arguments.json").write_text(json.dumps([*command, *given]))
        return ask([*command, *given], folder)
