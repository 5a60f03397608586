"""What orchestration costs: the driver's time per run, `status` on a large study, time not spent training.

    python dev/studies/orchestration.py many [RUNS]          a study of 1,000 trivial runs on two slots
    python dev/studies/orchestration.py share [OVERRIDES…]   an autopilot (default: scale=laptop): its slots

The driver's own cost is the processor time of the process that plans, launches, decides and summarises,
without its workers.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from support.called import SMALLEST

from ebc_lab.config.compose import compose
from ebc_lab.report.conclude import concluding
from ebc_lab.study.autopilot import autopilot
from ebc_lab.study.launch.pool import slots

CLI = [sys.executable, "-c", "from ebc_lab.cli import main; main()"]
TRIVIAL = [
    *SMALLEST,
    "study.stages=[lr_sweep]",
    "lr_sweep.steps=12",
    "lr_sweep.max_extensions=0",
    "launcher.slots=2",
    "study.name=many",
]


def many(runs: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        draw = random.Random(0)
        text = Path(folder) / "text.txt"
        text.write_text("".join(draw.choices(["the ", "cat ", "sat\n"], k=600)))
        others = 6  # the winner's replicates and decaying controls
        grid = ",".join(f"{1e-2 * (1 + i / 1000):.6g}" for i in range(runs - others))
        asked = [*TRIVIAL, f"data.file={text}", f"output_dir={folder}/out", f"lr_sweep.grids.adam=[{grid}]"]
        config = compose(asked)
        cpu_before = time.process_time()
        wall_before = time.perf_counter()
        done = autopilot(config, concluding())
        cpu = time.process_time() - cpu_before
        wall = time.perf_counter() - wall_before
        trained = done.trained
        results = [json.loads(p.read_text()) for p in done.study.runs.glob("*/result.json")]
        own = f"the driver's own time {cpu:.1f} s, {1e3 * cpu / trained:.1f} ms a run"
        print(f"{trained} runs in {wall:.1f} s; {own}")
        print(f"training took the two workers {sum(r['wall_s'] for r in results):.1f} s")
        cpu = time.process_time()
        again = autopilot(config, concluding())
        print(f"a second call, which trains {again.trained}: {time.process_time() - cpu:.1f} s")
        for command in (["status"], ["status", "--json"], ["why"], ["verify"], ["why", "--replay"]):
            taken = []
            for _ in range(3):
                begun = time.perf_counter()
                subprocess.run(
                    [*CLI, *command[:1], "many", *command[1:], "--output-dir", f"{folder}/out"],
                    check=True,
                    capture_output=True,
                )
                taken.append(time.perf_counter() - begun)
            print(f"ebc-lab {' '.join(command):<14} {sorted(taken)[1]:.2f} s (median of three)")


def share(overrides: list[str]) -> None:
    config = compose(overrides or ["scale=laptop"])
    begun = time.perf_counter()
    done = autopilot(config, concluding(say=print))
    wall = time.perf_counter() - begun
    results = [json.loads(p.read_text()) for p in done.study.runs.glob("*/result.json")]
    trained = sum(r.get("wall_s") or 0.0 for r in results)
    n = slots(config)
    each = f"training and its evaluations {trained:.1f} s, {trained / n:.1f} s a slot"
    print(f"{wall:.1f} s of wall time on {n} slots; {each}")
    print(f"not spent training: {100 * (1 - trained / (n * wall)):.1f}% of the slots' time")


if __name__ == "__main__":
    kind = sys.argv[1] if len(sys.argv) > 1 else ""
    if kind == "many":
        many(int(sys.argv[2]) if len(sys.argv) > 2 else 1000)
    elif kind == "share":
        share(sys.argv[2:])
    else:
        sys.exit(__doc__)
