"""An S3 server for all tests of this folder, and studies that are mirrored without training anything."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from support.s3 import BUCKET, s3_server

from ebc_lab.study.mirror.upload import mirroring
from ebc_lab.study.store.study import Study


@pytest.fixture(scope="module")
def s3():
    """The environment of an S3 server that runs as long as these tests."""
    pytest.importorskip("s3fs")
    pytest.importorskip("moto")
    with s3_server() as env:
        yield env


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.slow)])
def address(request, tmp_path: Path) -> str:
    """A place for mirrors: on the server, or a second folder."""
    if request.param == "folder":
        return f"file://{tmp_path}/mirror [v2]"  # which is no pattern
    request.getfixturevalue("s3")
    return f"s3://{BUCKET}/{tmp_path.name}"


class Mirrored:
    """A finished study in a folder of its own, mirrored on demand."""

    def __init__(self, config, root: Path, address: str):
        self.config = replace(config, study=replace(config.study, mirror=address, mirror_every_s=0.05))
        self.study = Study(root)
        self.address = f"{address}/{root.name}"
        self.said: list[str] = []

    def running(self):
        return mirroring(self.config, self.study, self.said.append)

    def mirror(self) -> None:
        with self.running():
            pass


SMALL = {
    **dict.fromkeys(("study.json", "auto_decisions.json", "manifest.json"), "{}"),
    **{f"runs/on/{name}": f"{name} of on" for name in ("spec.json", "attempts.jsonl", "checkpoint.pt")},
    **{f"runs/on/{name}": f"{name} of on" for name in ("progress.json", "steps.csv")},
    **{f"runs/over/{name}": f"{name} of over" for name in ("spec.json", "result.json", "steps.csv")},
    ".driver.json": "{}",
}


@pytest.fixture
def small(tmp_path: Path) -> Study:
    """A study of a run in progress and a finished one, of which only the names of the files are true."""
    study = Study(tmp_path / "small")
    for path, content in SMALL.items():
        (study.root / path).parent.mkdir(parents=True, exist_ok=True)
        (study.root / path).write_text(content)
    return study


@pytest.fixture
def mirrored(finished, tmp_path: Path, address: str) -> Mirrored:
    config, done, _ = finished
    root = tmp_path / "here" / "done"
    shutil.copytree(done.study.root, root, ignore=shutil.ignore_patterns("*.svg", "*.png"))
    for run in sorted((root / "runs").iterdir())[3:]:  # a few are enough
        shutil.rmtree(run)
    return Mirrored(config, root, address)
