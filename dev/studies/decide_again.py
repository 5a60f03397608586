"""Decide a recorded study again after a rule has changed: the same runs, new decisions, nothing trained.

    python dev/studies/decide_again.py docs/evidence/paper.zip

Writes the bundle anew in its place, brief. `ebc-lab why FILE --replay` before it shows what will change.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ebc_lab.config.identity import recorded_environment
from ebc_lab.records.json_files import as_json
from ebc_lab.study.stages.stage import planned_runs, stage_of
from ebc_lab.study.store.bundle import unpack
from ebc_lab.study.store.snapshot import read
from ebc_lab.study.store.study import Study


def main(bundle: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / bundle.stem
        snapshot = read(unpack(bundle, root))
        config, made = snapshot.config, dict[str, Any]()
        with recorded_environment(snapshot.header["environment"]):
            for stage in config.study.stages:
                specs, results = planned_runs(stage, config, made, snapshot.results_of)
                made[stage] = as_json(stage_of(stage).decide(config, specs, results, made))
                Study(root).write_decision(stage, made[stage])
        again = Path(folder) / bundle.name
        subprocess.run(["ebc-lab", "report", str(root)], check=True)
        subprocess.run(["ebc-lab", "export", str(root), "--brief", "-o", str(again)], check=True)
        shutil.move(again, bundle)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
