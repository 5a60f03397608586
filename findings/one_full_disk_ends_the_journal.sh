#!/usr/bin/env bash
# One worker that could not finish its line spoils Optuna's journal for all: the next result is lost, then everything.
#
# Guess: a line that was cut is dropped when the journal is read, as the reader says of the last line, and goes on.
# Seen, optuna 5.0.0: a worker's disk is full in the middle of a record (here: a limit on the file's size), it gets its
# OSError and ends. Another worker's tell() then writes behind the torn line, on the same line. tell() reports
# success, and the trial is RUNNING for ever. One more record, and each load_study and ask ends with JSONDecodeError,
# also those of workers that had been at it all the time; the file has to be mended by hand.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/python" -m pip install --quiet --disable-pip-version-check optuna==5.0.0
cd "$place"
cat > "$place/study.py" <<'PYTHON'
import json
import os
import resource
import subprocess
import sys

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

optuna.logging.set_verbosity(optuna.logging.ERROR)


def opened(make=optuna.load_study):
    return make(study_name="sweep", storage=JournalStorage(JournalFileBackend("journal.log")))


if sys.argv[1:]:  # the other worker
    study, least = opened(), os.path.getsize("journal.log") + 60
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (least, before[1]))
    try:
        study.ask()
    except OSError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        print("the other worker:", error)
        sys.exit()
    raise SystemExit("the record had room")

print("optuna", optuna.__version__)
study = opened(optuna.create_study)
trial = study.ask()
subprocess.run([sys.executable, __file__, "full"], check=True)
study.tell(trial, 0.5)
states = [each.state.name for each in opened().trials]
print("after tell:", states)
assert states == ["RUNNING"]
for name, call in (("ask", study.ask), ("load_study", lambda: opened().trials)):
    try:
        call()
    except json.JSONDecodeError as error:
        print(f"{name}: JSONDecodeError:", error)
    else:
        raise SystemExit(f"{name} goes on now")
PYTHON
"$place/venv/bin/python" -W ignore "$place/study.py"
