"""What is made or read once for many tests is as if it were made for each."""

import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.composed import composed_once, conf_read_once
from support.shared import made_once

from ebc_lab.config.compose import compose


def test_what_takes_long_is_made_once_and_every_caller_has_its_own(tmp_path):
    made = []

    def make(folder):
        (folder / "file").write_text("kept")
        made.append(folder)
        return [folder]

    with ThreadPoolExecutor(4) as pool:
        asked = list(pool.map(lambda _: made_once(tmp_path / "shared", "study", make), range(8)))
    assert len(made) == 1
    assert asked == [made] * 8
    assert (made[0] / "file").read_text() == "kept"
    asked[0].clear()
    assert asked[1] == made


@pytest.mark.thorough
@pytest.mark.parametrize(
    "overrides",
    [
        ["scale=smoke", "output_dir=/tmp/x-y", "study.name=done"],
        ["scale=smoke", "study=optimizers", "optimizer.lr=0.5", "study.name=1e3"],
        ["scale=laptop", "study.name=n1", "study.name=n2", "~ablation.arms.x"],
    ],
)
def test_a_remembered_composition_is_the_composition(overrides):
    def outcome():
        try:
            return compose(overrides)
        except Exception as error:
            return repr(error)

    with composed_once(), conf_read_once():
        remembered = [outcome(), outcome()]
    assert remembered[0] == remembered[1]
    assert remembered[0] is not remembered[1]
    assert remembered[0] == alone(overrides)


def alone(overrides):
    """The same from a process in which nothing is remembered."""
    program = (
        "import pickle, sys\nfrom ebc_lab.config.compose import compose\n"
        "try:\n    made = compose(sys.argv[1:])\nexcept Exception as error:\n    made = repr(error)\n"
        "sys.stdout.buffer.write(pickle.dumps(made))"
    )
    done = subprocess.run([sys.executable, "-c", program, *overrides], stdout=subprocess.PIPE, check=True)
    return pickle.loads(done.stdout)
