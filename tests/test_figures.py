"""The list of figures: which numbers are figures, what each is of, and what of the list is no longer so."""

import datetime
import tomllib

import figures
import pytest

ENTRIES = """
laid_out_anew = 2026-01-02
top = "# Figures"
[holds]
digit = "everywhere"
no = "nowhere"
[not_measured]
choice = "a setting"
[machine]
A = "two cores"
[measurement.speed]
what = "the speed"
command = "ebc-lab bench scale=laptop"
date = 2026-01-02
machine = "A"
commit = "abc"
holds = "no"
[of."README.md"]
"speed" = "speed"
"speed | `adam`" = "choice"
[of."docs/images"]
"""
README = """# Title

Nothing to see in `0.5` or [here](docs/1.5.md).

## Speed

It takes 5 ms,
or 3 to 4%.

| of | ms |
|---|---|
| `adam` | 7 |
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A small project -> a function that adds to its README and entries, and says what is wrong then."""
    caches = (figures.read, figures.measured, figures.places)
    for name in ("docs/images", "scripts", "conf/scale"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "conf/scale/laptop.yaml").touch()
    (tmp_path / "Makefile").write_text("test: this\n\tcommand\n")
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    monkeypatch.setattr(figures, "ENTRIES", tmp_path / "entries.toml")

    def found(readme="", entries="", **changed):
        text = ENTRIES.replace(*changed["of"]) if changed else ENTRIES
        (tmp_path / "README.md").write_text(README + readme)
        (tmp_path / "entries.toml").write_text(text + entries)
        for cached in caches:
            cached.cache_clear()
        (tmp_path / figures.PAGE).write_text(figures.page_of_all())
        return sorted(figures.wrong())

    yield found
    for cached in caches:
        cached.cache_clear()


def test_the_list_is_complete_and_its_page_is_as_it_would_be():
    assert [*figures.wrong()] == [], "see scripts/figures.toml; python scripts/figures.py --write"


def test_a_figure_is_a_number_with_a_unit_or_a_fraction_or_of_a_table(project):
    assert project() == []
    seen = [(line, figure, names) for _, line, figure, names in figures.figures()]
    assert seen == [(7, "5 ms", ["speed"]), (8, "3 to 4%", ["speed"]), (12, "7", ["choice"])]


@pytest.mark.parametrize(
    "text", ["8 GB", "−0.5 [−1.0, +0.25]", "two minutes", "30 of 40 runs", "×4", "1.93 ± 0.01"]
)
def test_a_figure_without_an_entry_is_found(project, text):
    assert any(
        "README.md:16" in said and "no entry" in said for said in project(f"\n## Other\n\nIt is {text}.\n")
    )


@pytest.mark.parametrize("text", ["`0.5`", "torch 2.13", "[a link](v1.5.md)", "16 tokens", "12 blocks"])
def test_what_is_no_figure_needs_no_entry(project, text):
    assert project(f"\n## Other\n\nIt is {text}.\n") == []


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ('"gone.png" = "speed"', "docs/images: no figure is left at 'gone.png'"),
        ('[of."docs/a.md"]\n"" = "speed"', "docs/a.md: no figure is left at ''"),
        ('[of."docs/a.md"]\n"" = "spede"', "there is no measurement spede"),
    ],
)
def test_an_entry_without_its_place_or_measurement_is_found(project, entries, said):
    assert said in project(entries=entries)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("bench scale=laptop", "bensh", "ebc-lab has no command bensh"),
        ("scale=laptop", "scale=desktop", "there is no scale=desktop"),
        ("ebc-lab bench scale=laptop", "make text", "make has no target text"),
        ("ebc-lab bench scale=laptop", "make test && python scripts/a.py", "there is no scripts/a.py"),
        ("ebc-lab bench scale=laptop", "python -m ebc_lab.gone", "there is no ebc_lab.gone"),
        (
            "ebc-lab bench scale=laptop",
            "ebc-lab report docs/evidence/a.zip",
            "there is no docs/evidence/a.zip",
        ),
        ('holds = "no"', 'holds = "maybe"', "another `holds` or `machine` than there are"),
        ('"abc"\n', '"abc"\nby_hand = "x"\n', "either a command, or what was done `by_hand`"),
    ],
)
def test_a_measurement_that_cannot_be_made_again_is_found(project, before, after, said):
    assert project(of=(before, after)) == [f"measurement speed: {said}"]


def test_a_commit_that_git_does_not_know_is_found_and_is_not_asked_for_without_history(project, monkeypatch):
    (figures.ROOT / ".git").touch()
    monkeypatch.setattr(figures, "git", lambda first, *_: "false" if first == "rev-parse" else None)
    assert project() == ["measurement speed: git has no commit abc"]
    monkeypatch.setattr(figures, "git", lambda first, *_: "true" if first == "rev-parse" else None)
    assert project() == []


def test_what_is_older_than_the_numerics_or_than_the_pages_is_old(project):
    project()
    one = tomllib.loads(ENTRIES)["measurement"]["speed"]
    assert not figures.Measurement(**one).is_old
    assert figures.Measurement(**one, numerics=figures.NUMERICS_VERSION - 1).is_old
    assert figures.Measurement(**{**one, "date": datetime.date(2026, 1, 1)}).is_old
    assert "2026-01-02 |" in figures.page_of_all()
