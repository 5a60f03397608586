"""The documentation is right: code runs, commands compose, links lead somewhere, tables are the program's."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path

import pytest
import settings_page
import typer
import yaml
from package import FENCE

from ebc_lab.cli.commands import app
from ebc_lab.cli.new import new
from ebc_lab.cli.train import train_one
from ebc_lab.config import choices
from ebc_lab.config import compose as compose_module
from ebc_lab.config.choices import offered
from ebc_lab.config.compose import compose, configurations, implied
from ebc_lab.config.dicts import run_part
from ebc_lab.config.errors import UserError
from ebc_lab.config.overrides import expand
from ebc_lab.records.json_files import read_json
from ebc_lab.report.conclude import concluding
from ebc_lab.report.text import words
from ebc_lab.study.autopilot import Listener, autopilot
from ebc_lab.study.stages.stage import decision_that_shows

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def blocks(name: str, language: str) -> list[str]:
    return [body for kind, body in FENCE.findall((ROOT / name).read_text()) if kind == language]


# -- links ---------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The headings of a page as links name them."""
    text = FENCE.sub("", page.read_text())
    headings = [re.sub(r"[`*\\]", "", h) for h in re.findall(r"^#+ (.+)$", text, re.MULTILINE)]
    return {re.sub(r"[^\w\- ]", "", h.lower().strip()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    page = ROOT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


def test_what_the_architecture_names_is_in_the_file_it_names():
    text = (ROOT / "docs/architecture.md").read_text()
    pairs = re.findall(r"\[([^\]]*)\]\(\.\./(ebc_lab/[\w/]+\.py)\)", text)
    named = [(name, path) for names, path in pairs for name in re.findall(r"`(\w+)`", names)]
    named += re.findall(r"`(\w+)` in\s+`(ebc_lab/[\w/]+\.py)`", text)
    assert len(named) > 30
    for name, path in named:
        found = re.search(rf"^ *(?:def |class )?{name}\b", (ROOT / path).read_text(), re.MULTILINE)
        assert found, (name, path)
    for path in re.findall(r"`((?:ebc_lab|conf)/[\w/.]*)`", text):
        assert (ROOT / path).exists() or "NAME" in path, path


# -- code ----------------------------------------------------------------------------------------------------


README = "README.md"
# what the README's loop is put in: a model, an optimizer and batches of one's own
OWN_LOOP = """
import torch
from torch.nn.functional import cross_entropy

model = torch.nn.Sequential(torch.nn.Embedding(64, 32), torch.nn.Linear(32, 64))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
batches = [(torch.randint(64, (16, 64)), torch.randint(64, (16, 64))) for _ in range(5)]
"""


@pytest.mark.thorough
@pytest.mark.parametrize("name", [n for n in NAMES if blocks(n, "python")])
def test_the_code_of_a_page_runs_from_top_to_bottom(name, finished, tmp_path):
    """In a folder of its own, in which a finished study is called laptop."""
    (tmp_path / "outputs/ebc_ablation").mkdir(parents=True)
    (tmp_path / "outputs/ebc_ablation/laptop").symlink_to(finished[1].study.root)
    script = tmp_path / "page.py"
    script.write_text("\n".join([OWN_LOOP * (name == README), *blocks(name, "python")]))
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,  # where what it writes stays
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": path,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "MPLBACKEND": "agg",
        },
    )
    assert done.returncode == 0, done.stderr[-2000:]


# -- commands ------------------------------------------------------------------------------------------------


def commands() -> list[str]:
    """Every `ebc-lab` command line of the pages, in a block or in the text, without what explains it."""
    found = []
    for page in PAGES:
        text = page.read_text()
        lines = [line.removeprefix("$ ") for _, body in FENCE.findall(text) for line in body.splitlines()]
        lines += re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
        found += [re.split(r"  | #", line)[0] for line in lines if line.startswith("ebc-lab ")]
    return sorted(set(found))


OWN_PARTS = "docs/extending.md"
SUITES = "docs/suites.md"
NOTEBOOK = "docs/ten_minutes.md"  # which `make site` executes


