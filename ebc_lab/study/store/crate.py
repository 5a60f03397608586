"""ro-crate-metadata.json: a description of a study's files, for archives and programs other than this one.

The file follows RO-Crate 1.1 and the profile Process Run Crate 0.5. Its contents come from other files of the
study, and never from the clock, so the same study gives the same bytes on any machine. The manifest lists the
file like every other file that is computed from the runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from ebc_lab.config.errors import UserError
from ebc_lab.records.files import read_regular, write_atomic
from ebc_lab.records.paths import RunFiles

from . import attempts, manifest
from .study import Study

SPECIFICATION = "https://w3id.org/ro/crate/1.1"
PROFILE = "https://w3id.org/ro/wfrun/process/0.5"
ACTION, SOFTWARE, CORPUS, LICENSE = "#study", "#ebc-lab", "#corpus", "#license"
FORMATS = {  # fixed here because the `mimetypes` of machines differ
    ".csv": "text/csv",
    ".html": "text/html",
    ".json": "application/json",
    ".jsonl": "application/x-ndjson",
    ".md": "text/markdown",
    ".pdf": "application/pdf",
    ".png": "image/png",
    ".py": "text/x-python",
    ".svg": "image/svg+xml",
    ".tex": "text/x-tex",
    ".txt": "text/plain",
    ".yaml": "application/yaml",
    ".yml": "application/yaml",
}
ATTEMPTS = RunFiles(Path()).attempts.name
MEANINGS = {
    "study.json": "settings, checksum of the text, versions, hardware",
    "auto_decisions.json": "what each stage decided, and from which runs",
    "results_final.json": "the decision that answers the study",
    "report.html": "the results as a page",
    manifest.NAME: "sha256 of every file",
}

Entity = dict[str, Any]


def complete(study: Study) -> None:
    """Write the description of a study's files and complete the manifest. A command calls this at its end."""

    def describe(entries: Mapping[str, str]) -> None:
        content = text_for(study, entries).encode()
        path = study.crate_file
        with suppress(OSError, UserError):
            if read_regular(path, len(content)) == content:
                return
        manifest.remove_entries(study.root, path.name)
        write_atomic(path, content)

    manifest.complete(study.root, describe)


def text_for(study: Study, entries: Mapping[str, str]) -> str:
    """Return the description of a study as JSON. `entries`: path -> sha256 of every recorded file, except the
    manifest and the description itself."""
    header = study.header()
    runs = sorted({run for path in entries if (run := manifest.owning_run(path))})
    tops = sorted(path for path in [*entries, manifest.NAME] if manifest.owning_run(path) is None)
    parts = [_link(quote(path)) for path in (*tops, *(f"{study.runs.name}/{run}/" for run in runs))]
    last_end = _last_end(study, entries) or _time(header["created"])
    stages = ", ".join(header["config"]["study"]["stages"])
    machine = header["hardware"]
    gpus = ", ".join(map(str, machine.get("gpus") or ())) or "no GPU"
    made_on = f"{machine.get('cpu')}, {machine.get('cores')} cores, {gpus}, {machine.get('system')}"
    graph = [
        _entity(study.crate_file.name, "CreativeWork", conformsTo=_link(SPECIFICATION), about=_link("./")),
        _entity(
            "./",
            "Dataset",
            name=f"ebc-lab study {header['study']}",
            description=f"Evidence of the study {header['study']}: {len(runs)} runs on "
            f"{header['corpus']['title']}, in the stages {stages}, with settings, decisions and checksums.",
            datePublished=last_end,
            license=_link(LICENSE),
            conformsTo=_link(PROFILE),
            hasPart=parts,
            mentions=_link(ACTION),
        ),
        _entity(
            LICENSE,
            "CreativeWork",
            name="no license stated",
            description="The program does not know under which terms its users publish their results: ask "
            "those who published these.",
        ),
        _entity(PROFILE, "CreativeWork", name="Process Run Crate", version="0.5"),
        _entity(  # the action that made the files: one command, or several that continued the study
            ACTION,
            "CreateAction",
            name=f"ebc-lab autopilot, study {header['study']}",
            description=f"`ebc-lab autopilot` with the settings in study.json, on {made_on}; revision "
            f"{header['git'] or 'not known'}. The end is that of the last run.",
            startTime=_time(header["created"]),
            endTime=last_end,
            instrument=_link(SOFTWARE),
            object=[_link("study.json"), _link(CORPUS)],
            result=[part for part in parts if part["@id"] != "study.json"],
        ),
        *_used(header),
        *_data(study, entries, runs),
    ]
    return json.dumps({"@context": f"{SPECIFICATION}/context", "@graph": graph}, indent=1) + "\n"


def _entity(entity_id: str, kind: str, /, **properties: Any) -> Entity:
    return {"@id": entity_id, "@type": kind, **properties}


def _link(name: str) -> Entity:
    return {"@id": name}


def _used(header: Mapping[str, Any]) -> Iterator[Entity]:
    """Yield the entities of the corpus and of the software, with the names and versions in study.json."""
    versions = {name: str(found) for name, found in header["versions"].items() if found and name != "ebc-lab"}
    yield _entity(
        CORPUS,
        "CreativeWork",
        name=header["corpus"]["title"],
        description="the text that was trained on; it is not in here",
        identifier=f"sha256:{header['corpus']['sha256']}",
    )
    needed = [_link(f"#{name}") for name in versions]
    software = "SoftwareApplication"
    yield _entity(SOFTWARE, software, name="ebc-lab", version=header["ebc_lab"], softwareRequirements=needed)
    for name, found in versions.items():
        yield _entity(f"#{name}", software, name=name, version=found)


def _data(study: Study, entries: Mapping[str, str], runs: Iterable[str]) -> Iterator[Entity]:
    """Yield the entities of each run's folder and of every file. The entity of the manifest has no sha256 or
    size, because the manifest holds the sha256 of this description."""
    inside: dict[str, list[Entity]] = {run: [] for run in runs}
    for path in sorted(entries):
        if run := manifest.owning_run(path):
            inside[run].append(_link(quote(path)))
    for run, parts in inside.items():
        yield _entity(quote(f"{study.runs.name}/{run}/"), "Dataset", name=f"run {run}", hasPart=parts)
    for path in sorted([*entries, manifest.NAME]):
        pure = PurePosixPath(path)
        file = _entity(quote(path), "File", name=pure.name)
        file["encodingFormat"] = FORMATS.get(pure.suffix, "application/octet-stream")
        if path in MEANINGS:
            file["description"] = MEANINGS[path]
        if path in entries:
            file["sha256"] = entries[path]
            with suppress(FileNotFoundError):  # `verify` reports a missing file
                file["contentSize"] = str((study.root / path).stat().st_size)
        yield file


def _last_end(study: Study, entries: Iterable[str]) -> str | None:
    """Return the time of the last `end` event in the logs of attempts in `entries`; None if there is none."""
    logs = [path for path in entries if path.endswith(f"/{ATTEMPTS}")]
    events = (event for path in logs for event in attempts.log((study.root / path).parent))
    times = []
    for event in events:
        with suppress(KeyError, ValueError):  # a line that this program did not write
            times += [_time(str(event["at"]))] if event["event"] == "end" else []
    return max(times, default=None)


def _time(recorded: str) -> str:
    """Return a recorded time as an RFC 3339 string in UTC; such strings sort chronologically."""
    return datetime.fromisoformat(recorded).astimezone(UTC).isoformat(timespec="milliseconds")
