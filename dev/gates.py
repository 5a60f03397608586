"""Show that a change of the code changed nothing else: what two checkouts compute, say and write, compared.

    python dev/gates.py record CHECKOUT FILE.json [GATE …]
    python dev/gates.py compare BEFORE.json AFTER.json    prints every difference, and exits with 1 if any

`record` runs the command line of the checkout, in a process of its own, on its own configuration and on the
recorded studies beside this script, so that both checkouts are asked the same:

* `names`: each run in docs/evidence, named again from its recorded settings;
* `bytes`: sha256 of steps.csv of a short run of each optimizer × budget × workload, and of each
  other choice of a group once; of a combination that is refused, the sentence;
* `plans`: runs, steps and tokens of every suite and scale, as `plan` counts them;
* `outputs`: what `status`, `why`, `why --replay` and `verify` print, as text and as JSON, and the tables and
  decisions that `report` writes, of every recorded study, of a bundle of version 0.2 and of one smoke study
  that is trained for it.

Times, versions, folders and process numbers are left out; the smoke study is trained anew, so what it says of
times, its overhead above all, differs. Both recordings need the same processor, torch and libraries. A whole
one takes about half an hour of one core.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]
BUNDLES = [*sorted(HERE.glob("docs/evidence/*.zip")), HERE / "tests/study/store/made_by_0_2.bundle"]
SMALL = ["scale=smoke", "model.blocks=1", "model.width=16", "model.context=16", "batch_size=10", "device=cpu"]
SMALL += ["budget.probe_sequences=2", "steps=6"]
SIZES = {  # what a workload needs besides
    "ebm": ["ebm.splats=16"],
    "images": ["data=digits", "model=cnn", "model.context=1", "batch_size=20"],
}
GROUPS = (
    *(
        "adapter",
        "controller",
        "determinism",
        "init",
        "lr_schedule",
        "memory",
        "partition",
        "policy",
        "projection",
    ),
    *(
        "quantizer",
        "race",
        "shock",
        "stabilizer",
        "target",
        "tokens",
        "encoder",
        "decoder",
        "index",
        "sampler",
    ),
)
WORKLOADS = ("gpt", "ebm", "images")
MARK = "@gate "  # before a line that is recorded
# what differs between two recordings of the same code
UNSTEADY = re.compile(
    r"/tmp/[\w./-]+|\b[0-9a-f]{40}\b|process \d+|\d{4}-\d\d-\d\d[T ]\d\d[:-]\d\d[:-][\d.:+]*"
    r"|\b\d+(\.\d+)? ?(ms|s|min|h|d|kB|MB|GB|days?|hours?|core hours?)\b"
    r"|\d+ (seconds?|minutes?|days?|weeks?) ago|\b\d\.\d\.\d(\.dev\d+)?(\+\w+)*\b"
)
UNSTEADY_KEYS = {
    *(
        "eta_s",
        "gpu_hours",
        "flop_hours",
        "age_s",
        "seconds",
        "written",
        "at",
        "pid",
        "host",
        "version",
        "path",
    ),
    *(
        "root",
        "began",
        "ended",
        "revision",
        "machine",
        "wall_s",
        "tokens_per_s",
        "elapsed_s",
        "size",
        "bytes",
    ),
}


def steady(text: str) -> str:
    """Return a text without what differs from call to call."""
    text = UNSTEADY.sub("…", text.replace(str(HERE), "…"))
    return "\n".join(" ".join(line.split()) for line in text.splitlines())


def steady_json(value: object) -> object:
    """Return a JSON value without what differs from call to call."""
    if isinstance(value, dict):
        return {k: steady_json(v) for k, v in value.items() if k not in UNSTEADY_KEYS}
    if isinstance(value, list):
        return [steady_json(v) for v in value]
    return steady(value) if isinstance(value, str) else value


def answer(*arguments: str) -> tuple[int, str]:
    """Run `ebc-lab ARGUMENTS…` in this process and folder -> exit code, what it printed."""
    from support.called import called

    done = called(*arguments, cwd=Path())
    return done.returncode, done.stdout + done.stderr


def printed(*arguments: str) -> str:
    """Return what a command prints and its exit code, steady; of `--json`, the value."""
    code, text = answer(*arguments)
    if "--json" in arguments and code == 0:
        with contextlib.suppress(ValueError):
            return f"{code} {json.dumps(steady_json(json.loads(text)), sort_keys=True, indent=1)}"
    return f"{code} {steady(text)}"


def names() -> Iterator[tuple[str, str]]:
    """Yield (bundle and run, the name that today's code gives its recorded settings)."""
    from ebc_lab.config.dicts import from_dict
    from ebc_lab.config.errors import UserError
    from ebc_lab.config.identity import run_id
    from ebc_lab.config.schema import RunConfig

    for bundle in BUNDLES:
        with zipfile.ZipFile(bundle) as archive:
            for spec in recorded_specs(archive):
                try:
                    named = run_id(spec["kind"], from_dict(RunConfig, spec["config"]))
                except (UserError, LookupError, AttributeError) as error:
                    named = steady(str(error))
                yield f"{bundle.stem} {spec['run_id']}", named


def recorded_specs(archive: zipfile.ZipFile) -> Iterator[dict[str, Any]]:
    """Yield the spec of each run of a bundle, which has them as files, or all of them in one."""
    for name in archive.namelist():
        if name == "runs.jsonl":
            for line in archive.read(name).decode().splitlines():
                yield from (
                    json.loads(text) for file, text in json.loads(line).items() if "spec.json" in file
                )
        elif name.endswith("/spec.json"):
            yield json.loads(archive.read(name))


def choices(group: str) -> list[str]:
    return sorted(p.stem for p in (HERE / "conf" / group).glob("*.yaml") if p.stem not in ("custom", "auto"))


def trained() -> Iterator[list[str]]:
    """Yield the overrides of each short run."""
    for optimizer, budget, workload in itertools.product(choices("optimizer"), choices("budget"), WORKLOADS):
        yield [f"optimizer={optimizer}", f"budget={budget}", f"workload={workload}"]
    for group in GROUPS:
        workload = "ebm" if group in ("encoder", "decoder", "index", "sampler") else "gpt"
        for choice in choices(group):
            yield [f"{group}={choice}", f"workload={workload}"]


def byte_sums() -> Iterator[tuple[str, str]]:
    """Yield (overrides, sha256 of steps.csv, or the sentence that refuses them)."""
    for overrides in trained():
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            sizes = [SIZES[w] for w in SIZES if f"workload={w}" in overrides]
            code, text = answer("train", *SMALL, *overrides, *itertools.chain(*sizes))
            files = sorted(Path().rglob("steps.csv"))
            sums = [hashlib.sha256(f.read_bytes()).hexdigest()[:16] for f in files]
            last = steady(text.strip().splitlines()[-1]) if text.strip() else ""
            yield " ".join(overrides), f"{code} {' '.join(sums)}" if code == 0 else f"{code} {last}"


def plans() -> Iterator[tuple[str, str]]:
    """Yield (suite and scale, what `plan` counts)."""
    for suite in choices("study"):
        for scale in ("smoke", "mini", "laptop", "paper"):
            yield (
                f"{suite} {scale}",
                printed("plan", f"study={suite}", f"scale={scale}", "device=cpu", "--json"),
            )


def outputs() -> Iterator[tuple[str, str]]:
    """Yield (command and study, what it prints or writes)."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        answer("autopilot", "scale=smoke", "study.name=smoke", "output_dir=.", "device=cpu", "compile=off")
        shutil.copy(BUNDLES[-1], "made_by_0_2.zip")  # a bundle by its name
        for study in [*BUNDLES[:-1], Path("made_by_0_2.zip"), Path("smoke")]:
            about = study.name
            for command in ("status", "why", "verify"):
                yield f"{command} {about}", printed(command, str(study))
                yield f"{command} --json {about}", printed(command, str(study), "--json")
            yield f"why --replay {about}", printed("why", "--replay", str(study))
            unpacked = Path("unpacked") / study.stem
            if study.suffix:
                yield f"report {about}", printed("report", str(study), "--output", str(unpacked))
            else:
                unpacked = study
                yield f"report {about}", printed("report", str(study))
            for file in sorted(unpacked.rglob("*")):
                inside = file.relative_to(unpacked)
                if inside.parts[0] == "runs" or file.suffix not in (".csv", ".md", ".tex", ".json"):
                    continue
                if inside.name in ("manifest.json", "ro-crate-metadata.json"):  # digests of page and pictures
                    continue
                text = file.read_text()
                with contextlib.suppress(ValueError):
                    if file.suffix == ".json":
                        text = json.dumps(steady_json(json.loads(text)), sort_keys=True, indent=1)
                yield f"{about}: {inside}", steady(text)


GATES = {"names": names, "bytes": byte_sums, "plans": plans, "outputs": outputs}


def record(checkout: Path, file: Path, wanted: list[str]) -> None:
    """Write what the code in `checkout` does, gate by gate."""
    found: dict[str, dict[str, str]] = json.loads(file.read_text()) if file.exists() else {}
    for gate in wanted or list(GATES):
        child = [sys.executable, __file__, "--child", gate]
        env = {
            **os.environ,
            "PYTHONPATH": f"{checkout}:{HERE / 'tests'}",
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "120",
            "NO_COLOR": "1",
        }
        lines = subprocess.run(child, env=env, check=True, capture_output=True, text=True).stdout.split("\n")
        found[gate] = dict(json.loads(line.removeprefix(MARK)) for line in lines if line.startswith(MARK))
        file.write_text(json.dumps(found, indent=1))
        print(f"{gate}: {len(found[gate])} recorded", flush=True)


def compare(before: Path, after: Path) -> int:
    """Print every difference -> 1 where there is one."""
    import difflib

    old, new = json.loads(before.read_text()), json.loads(after.read_text())
    differing = 0
    for gate in old:
        now = new.get(gate, {})
        keys = [key for key in {**old[gate], **now} if old[gate].get(key) != now.get(key)]
        print(f"{gate}: {len(old[gate])} before, {len(now)} after, {len(keys)} differ")
        differing += len(keys)
        for key in keys:
            lines = difflib.unified_diff(
                old[gate].get(key, "nothing").splitlines(),
                now.get(key, "nothing").splitlines(),
                lineterm="",
                n=0,
            )
            print(f"  {key}", *[f"    {line}" for line in list(lines)[2:14]], sep="\n")
    return int(differing > 0)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["--child", gate]:
            real = sys.stdout
            for pair in GATES[gate]():
                print(MARK + json.dumps(pair), file=real, flush=True)
        case ["record", checkout, file, *wanted]:
            record(Path(checkout).resolve(), Path(file), wanted)
        case ["compare", before, after]:
            sys.exit(compare(Path(before), Path(after)))
        case _:
            sys.exit(__doc__)
