"""Studies as .zip."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import warnings
import zipfile
from pathlib import Path
from typing import Any

from .changes import (
    Draw,
    Tree,
    changed_bytes,
    changed_file,
    changed_tree,
    changed_value,
)
from .target import (
    READ,
    REFUSED,
    ROOT,
    Overdue,
    Target,
    Wrong,
    ask,
    small_study,
    small_text,
)


class Bundles(Target):
    """Studies as .zip, with manifests and checksums that fit what was changed."""

    commands = tuple(
        command.split()
        for command in (
            *("status", "status --json", "why", "why --json", "why --replay", "verify", "verify --json"),
            *("report", "board", "board --json", "list", "diff", "judge", "plan", "rerun", "load"),
        )
    )

    def make(self, folder: Path, more: Path | None) -> Any:
        from support.called import answered

        study = small_study(folder)
        for name, brief in (("whole", []), ("brief", ["--brief"])):
            answered("export", str(study), "-o", str(folder / f"{name}.zip"), *brief, cwd=folder)
        paths = [folder / "whole.zip", folder / "brief.zip", ROOT / "tests/study/store/made_by_0_2.bundle"]
        paths += [p for p in sorted((ROOT / "docs/evidence").glob("*.zip")) if p.stat().st_size < 200_000]
        return [(path.stem, path.read_bytes(), self._members(path)) for path in paths]

    def _members(self, path: Path) -> Tree:
        with zipfile.ZipFile(path) as archive:
            return {name: archive.read(name) for name in archive.namelist()}

    def attack(self, draw: Draw, folder: Path) -> str:
        # the small ones, of which many can be read, half of the time
        name, whole, members = draw.of(self.real[:3] if draw.one_in(2) else self.real)
        path = folder / f"{name}.zip"
        sealed = False
        if draw.one_in(6):
            path.write_bytes(changed_bytes(draw, whole))
        else:
            sealed = not draw.one_in(6)
            path.write_bytes(self._packed(draw, self._changed(draw, members), sealed))
        command, *options = draw.of(self.commands)
        match command:
            case "board" | "list":
                return ask([command, ".", *options], folder)
            case "diff":
                (folder / "other.zip").write_bytes(whole)
                both = draw.of([[path.name, "other.zip"], ["other.zip", path.name]])
                return ask([command, *both], folder)
            case "judge":
                return ask([command, path.name, "--no-page"], folder)
            case "report":
                return ask([command, path.name, "--output", "page"], folder)
            case "plan":
                return ask([command, f"from={path.name}"], folder)
            case "rerun":  # a run that the file made long is none of our faults
                if any(n.startswith("own/") for n in members) or not draw.one_in(4):
                    return ask(["status", path.name], folder)
                (folder / "words.txt").write_text(small_text())
                try:
                    return ask([command, path.name, "data.file=words.txt", "data=path"], folder)
                except Overdue:
                    return READ
            case "load":
                from ebc_lab.config.errors import UserError
                from ebc_lab.results import load

                try:
                    loaded = load(path)
                    _ = loaded.decisions
                    for table in ("runs", "steps", "evals", "results", "arms", "differences"):
                        getattr(loaded, table)()
                except UserError:
                    return REFUSED
                return READ
        answer = ask([command, path.name, *options], folder)
        if command == "verify" and answer == READ and not sealed:
            self._compare(path, members)
        return answer

    def _compare(self, path: Path, members: Tree) -> None:
        """What verifies has the members of the real one, or is told."""
        from support.called import called

        if called("verify", path.name, cwd=path.parent).returncode == 0 and self._members(path) != members:
            raise Wrong("verify finds nothing, and the members are others")

    def _changed(self, draw: Draw, members: Tree) -> Tree:
        if "runs.jsonl" in members and draw.one_in(2):
            lines = members["runs.jsonl"].splitlines()
            at = draw.below(len(lines))
            run = json.loads(lines[at])
            if draw.one_in(8):
                run = changed_value(draw, run)
            else:
                file = draw.of([key for key in run if key != "run"])
                run[file] = self._sealed(draw, file, run[file].encode()).decode("utf-8", "replace")
            lines[at] = json.dumps(run).encode()
            return members | {"runs.jsonl": b"\n".join(lines) + b"\n"}
        if draw.one_in(5):
            return changed_tree(draw, members)
        # what decides is in these
        told = [
            "study.json",
            "auto_decisions.json",
            "study.json",
            "auto_decisions.json",
            "figures.json",
            *sorted(members),
        ]
        names = [name for name in told if name in members and name != "manifest.json"]
        name = draw.of(names)
        return members | {name: self._sealed(draw, name, members[name])}

    def _sealed(self, draw: Draw, name: str, content: bytes) -> bytes:
        """A file changed in its values, with the checksums in it that fit."""
        from ebc_lab.records.json_files import with_checksum
        from ebc_lab.study.stages.rules import SEAL

        try:
            value = json.loads(content)
        except ValueError:
            return changed_file(draw, name, content)
        changed = changed_value(draw, value)
        with contextlib.suppress(Exception):  # it is what the change made of it
            if name.endswith("auto_decisions.json"):
                changed = {
                    k: with_checksum(v, SEAL) if isinstance(v, dict) else v for k, v in changed.items()
                }
            elif isinstance(value, dict) and "checksum" in value:
                changed = with_checksum(changed)
        return json.dumps(changed).encode()

    def _packed(self, draw: Draw, members: Tree, sealed: bool) -> bytes:
        from ebc_lab.records.json_files import with_checksum

        if sealed and "manifest.json" in members:
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
                recorded = json.loads(members["manifest.json"])
                files = dict(recorded["files"])
                for name, content in self._unpacked(members).items():
                    if name != "manifest.json":
                        files[name] = hashlib.sha256(content).hexdigest()
                if draw.one_in(12):
                    recorded = changed_value(draw, recorded | {"files": files}, 1)
                else:
                    recorded |= {"files": files}
                members = members | {"manifest.json": json.dumps(with_checksum(recorded)).encode()}
        out = io.BytesIO()
        with warnings.catch_warnings(), zipfile.ZipFile(out, "w") as archive:
            warnings.simplefilter("ignore")
            for name, content in members.items():
                about = zipfile.ZipInfo(name.replace("\0", "") or "x")
                about.compress_type = draw.of([8] * 9 + [0, 12])
                archive.writestr(about, content)
                if draw.one_in(200):
                    archive.writestr(about, content)
        return out.getvalue()

    def _unpacked(self, members: Tree) -> Tree:
        """The files of a study, of which a brief bundle has those of runs in one."""
        files = {name: content for name, content in members.items() if name != "runs.jsonl"}
        for line in members.get("runs.jsonl", b"").splitlines():
            run = json.loads(line)
            files |= {f"runs/{run['run']}/{n}": text.encode() for n, text in run.items() if n != "run"}
        return files
