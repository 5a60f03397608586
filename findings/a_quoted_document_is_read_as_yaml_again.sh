#!/usr/bin/env bash
# OmegaConf.load reads a document that is one quoted string as YAML a second time, and makes settings of its text.
#
# No guess was written down: a fuzzer of our settings met it. We had taken for granted that quotes make text, so that
# a file that holds only "lr: 0.1", quotes included, is one key without a value, as the plain word `lr` is, or refused.
# Seen, omegaconf 2.3.1 with PyYAML 6.0.3: the settings {'lr': 0.1}, with a float, of a document that has none; of
# "[1, 2]" in quotes a list of two; a second pair of quotes inside the first is taken off as well. `'True'` ends in an
# AssertionError without words, where the plain True is an OSError that names the type. yaml.safe_load gives the string
# each time. The loaded string goes to OmegaConf.create, which takes any string for a text in YAML.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/python" -m pip install --quiet --disable-pip-version-check omegaconf==2.3.1 pyyaml==6.0.3
cd "$place"
"$place/venv/bin/python" - <<'PYTHON'
import pathlib

import omegaconf
import yaml
from omegaconf import OmegaConf

print("omegaconf", omegaconf.__version__, "PyYAML", yaml.__version__)


def read(text):
    path = pathlib.Path("settings.yaml")
    path.write_text(text)
    try:
        got = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:
        got = f"{type(error).__name__}: {error}"
    print(f"{text!r:14} yaml {yaml.safe_load(text)!r:12} omegaconf {got!r}")
    return got


assert read("lr") == {"lr": None}
assert read('"lr: 0.1"') == {"lr": 0.1}
assert read('"[1, 2]"') == [1, 2]
assert read("""'"lr"'""") == {"lr": None}
assert read("True").startswith("OSError: Invalid loaded object type: bool")
assert read("'True'") == "AssertionError: "
PYTHON
