"""judgement.html as its reader meets it: quiet, whole on a phone, and with nothing that axe finds wrong."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from browser.reader import DESKTOP, HOSTILE, PHONE
from support.judged import judgement

from ebc_lab.report.page.judged import write

pytestmark = pytest.mark.browser
ARMS = {
    HOSTILE: [3.2705, 3.272, 3.2735, 3.272],
    "adamw": [3.2785, 3.2815, 3.28, 3.28],
    "sgd": [3.284, 3.285, math.inf, 3.286],
    **{f"an_arm_with_a_very_long_name_{i}": [3.29 + i / 100, 3.292 + i / 100] for i in range(28)},
}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    cautions = [{"kind": "diverged", "sentence": f"A run of {HOSTILE} diverged.", "runs": []}]
    made = judgement(ARMS, "adamw", cautions=cautions, answer=[HOSTILE])
    folder: Path = tmp_path_factory.mktemp("judged")
    return write(made, folder)[0].as_uri()


@pytest.mark.parametrize("size", [DESKTOP, PHONE])
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_is_quiet_asks_for_nothing_and_is_accessible(reader, page, size, dark):
    reader.open(page, size, dark=dark)
    assert reader.complaints() == []
    assert reader.asked_for() == [page]
    assert reader.title != "owned"
    reader.unfold()
    assert reader.violations() == []
    assert reader.run("return document.documentElement.scrollWidth <= window.innerWidth")


@pytest.mark.parametrize("scripts", [True, False])
def test_question_answer_picture_and_first_caution_are_on_the_first_screen(reader, page, scripts):
    reader.open(page, DESKTOP, scripts=scripts)
    for selector in ("#question", ".answer", "#figure-outcomes img", ".notes li"):
        box = reader.one(selector).rect
        assert 0 <= box["y"] < DESKTOP[1] - 100
        assert box["height"] > 0