@pytest.fixture
def own_parts(tmp_path, monkeypatch):
    """The files of OWN_PARTS in the working directory, and its package as if installed; -> that folder."""
    folder = tmp_path / "work"
    about = folder / "my_parts-1.0.dist-info"
    about.mkdir(parents=True)
    (folder / "docs").symlink_to(ROOT / "docs")  # where a recorded suite is
    modules = {}
    for body in [*blocks(OWN_PARTS, "python"), *blocks("docs/compare.md", "python")]:
        file = re.match(r"# (\w+\.py)\n", body)[1]
        modules[file.removesuffix(".py")] = (folder / file).write_text(body)
    for page, which, suite in ((SUITES, -1, "mine.yaml"), (OWN_PARTS, 0, "share.yaml")):
        (folder / suite).write_text(blocks(page, "yaml")[which])
    for body in blocks(OWN_PARTS, "yaml"):
        if named := re.match(r"# (conf/\S+\.yaml)", body):
            (folder / named[1]).parent.mkdir(parents=True)
            (folder / named[1]).write_text(body)
    new("cautious", folder)  # as the README does
    modules["cautious_optimizer"] = None
    for magic, body in [cell.split("\n", 1) for cell in blocks(NOTEBOOK, "{code-cell}")]:
        if file := re.fullmatch(r"%%writefile (\w+\.py)", magic):
            modules[file[1].removesuffix(".py")] = (folder / file[1]).write_text(body)
    [project] = blocks(OWN_PARTS, "toml")
    groups = tomllib.loads(project)["project"]["entry-points"]
    lines = [[f"[{group}]", *map("=".join, named.items())] for group, named in groups.items()]
    (about / "entry_points.txt").write_text("\n".join(chain(*lines)))
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: my-parts\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.chdir(folder)
    cached = (offered, choices.read_choice, compose_module.register_schema)
    for known in cached:
        known.cache_clear()
    yield folder
    for known in cached:
        known.cache_clear()
    for name in modules:
        sys.modules.pop(name, None)


PARTS = 12  # of the commands, which share what the fixtures set up


@pytest.mark.thorough
@pytest.mark.parametrize("part", range(PARTS))
def test_commands_exist_and_their_settings_compose(part, own_parts):
    for line in commands()[part::PARTS]:
        try:
            understood(line)
        except BaseException as error:
            error.add_note(line)
            raise


@pytest.mark.parametrize("name", ["kubernetes", "skypilot", "skypilot_workers"])
def test_the_commands_of_example_manifests_exist_and_their_settings_compose(name):
    documents = list(yaml.safe_load_all((ROOT / "examples" / f"{name}.yaml").read_text()))
    jobs = [d["spec"]["template"]["spec"] for d in documents if d.get("kind") == "Job"]
    lines = [shlex.join(c["command"]) for job in jobs for c in job["containers"]]
    lines += [line.strip() for d in documents for line in d.get("run", "").splitlines() if "ebc-lab " in line]
    assert len(lines) == 2
    for line in lines:
        understood(line.replace("device=cuda", "device=cpu"))


def understood(line: str) -> None:
    """Fails unless the command has this name and these options, and its settings compose."""
    name, *words = shlex.split(line)[1:]
    if name.startswith("-"):
        return
    known = typer.main.get_command(app).commands
    assert name in known
    if hasattr(known[name], "commands"):  # `ebc-lab ebm train`
        known = known[name].commands
        name, *words = words or ["…"]
        assert set(name.split("|")) <= {*known, "…"}
        if name not in known:
            return
    options = {o for parameter in known[name].params for o in (*parameter.opts, *parameter.secondary_opts)}
    if name != "train":  # which hands its options on to Hydra
        assert {w for w in words if w.startswith("-")} <= options
    # `from=` names a file of a study that is not here; what is said after it is set over the defaults
    left_out = ("-", "hydra", "from=")
    settings = [w for w in words if re.search(r"=(?![A-Z]+$|…)", w) and not w.startswith(left_out)]
    if name in ("train", "bench"):
        for combination in expand(settings):
            compose(implied(combination), study=False)
    elif settings and name != "judge":  # whose --at has a step for an arm
        configurations(settings, multirun="-m" in words)


