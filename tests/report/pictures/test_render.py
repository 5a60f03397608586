"""The files of the pictures: what every one says of its study, and what an SVG may hold inside a page."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import matplotlib.image
import pytest
from support.drawn import (
    FALLING,
    GOOD,
    TRAP,
    drawn,
    expected_names,
    words_of,
    write_run,
    write_study,
    write_suite,
)

from ebc_lab.report import pictures as pictures_module
from ebc_lab.report.pictures.catalogue import PHONE, SECTIONS, catalogue
from ebc_lab.report.pictures.drawing.sheet import STYLE
from ebc_lab.report.pictures.render import png, svg

SVG = "{http://www.w3.org/2000/svg}"
TAGS = {"svg", "g", "defs", "path", "use", "text", "tspan", "clipPath", "rect", "pattern", "desc"}
LARGEST = 60_000  # bytes of a picture: a page holds dozens


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """A drawn study with finals and a suite, so with every kind of picture but those of parts."""
    root = write_suite(tmp_path_factory.mktemp("every"), outcomes={}, finals=True)
    header = json.loads((root / "study.json").read_text())
    header["corpus"]["warning"] = "not Shakespeare"
    (root / "study.json").write_text(json.dumps(header))
    pictures_module.draw_study(root)
    return root


def svgs(root: Path) -> dict[str, ElementTree.Element]:
    return {path.stem: ElementTree.fromstring(path.read_bytes()) for path in sorted(root.glob("*.svg"))}


def said(picture: ElementTree.Element) -> str:
    return "\n".join("".join(text.itertext()) for text in picture.iter(f"{SVG}text"))


@pytest.mark.thorough
def test_every_picture_tells_its_study_corpus_and_scale_and_only_one_that_stands_alone_draws_them(study):
    """The page says them once, as it does the title and what the corpus is not."""
    pictures = svgs(study)
    assert len(pictures) > 20
    for name, picture in pictures.items():
        told, words = picture.findtext(f"{SVG}desc"), said(picture)
        for part in ("study tiny", "smoke scale", "tiny Shakespeare. Corpus: not Shakespeare"):
            assert part in told, name
            assert part not in words, name
        assert catalogue(study)[0]["title"] not in words
    for name, figure in drawn(study, "lr_scale", "lr_sweep", "calibrate").items():
        alone = " ".join(" ".join(words_of(figure)).split())
        assert figure.title in alone, name
        assert "study tiny · smoke scale · tiny Shakespeare. Corpus: not Shakespeare" in alone, name


@pytest.mark.thorough
def test_no_text_of_a_picture_is_too_small_to_read_where_it_is_shown(study):
    """Wide pictures are shown in 736 CSS pixels at least, narrow ones in 330 on a phone."""
    for name, picture in svgs(study).items():
        width = float(picture.get("width").removesuffix("pt"))
        scale = (330 if width == 270 else 736) / width
        styles = [part.get("style", "") for part in picture.iter()]
        sizes = [float(size) for style in styles for size in re.findall(r"font-size: ([\d.]+)px", style)]
        assert min(sizes) * scale >= (11 if width == 270 else 8), name


def test_an_svg_stays_inside_its_drawing_and_has_no_date(study):
    for name, picture in svgs(study).items():
        tags = {element.tag.removeprefix(SVG) for element in picture.iter()}
        assert tags <= TAGS, name
        raw = (study / f"{name}.svg").read_text()
        assert "DOCTYPE" not in raw
        assert not re.search(r"https?://(?!www\.w3\.org/)", raw), name
        assert not re.search(r"\b20\d\d-\d\d-\d\d", raw), name
        assert set(re.findall(r'(?:href="|url\()(.)', raw)) <= {"#"}, name


def test_the_svgs_of_a_study_can_share_a_page(study):
    """No id twice, and each refers only to ids of its own."""
    taken: set[str] = set()
    for name, picture in svgs(study).items():
        own = [element.attrib["id"] for element in picture.iter() if "id" in element.attrib]
        assert len(own) == len(set(own)), name
        assert not taken & set(own), name
        assert set(re.findall(r"(?:href=\"#|url\(#)([\w.-]+)", (study / f"{name}.svg").read_text())) <= set(
            own
        ), name
        taken |= set(own)


def test_an_svg_tells_what_it_shows_to_who_cannot_see_it(study):
    told = {entry["name"]: entry for entry in catalogue(study)}
    for name, picture in svgs(study).items():
        assert picture.get("role") == "img"
        entry = told[name.removesuffix(PHONE)]
        assert picture.get("aria-label").startswith(f"{entry['title']} {entry['alt']}")


@pytest.mark.thorough
def test_the_pictures_of_long_runs_stay_small(tmp_path):
    root = write_study(tmp_path)
    for folder in (root / "runs").glob(f"*{FALLING}_s?"):
        shutil.rmtree(folder)
        write_run(folder, ebc=True, seed=int(folder.name[-1]), steps=3000)
    names = [f"adam_none_{FALLING}_groups", "steps"]
    figures = drawn(root)
    sizes = {name: len(svg(figures[name], name)) for name in names}
    assert max(sizes.values()) < LARGEST, sizes


def test_a_study_with_finals_and_a_suite_has_every_picture(study):
    kinds = {f"{arm}_groups" for arm in (GOOD, TRAP)}
    together = {"ablation_curves", "ablation_steps", "ablation_tightness"}
    names = expected_names("adam_none") | kinds | together
    assert {path.stem for path in study.glob("*.png")} == names
    narrow = {name for name in names if not name.endswith("_groups")}  # an arm's are so anyway
    assert {path.stem for path in study.glob("*.svg")} == names | {name + PHONE for name in narrow}
    assert (study / "figure.pdf").exists()


@pytest.mark.thorough
def test_no_picture_is_blank_or_all_ink(study):
    for path in study.glob("*.png"):
        image = matplotlib.image.imread(path)
        assert 250 < image.shape[0] < 1700
        assert 700 < image.shape[1] < 1400
        assert 0.01 < (image[:, :, :3].min(axis=2) < 0.95).mean() < 0.6, path.name


@pytest.mark.thorough
def test_a_picture_has_the_same_bytes_each_time(study):
    settings = dict(matplotlib.rcParams)
    again = drawn(study, "lr_scale", "lr_sweep", "calibrate")
    with matplotlib.rc_context(fname=STYLE):
        for name, figure in again.items():
            assert png(figure) == (study / f"{name}.png").read_bytes(), name
            assert svg(figure, name) == (study / f"{name}.svg").read_bytes(), name
    assert dict(matplotlib.rcParams) == settings


def test_the_catalogue_lists_every_picture_once_in_reading_order(study):
    entries = catalogue(study)
    files = {path.stem for path in study.glob("*.png")}
    assert (
        sorted(entry["name"] for entry in entries)
        == sorted(files)
        == sorted(path.stem for path in study.glob("*.svg") if not path.stem.endswith(PHONE))
    )
    sections = [entry["section"] for entry in entries]
    assert sections == sorted(sections, key=SECTIONS.index)
    assert set(sections) < set(SECTIONS)  # no stage without pictures of its own
    for entry in entries:
        assert set(entry) == {"name", "section", "title", "alt", "arm", "note", "alert"}
        assert entry["title"]
        assert entry["alt"].endswith(".")
        assert bool(entry["arm"]) == (entry["section"] == "arms")


def test_a_study_without_pictures_has_an_empty_catalogue(tmp_path):
    assert catalogue(tmp_path) == []
