#!/usr/bin/env bash
# safetensors writes a transposed numpy array in the order of its memory: other numbers under the same shape.
#
# Guess: the numbers come back, as with numpy.save, or the array is refused, as safetensors.torch refuses such tensors.
# Seen, safetensors 0.8.0: [[0, 1, 2], [3, 4, 5]].T comes back as [[0, 1], [2, 3], [4, 5]], from save and save_file;
# a step in the last axis takes the numbers between; a Fortran-ordered array, which numpy.linalg and scikit-learn
# often return, is jumbled. 0.7.0 wrote all of them right: it copied, 0.8.0 hands over the address. (Reported to its
# authors as issue 825. The docstring asks for "contiguous and dense" arrays; a Fortran-ordered one is both.)
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cat > "$place/saved.py" <<'PYTHON'
import sys
from importlib.metadata import version

import numpy as np
from safetensors.numpy import load, load_file, save, save_file

print("safetensors", version("safetensors"), "numpy", np.__version__)
table = np.arange(6.0).reshape(2, 3)
arrays = {"plain": table, "transposed": table.T, "stepped": table[:, ::2], "fortran": np.asfortranarray(table)}
save_file(arrays, sys.argv[1])
kept = []
for name, array in arrays.items():
    back = load(save({name: array}))[name]
    assert (load_file(sys.argv[1])[name] == back).all()
    print(name, array.tolist(), "comes back as", back.tolist())
    assert back.shape == array.shape
    kept.append(bool((back == array).all()))
assert kept == [True] + [version("safetensors") < "0.8"] * 3
PYTHON
python3 -m venv "$place/venv"
for version in 0.7.0 0.8.0; do
    "$place/venv/bin/python" -m pip install --quiet --disable-pip-version-check "safetensors==$version" numpy==2.4.6
    "$place/venv/bin/python" "$place/saved.py" "$place/arrays.safetensors"
done
