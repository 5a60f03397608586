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
