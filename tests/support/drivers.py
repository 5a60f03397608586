"""Real drivers in processes of their own, for the tests of what happens to them."""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd

from ebc_lab.records.columns import TIMING_COLUMNS
from ebc_lab.study.launch.session import Session, state_dir
from ebc_lab.study.store.study import Study

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


STRIKING = """
import os, sys
if "ebc_lab.study.launch.worker" in " ".join(sys.orig_argv):
    import importlib.abc, importlib.machinery

    class Finder(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path, target=None):
            if name != "ebc_lab.training.run":
                return None
            sys.meta_path.remove(self)
            import ebc_lab.components.optimizers as optimizers
            build = optimizers.build

            def broken(*asked):
                if not os.path.exists({mark!r}):
                    open({mark!r}, "w").close()
                    raise {error}
                return build(*asked)

            optimizers.build = broken
            return None

    sys.meta_path.insert(0, Finder())
"""


def struck_once(folder: Path, error: str) -> str:
    """A PYTHONPATH under which the first run that a worker builds dies of `error`, once; then
    `folder`/struck is there.
    """
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(
        STRIKING.format(mark=str(folder / "struck"), error=error)
    )
    return os.pathsep.join([str(folder / "site"), *filter(None, [os.environ.get("PYTHONPATH")])])
