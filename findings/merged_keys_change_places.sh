#!/usr/bin/env bash
# OmegaConf 2.4 moves a YAML key that overrides a merged one behind the merged ones; 2.3 and PyYAML leave it in its place.
#
# Guess: `{<<: *base, b: 9}` keeps base's order, with b where base has it, as PyYAML and OmegaConf 2.3 do and as an
# update of a Python dict would; a new minor version of a configuration library does not reorder what it reads.
# Seen, omegaconf 2.3.1 and 2.4.1rc1 with pyyaml 6.0.3: the values are equal, the orders are not: a, b, c before and
# a, c, b now. Whoever walks a configuration (arms in the order of their file, a hash of its JSON) sees another one.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cat >"$place/read.py" <<'PYTHON'
import importlib.metadata
import sys

import yaml
from omegaconf import OmegaConf

text = "base: &base {a: 1, b: 2, c: 3}\nother: {<<: *base, b: 9}\n"
omega = OmegaConf.to_container(OmegaConf.create(text))["other"]
plain = yaml.safe_load(text)["other"]
print("omegaconf", importlib.metadata.version("omegaconf"), omega, "pyyaml", yaml.__version__, plain)
assert omega == plain and [*plain] == ["a", "b", "c"]
assert "".join(omega) == sys.argv[1]
PYTHON
for pair in 2.3.1:abc 2.4.1rc1:acb; do
  python3 -m venv "$place/${pair%:*}"
  "$place/${pair%:*}/bin/python" -m pip install --quiet --disable-pip-version-check pyyaml==6.0.3 omegaconf=="${pair%:*}"
  "$place/${pair%:*}/bin/python" "$place/read.py" "${pair#*:}"
done
