"""A real Chromium, and the pages it is shown: of hundreds of invented runs, a suite and a trained study."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from browser.reader import HOSTILE, Reader
from support.invented import invent

from ebc_lab.report.page import html


def unlucky(spec) -> dict[str, Any]:
    """Some runs diverge, some fail, for a cause that tries to be markup."""
    if spec.role == "ebc_x8" and spec.run.seed in (3, 5):
        return {"outcome": "diverged", "cause": HOSTILE}
    if spec.role == "control_x8" and spec.run.seed == 4:
        return {"outcome": "failed", "cause": HOSTILE}
    return {}


@pytest.fixture(scope="session")
def studies(tmp_path_factory: pytest.TempPathFactory, finished, small_text: str) -> dict[str, Path]:
    """Name -> a study's folder: `many` (over 400 runs, two tracks), `suite`, `smoke` (really trained)."""
    folder = tmp_path_factory.mktemp("shown")
    text = folder / "words & <b>more.txt"
    text.write_text(small_text * 3)
    seeds = ",".join(map(str, range(41)))
    corpus = ["data=path", f'data.file="{text}"']
    many = [
        *corpus,
        "study.name=many",
        "lr_sweep.optimizers=[adam,muon]",
        "lr_sweep.keep=all",
        f"seeds=[{seeds}]",
    ]
    made = {
        "many": invent(folder, many, fate=unlucky, drawn=False).root,
        "suite": invent(folder, [*corpus, "study=controls", "study.name=suite"]).root,
    }
    html.write_page(made["many"])  # its hundred pictures would say no more than the suite's
    return made | {"smoke": finished[1].study.root}


@pytest.fixture(scope="session")
def chromium(own_places):
    """Raises where there is none: `make test-browser` sees to it."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.add_argument("--headless=new")
    options.add_argument("--disable-dev-shm-usage")
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService("/usr/bin/chromedriver"))
    yield driver
    driver.quit()


@pytest.fixture
def reader(chromium) -> Reader:
    return Reader(chromium)
