"""Real drivers in processes of their own, for the tests of what happens to them."""

import subprocess
import sys
from pathlib import Path

import pandas as pd

from ebc_lab.report.tables import TIMING_COLUMNS
from ebc_lab.study.session import Session, state_dir
from ebc_lab.study.store import Study

CLI = [sys.executable, "-c", "from ebc_lab.cli import main; main()"]


def without_timing(path: Path) -> str:
    """A summary as text, without the columns that no two runs share."""
    return pd.read_csv(path).drop(columns=list(TIMING_COLUMNS)).to_csv()


def sessions(study: Study, launcher: str) -> list[Session]:
    """Where the study's drivers and workers meet, or met."""
    return [Session(p.parent) for p in state_dir(study, launcher).glob("session-*/session.json")]


def until(driver: subprocess.Popen, *texts: str) -> str:
    """Read a driver's lines until one holds each of the texts, in this order. -> all that was read."""
    read = []
    for text in texts:
        for line in driver.stdout:
            read.append(line)
            if text in line:
                break
        else:
            raise AssertionError(f"never said {text!r}:\n{''.join(read)}")
    return "".join(read)
