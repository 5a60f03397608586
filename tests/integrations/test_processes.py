"""Both trainers with DDP over two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ebc_lab.records.json_files import read_json

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_both_processes_of_a_trainer_take_the_same_steps(tmp_path):
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*run, str(ROOT / "tests" / "support" / "trainers_worker.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("lightning", "hugging_face"):
        first, second = (read_json(tmp_path / f"{name}-{rank}.json") for rank in (0, 1))
        assert first == second
        assert len(first["c"]) == 8
        assert min(first["c"]) < 0.9