@pytest.mark.thorough
def test_own_parts_are_trained_by_the_commands_of_their_page(tiny, own_parts, tmp_path):
    """Those of `train` that name one run, on the tests' text; each of the page's files is used."""
    lines = [shlex.split(line) for body in blocks(OWN_PARTS, "") for line in body.splitlines()]
    trained = [line[2:] for line in lines if line[1] == "train" and "-m" not in line]
    assert len(trained) == 7
    used = set()
    smaller = [o for o in tiny if o.startswith(("data", "device", "eval_w"))]
    for i, settings in enumerate(trained):
        run = run_part(compose([*settings, *smaller], study=False))
        assert train_one(run, tmp_path / str(i), 1e9)["outcome"] == "completed", settings
        parts = [run.optimizer, run.stabilizer, run.lr_schedule, run.model]
        used |= {part.target.partition(":")[0] for part in parts if part.target}
    assert {re.match(r"# (\w+)\.py\n", body)[1] for body in blocks(OWN_PARTS, "python")} <= used

    edited = own_parts / "my_optimizer.py"
    edited.write_text(edited.read_text() + "\n# edited\n")
    again = next(i for i, settings in enumerate(trained) if "optimizer.target=my_optimizer:mixed" in settings)
    with pytest.raises(UserError, match=r"my_optimizer.py has changed since this run was begun"):
        train_one(run_part(compose([*trained[again], *smaller], study=False)), tmp_path / str(again), 1e9)


@pytest.mark.thorough
@pytest.mark.parametrize("launcher", ["inline", pytest.param("local", marks=pytest.mark.slow)])
def test_a_suite_with_an_own_stabilizer_runs(tiny, tmp_path, own_parts, launcher):
    shorter = ["study=./share.yaml", "ablation.steps=15", f"launcher={launcher}", f"output_dir={tmp_path}"]
    outcome = autopilot(compose([*tiny, *shorter]), Listener())
    arms = decision_that_shows("arms", outcome.decisions)["tracks"]["adam_none"]["arms"]
    assert {name: arm["outcomes"] for name, arm in arms.items()} == {
        "slow": {"completed": 2},
        "share": {"completed": 2},
    }
    assert arms["share"]["c_median"] == pytest.approx(0.25)


