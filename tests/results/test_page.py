"""docs/results.md: its code runs on a study, and its tables are the program's."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ebc_lab.records import columns

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "results.md").read_text()
OF_RUNS = {k: columns.RUN_MEANINGS[k] for k in columns.RUN_MEANINGS if k not in columns.COLUMN_MEANINGS}


@pytest.mark.thorough
def test_the_code_of_the_page_runs(finished, tmp_path):
    """In a folder of its own, in which a finished study is called laptop."""
    (tmp_path / "outputs" / "ebc_ablation").mkdir(parents=True)
    (tmp_path / "outputs" / "ebc_ablation" / "laptop").symlink_to(finished[1].study.root)
    [code] = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "nats/token" in done.stdout
    assert (tmp_path / "curve.png").stat().st_size > 1000
