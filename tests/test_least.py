"""The choice of `make test`: what is chosen, when it is out of date, and what is made once for many tests."""

import json
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import least_tests
import pytest
from least_tests import Test as Seen
from support import least
from support.composed import composed_once, conf_read_once
from support.shared import made_once

from ebc_lab.config.compose import compose


def seen(name, seconds, steps, shared=()):
    return Seen(f"tests/test_a.py::{name}", seconds, frozenset(shared), frozenset(steps), frozenset(steps))


def names(tests, **fixtures):
    return sorted(name.rpartition(":")[2] for name in least_tests.chosen(tests, fixtures).tests)


@pytest.fixture(autouse=True)
def nothing_reaches_too_little(monkeypatch):
    monkeypatch.setattr(least_tests, "RATE", 0.0)


def test_all_that_any_test_reaches_is_reached_and_what_others_make_useless_is_dropped(monkeypatch):
    monkeypatch.setattr(least_tests, "SHARE", 0.0)
    tests = [seen("quick", 1, {1, 2}), seen("wide", 3, {2, 3, 4, 5, 6, 7}), seen("dear", 9, {1, 8})]
    assert names([*tests, seen("useless", 2, {3, 4})]) == ["dear", "wide"]
    assert names([*tests, seen("other", 1, {8, 9})]) == ["other", "quick", "wide"]


def test_what_reaches_little_for_its_time_is_left_out(monkeypatch):
    monkeypatch.setattr(least_tests, "SHARE", 0.0)
    monkeypatch.setattr(least_tests, "RATE", 3.0)
    tests = [seen("quick", 1, {1, 2, 3, 4}), seen("new", 1, {4, 5, 6, 7, 8}), seen("dear", 9, {1, 9, 10, 11})]
    assert names(tests) == ["new"]


def test_a_fixture_that_several_share_is_paid_once(monkeypatch):
    monkeypatch.setattr(least_tests, "SHARE", 0.0)
    tests = [seen("alone", 4, {1, 2}), seen("first", 1, {1}, {"study"}), seen("second", 1, {2}, {"study"})]
    assert names(tests, study=9.0) == ["alone"]
    assert names([*tests, seen("third", 1, {3}, {"study"})], study=0.5) == ["first", "second", "third"]


def test_time_that_is_left_goes_to_what_few_of_the_chosen_reach(monkeypatch):
    tests = [seen("both", 1, {1, 2}), seen("one", 0.5, {1}), seen("long", 50, {1, 2})]
    monkeypatch.setattr(least_tests, "SHARE", 0.04)
    assert names(tests) == ["both", "one"]


def test_what_alone_caught_a_break_is_chosen(monkeypatch):
    monkeypatch.setattr(least_tests, "SHARE", 0.0)
    monkeypatch.setattr(least_tests, "caught_alone", lambda: {"tests/test_a.py::useless"})
    assert names([seen("quick", 1, {1, 2}), seen("useless", 9, {2})]) == ["quick", "useless"]


def test_every_test_that_alone_caught_a_break_runs():
    alone = least_tests.caught_alone()
    assert alone
    for file, function, _ in map(least_tests.split, alone):
        assert function in least_tests.functions(file)
    assert least_tests.listed(Seen(name, 0, *3 * [frozenset()]) for name in alone) == alone


@pytest.fixture
def said():
    return json.loads(least_tests.LIST.read_text())


def test_the_choice_is_not_out_of_date(said):
    assert least_tests.stale(said) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda said: said["cases"].update({"tests/test_least.py": {"test_gone": []}}), "no such test"),
        (lambda said: said["functions"].update({"tests/test_gone.py": 3}), "is no more"),
        (lambda said: said["modules"].remove("ebc_lab/ebc/clip.py"), "clip.py: no test that was read"),
        (lambda said: [said["functions"].popitem() for _ in range(80)], "newer than the choice"),
    ],
)
def test_a_choice_that_is_out_of_date_is_found(said, change, words):
    change(said)
    [complaint, *_] = least_tests.stale(said)
    assert words in complaint


class Item:
    def __init__(self, nodeid):
        self.nodeid = nodeid
        self.marks = []

    def add_marker(self, name):
        self.marks.append(name)


def test_what_the_list_does_not_name_runs_and_a_case_that_is_gone_is_an_error(monkeypatch):
    named = {"tests/a/test_b.py": {"test_c": ["1-x"], "test_d": []}}
    monkeypatch.setattr(least, "cases", lambda: named)
    items = [Item(f"tests/a/test_b.py::{n}") for n in ("test_c[1-x]", "test_c[2-y]", "test_d", "test_new[1]")]
    least.mark(items, whole_files=True)
    assert [item.marks for item in items] == [["least"], [], [], ["least"]]
    with pytest.raises(pytest.UsageError, match=r"\['1-x'\].*chooses anew"):
        least.mark(items[1:2], whole_files=True)


def test_a_file_all_of_whose_tests_are_left_out_is_not_even_read(monkeypatch, tmp_path):
    file = tmp_path / "tests" / "test_b.py"
    file.parent.mkdir()
    file.write_text("def test_c(): ...\n\n\nclass TestD:\n    def test_e(self): ...\n")
    for functions, left_out in (
        ({"test_c": [], "TestD::test_e": []}, True),
        ({"test_c": []}, False),
        ({"test_c": [], "TestD::test_e": ["1"]}, False),
    ):
        monkeypatch.setattr(least, "cases", lambda functions=functions: {"tests/test_b.py": functions})
        assert least.left_out(file, tmp_path) is left_out


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