def test_targets_of_make_are_there():
    rules = re.findall(r"^([a-z][a-z -]*):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    texts = [page.read_text() for page in PAGES]
    named = {target for text in texts for target in re.findall(r"`make ([a-z-]+)", FENCE.sub("", text))}
    bodies = [body for text in texts for _, body in FENCE.findall(text)]
    named |= {target for body in bodies for target in re.findall(r"^make ([a-z-]+)", body, re.MULTILINE)}
    assert {"autopilot", "test"} < named
    assert named - {target for rule in rules for target in rule.split()} == set()


@pytest.mark.thorough
def test_the_suite_of_the_suites_page_runs(tiny, tmp_path, own_parts):
    here = ["launcher=inline", f"output_dir={tmp_path}"]
    config = compose([*tiny, "study=./mine.yaml", "ablation.steps=20", *here])
    outcome = autopilot(config, concluding())
    arms = decision_that_shows("arms", outcome.decisions)["tracks"]["adam_none"]["arms"]
    assert set(arms) == {"plain", "ebc", "clipped"}
    assert all(arm["outcomes"] == {"completed": 2} for arm in arms.values())
    assert "norm clipping" in (tmp_path / "mine" / "ablation.csv").read_text()
    assert "`clipped`" in (tmp_path / "mine" / "ablation.md").read_text()
    assert arms["ebc"]["versus"] == "clipped"  # what its question asks
    assert arms["ebc"]["difference"]["seeds"] == 2


# -- papers --------------------------------------------------------------------------------------------------


PAPERS = "docs/papers.md"
NO_METHODS = {
    "check",
    "data",
    "ebm",
    "launcher",
    "scale",
    "study",
    "tracker",
}  # groups of texts, sizes and machines


def papers() -> list[list[str]]:
    """The rows of the tables: the papers, what is said of them, where they are used."""
    tools_and_papers = (ROOT / PAPERS).read_text().split("## Choices without a paper")[0]
    text = tools_and_papers.split("## What others do")[1]
    cells = [row.split(" | ") for row in re.findall(r"^\| (.+) \|$", text, re.MULTILINE)]
    return [row for row in cells if re.search(r"\]\(https?:", row[0])]


def test_every_choice_names_its_paper_or_why_it_has_none():
    groups = choices.groups()
    there = {f"{group}={name}" for group in groups.keys() - NO_METHODS for name in groups[group]}
    named = {choice for row in papers() for choice in re.findall(r"`(\w+=\w+)`", row[-1])}
    cited = {choice for choice in named if not choice.startswith("study=")}
    none = set(re.findall(r"`(\w+=\w+)`", section(PAPERS, "Choices without a paper")))
    assert (cited | none) == there
    assert cited & none == set()


def test_a_paper_is_cited_where_its_page_says_and_its_page_has_all_that_are_cited():
    files = [*PAGES, *(ROOT / "ebc_lab").rglob("*.py"), *(ROOT / "ebc_lab").rglob("*.py.template")]
    texts = {path: " ".join(path.read_text().split()) for path in files}
    rows = papers()
    for paper, *_, used in rows:
        places = re.findall(r"\]\((\.\./ebc_lab/[\w/]+\.py(?:\.template)?|\w+\.md)", used)
        if number := re.search(r"\[(arXiv:\d{4}\.\d{4,5})\]", paper):
            cited = re.escape(number[1])
        else:
            surname = re.split(r",| &| et al| \d", paper)[0]
            year = re.search(r" (\d{4}), \[", paper)[1]
            cited = rf"\b{surname}\b.{{0,40}}\b{year}\b"
        for place in places:
            assert re.search(cited, texts[(ROOT / "docs" / place).resolve()]), (paper, place)
    listed = [number for row in rows for number in re.findall(r"\[arXiv:([\d.]+)\]", row[0])]
    assert len(set(listed)) == len(listed) > 80
    for path, text in texts.items():
        assert set(re.findall(r"arXiv:(\d{4}\.\d{4,5})", text)) <= set(listed), path
        for shown, opened in re.findall(r"\[arXiv:([\d.]+)\]\(https://arxiv\.org/abs/([\d.]+)\)", text):
            assert shown == opened, path
        assert text.count("arxiv.org/") == len(
            re.findall(r"\[arXiv:[\d.]+\]\(https://arxiv\.org/abs/", text)
        ), path


def test_the_bibliography_has_every_paper_of_the_page():
    entries = re.findall(r"^  url = \{(.+)\}$", (ROOT / "docs/papers.bib").read_text(), re.MULTILINE)
    linked = {url for row in papers() for url in re.findall(r"\]\((https?:[^)\s]+)\)", row[0])}
    assert len(set(entries)) == len(entries)
    assert set(entries) == linked


# -- tables --------------------------------------------------------------------------------------------------


def section(name: str, heading: str) -> str:
    text = (ROOT / name).read_text()
    return re.split(rf"^#+ {re.escape(heading)}$", text, flags=re.MULTILINE)[1].split("\n#")[0]


def test_the_glossary_is_the_programs():
    rows = re.findall(r"^\| (.+?) \| (.+) \|$", section("docs/glossary.md", "Terms"), re.MULTILINE)
    said = {term.replace("\\*", "*"): meaning.replace("\\*", "*") for term, meaning in rows[1:]}
    assert said == words.TERMS


def test_every_setting_is_documented_as_it_is():
    remedy = "run python scripts/settings_page.py --write"
    assert settings_page.PAGE.read_text() == settings_page.page(), remedy


def test_every_key_of_a_result_a_plan_and_a_decision_is_documented(finished):
    _, outcome, _ = finished
    pages = (
        "docs/results.md",
        "ebc_lab/records/decisions.py",
        "ebc_lab/records/figures.py",
        "ebc_lab/components/memory.py",
    )
    documented = set(re.findall(r"\w+", "\n".join((ROOT / page).read_text() for page in pages)))
    found: set[str] = set()
    for name in ("result", "spec"):
        for path in outcome.study.runs.glob(f"*/{name}.json"):
            found |= set(read_json(path))
    for decision in outcome.study.decisions().values():
        found |= set(decision)
        for track in decision["tracks"].values():
            found |= set(track)
    found |= set(read_json(outcome.study.root / "acceptance.json"))
    assert found - documented == set()
