import re
import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).parent.parent / "scripts"


def test_the_example_loop_learns_and_holds_its_budget():
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "own_loop.py"), "--steps", "101"], capture_output=True, text=True, check=True
    )
    lines = [[float(x) for x in re.findall(r"\d+\.\d+", line)] for line in done.stdout.splitlines()]
    losses, applied = [line[0] for line in lines], [line[2] for line in lines]
    assert losses[-1] < losses[0] - 1
    assert all(0.003 < kl < 0.03 for kl in applied)


def test_small_updates_do_not_reach_bfloat16_parameters():
    overrides = ["scale=smoke", "data=pydoc", "steps=20", "optimizer.lr=3e-3", "device=cpu"]
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "bf16_parameters.py"), *overrides], capture_output=True, text=True, check=True
    )
    rows = [[float(x) for x in line.split()] for line in done.stdout.splitlines()[2:]]
    ratio = {row[0]: row[3] for row in rows}
    assert ratio[1.0] < 1.5
    assert ratio[0.01] > 3 * ratio[1.0]
