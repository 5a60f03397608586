"""The table of arms and checks: PYTHONPATH=tests python -m support.emulated [ARM …]"""

from __future__ import annotations

from support.emulated import device, listing

device.install()

import sys  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
import traceback  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
from support.emulated.arms import ARMS  # noqa: E402
from support.emulated.trials import counted, trial  # noqa: E402

from ebc_lab.config import machine  # noqa: E402

torch.set_num_threads(1)
machine.first_listing = listing  # type: ignore[assignment]
text = "the cat sat on a mat and saw rain run down to sea under moon. " * 300
print("arm | captured | graphed = eager | resumed = whole | ", end="")
print("waits in graphs | waits an eager step | findings | seconds")
with tempfile.TemporaryDirectory() as place:
    path = Path(place) / "words.txt"
    path.write_text(text)
    for name in sys.argv[1:] or ARMS:
        begun = time.perf_counter()
        try:
            found = trial(ARMS[name], Path(place) / "runs", path)
        except Exception as error:
            print(f"{name} | {type(error).__name__}: {str(error)[:300]}", flush=True)
            traceback.print_exc()
            continue
        print(f"{name} | {counted(found)} | {time.perf_counter() - begun:.0f}", flush=True)
        if not found.sound:
            print("    NOT SOUND", "" if found.given_back else "(memory is not given back)")
        for sentence, times in {**found.findings, **found.eager_waits, **found.graph_waits}.items():
            print(f"    {times} × {sentence}", flush=True)
