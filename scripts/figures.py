"""Every figure of README, docs and pictures, with the command that makes it.

usage: python scripts/figures.py [PAGE …]   lists them: where, which, its command, date, machine and commit
       … --old      measurements of before the last change of numerics, or before the pages were laid out anew
       … --check    fails where a passage has figures and no entry in figures.toml, and where an entry's
                    passage, command or commit is no more
       … --write    docs/figures.md

A figure is a number with a unit or a fraction, an interval, or any number of a table. Those that nobody
measured here, but defined, chosen or cited, have an entry, too.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import re
import shlex
import subprocess
import sys
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from ebc_lab.cli.commands import app
from ebc_lab.config.identity import NUMERICS_VERSION

ROOT = Path(__file__).parent.parent
ENTRIES = ROOT / "scripts" / "figures.toml"
PAGE = "docs/figures.md"
IMAGES = "docs/images"

# -- pages -> passages ---------------------------------------------------------------------------------------

NUMBER = r"(?:(?<![\w.])[+−-]?(?:\d+(?:,\d{3})*(?:\.\d+)?|[½¼¾⅓])½?(?:·10[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+|e-\d+)?)"
FRACTION = r"(?<![\w.])(?<!torch )(?<!Python )[+−-]?\d+\.\d+(?![.\d])"
IN_WORDS = r"\b(?:an?|half an|two|three|four|five|six|seven|eight|nine|ten|\w+teen) (?:minute|hour)s?\b"
UNIT = (
    r"(?:%|×|-fold|(?:nats|octaves?|s|ms|µs|min|h|minutes?|hours?|seconds?|[kKMGT]i?B|bytes|[GT]FLOP/s|"
    r"(?:million )?(?:tokens|steps)/s|times|σ|runs?|tests?|passed|kernels|operations|copies|million|arms|"
    r"breaks|loops|rad)\b)"
)
RANGE = rf"{NUMBER}(?:(?: to | and | or |, |–| ?± ?){NUMBER})*"
FIGURE = re.compile(
    rf"\[{NUMBER}, {NUMBER}\]|{RANGE}\s?{UNIT}|[×≥±] ?{NUMBER}|{FRACTION}(?: ± {FRACTION})?|{IN_WORDS}"
)
OF_A_TABLE = re.compile(rf"{FIGURE.pattern}|{NUMBER}")
HIDDEN = re.compile(r"(?<!`)`[^`\n]+`(?!`)|\]\([^)\s]*\)|arXiv:[\d.]+")
BEGINS = re.compile(r"\s*(?:[*-] |\d+\. |\||> )")


@dataclass
class Passage:
    """A paragraph, an item of a list, a row of a table or a block of code."""

    page: str
    anchor: str  # of the heading above
    line: int
    text: str
    head: str  # of a row: the first one of its table

    def begins(self, words: str) -> bool:
        bare = (re.sub(r"^\s*(?:[*-] |\| *|> )", "", text) for text in (self.text, self.head))
        return any(re.sub(r"\s+", " ", text).startswith(words) for text in bare)

    def figures(self) -> Iterator[tuple[int, str]]:
        """Line and figure. Numbers in code within a text, in links and in a paper's number do not count."""
        text = HIDDEN.sub(lambda hidden: " " * len(hidden[0]), self.text)
        for found in (OF_A_TABLE if self.head else FIGURE).finditer(text):
            yield self.line + text.count("\n", 0, found.start()), " ".join(found[0].split())


def passages(page: str) -> Iterator[Passage]:
    anchor, head, lines, begun, fenced = "", "", list[str](), 0, False
    for number, line in enumerate([*(ROOT / page).read_text(encoding="utf-8").splitlines(), ""], 1):
        fence = line.lstrip().startswith("```")
        heading = None if fenced else re.match(r"#+ (.+)$", line)
        if lines and (not fenced or fence) and (fence or heading or not line.strip() or BEGINS.match(line)):
            lines += [line] * fenced
            yield Passage(page, anchor, begun, "\n".join(lines), head)
            lines = []
        is_row = not fenced and line.lstrip().startswith("|")
        head = (head or line) if is_row else ""
        if heading:
            anchor = re.sub(r"[^\w\- ]", "", heading[1].lower().strip()).replace(" ", "-")
        elif line.strip(" |-:") and not (fence and fenced):
            begun = begun if lines else number
            lines.append(line)
        fenced ^= fence


def pages() -> list[str]:
    found = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [str(path.relative_to(ROOT)) for path in found if path != ROOT / PAGE]


# -- entries -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measurement:
    what: str
    date: datetime.date
    machine: str
    commit: str
    holds: str
    command: str = ""
    by_hand: str = ""
    trained_by: str = ""
    numerics: int = NUMERICS_VERSION

    @property
    def is_old(self) -> bool:
        return self.numerics < NUMERICS_VERSION or self.date < read()["laid_out_anew"]


@functools.cache
def read() -> dict[str, Any]:
    return tomllib.loads(ENTRIES.read_text(encoding="utf-8"))


@functools.cache
def measured() -> dict[str, Measurement]:
    return {name: Measurement(**one) for name, one in read()["measurement"].items()}


@functools.cache
def places() -> dict[str, dict[str, list[str]]]:
    """Page -> place, `anchor | first words` or `anchor` or ``, the rest of it -> what its figures are of."""
    of = read()["of"].items()
    return {page: {at: [n] if isinstance(n, str) else n for at, n in here.items()} for page, here in of}


def place_of(passage: Passage) -> str | None:
    """The entry that says most closely what it is of."""
    here = places().get(passage.page, {})
    split = [(key, *key.partition(" | ")[::2]) for key in here]
    fitting = [key for key, anchor, words in split if anchor == passage.anchor and passage.begins(words)]
    return max([*fitting, *({""} & here.keys())], key=len, default=None)


def figures() -> Iterator[tuple[Passage, int, str, list[str]]]:
    """Every figure with its passage, its line, and what it is of: nothing without an entry."""
    for page in pages():
        for passage in passages(page):
            place = place_of(passage)
            names = [] if place is None else places()[passage.page][place]
            yield from ((passage, line, figure, names) for line, figure in passage.figures())


# -- what is wrong -------------------------------------------------------------------------------------------


def git(*words: str) -> str | None:
    """What git says here, or None where it fails."""
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
    return None if done.returncode else done.stdout.strip()


def missing(command: str) -> str | None:
    """What of a command is not there any more."""
    for program, *words in map(shlex.split, command.split(" && ")):
        known: Any = typer.main.get_command(app) if program == "ebc-lab" else None
        while hasattr(known, "commands") and words:
            if words[0] not in known.commands:
                return f"ebc-lab has no command {words[0]}"
            known = known.commands[words.pop(0)]
        rules = re.findall(r"^([a-z][a-z -]*):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE)
        if program == "make" and words[0] not in " ".join(rules).split():
            return f"make has no target {words[0]}"
        for before, word in zip([program, *words], words, strict=False):
            group, _, choice = word.partition("=")
            paths = [ROOT / word.partition("::")[0].removeprefix("study=")]
            if before == "-m" and program != "pytest":
                module = word.replace(".", "/")
                paths = [
                    ROOT / f"{at}{module}{of}" for at in ("", "tests/") for of in (".py", "/__main__.py")
                ]
            elif group in ("study", "scale", "optimizer", "workload") and "/" not in choice:
                paths = [ROOT / "conf" / group / f"{choice}.yaml"]
            elif not re.match(r"(?:study=)?(?:scripts|tests|docs)/", word):
                continue
            if not any(path.exists() for path in paths):
                return f"there is no {word}"
    return None


def wrong_places() -> Iterator[str]:
    used: defaultdict[str, set[str]] = defaultdict(set)
    for passage, line, figure, names in figures():
        if not names:
            yield f"{passage.page}:{line}: {figure} has no entry (heading {passage.anchor!r})"
        used[passage.page].add(place_of(passage) or "")
    used[IMAGES] = {path.name for path in (ROOT / IMAGES).iterdir()}
    yield from (f"{IMAGES}/{name} has no entry" for name in used[IMAGES] - places()[IMAGES].keys())
    named = {name for here in places().values() for names in here.values() for name in names}
    known = measured().keys() | read()["not_measured"].keys()
    yield from (f"there is no measurement {name}" for name in named - known)
    yield from (f"measurement {name} is of no figure" for name in measured().keys() - named)
    for page, here in places().items():
        yield from (f"{page}: no figure is left at {place!r}" for place in here.keys() - used[page])


def wrong() -> Iterator[str]:
    """What --check finds."""
    yield from wrong_places()
    has_history = (ROOT / ".git").exists() and git("rev-parse", "--is-shallow-repository") == "false"
    for name, one in measured().items():
        if one.holds not in read()["holds"] or not {*one.machine.split(", ")} <= read()["machine"].keys():
            yield f"measurement {name}: another `holds` or `machine` than there are"
        if bool(one.command) == bool(one.by_hand):
            yield f"measurement {name}: either a command, or what was done `by_hand`"
        gone = [what for command in (one.command, one.trained_by) if command and (what := missing(command))]
        if has_history and git("cat-file", "-e", f"{one.commit}^{{commit}}") is None:
            gone.append(f"git has no commit {one.commit}")
        yield from (f"measurement {name}: {what}" for what in gone)
    if not (ROOT / PAGE).exists() or (ROOT / PAGE).read_text(encoding="utf-8") != page_of_all():
        yield f"{PAGE} is not what it would be: run python scripts/figures.py --write"


# -- what is printed -----------------------------------------------------------------------------------------


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def links() -> dict[str, str]:
    """Measurement, or why there is none -> links to where its figures are."""
    found: defaultdict[str, dict[str, None]] = defaultdict(dict)
    for passage, _, _, names in figures():
        file = Path(passage.page).name
        for name in names:
            anchor = f"#{passage.anchor}" if name in measured() and file != "README.md" else ""
            path = "../README.md" if file == "README.md" else file
            found[name][f"[{file}]({path}{anchor})"] = None
    for picture, names in places()[IMAGES].items():
        for name in names:
            found[name][f"[{picture}](images/{picture})"] = None
    return {name: ", ".join(there) for name, there in found.items()}


def page_of_all() -> str:
    where = defaultdict(str, links())
    lines = [read()["top"], row("machine", "is"), "|---|---|"]
    lines += [row(letter, what) for letter, what in read()["machine"].items()]
    lines += ["", "## Measurements", "", row("what", "command", "date", "machine", "commit", "where")]
    lines.append("|---" * 6 + "|")
    for name, one in measured().items():
        command = "`" + one.command.replace(" && ", "`, then `") + "`" if one.command else one.by_hand
        command += f"; trained by `{one.trained_by}`" * bool(one.trained_by)
        date = f"{one.date}{' †' * one.is_old}"
        lines.append(row(one.what, command, date, one.machine, one.commit, where[name]))
    lines += ["", "## What holds on another machine", "", row("holds", "of"), "|---|---|"]
    for holds, means in read()["holds"].items():
        lines.append(row(means, "; ".join(one.what for one in measured().values() if one.holds == holds)))
    lines += ["", "## Numbers that nobody measured here", "", row("they are", "on"), "|---|---|"]
    lines += [row(f"{why}: {means}", where[why]) for why, means in read()["not_measured"].items()]
    return "\n".join(lines) + "\n"


def listed(asked: list[str]) -> Iterator[str]:
    """A line for each figure, of the pages asked for, or of all."""
    for passage, line, figure, names in figures():
        for name in (names or ["no entry"]) if passage.page in asked or not asked else ():
            one = measured().get(name)
            said = f"{one.command or 'by hand'} · {one.date} · {one.machine} · {one.commit}" if one else ""
            yield f"{passage.page}:{line}  {figure}  {name}  {said}".rstrip()


def main() -> int:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("pages", nargs="*")
    for option in ("old", "check", "write"):
        parser.add_argument(f"--{option}", action="store_true")
    asked = parser.parse_args()
    lines: list[str] = []
    if asked.write:
        (ROOT / PAGE).write_text(page_of_all(), encoding="utf-8")
    elif asked.check:
        lines = [*wrong()]
    elif asked.old:
        old = {name: one for name, one in measured().items() if one.is_old}
        lines = [f"{name}: {one.date}, {one.trained_by or one.command}" for name, one in old.items()]
    else:
        of = Counter(names[0] in measured() for *_, names in figures() if names)
        lines = [*listed(asked.pages), f"{of[True]} of {len(measured())} measurements, {of[False]} of none"]
    print("\n".join(lines), end="\n" * bool(lines))
    return bool(asked.check and lines)


if __name__ == "__main__":
    sys.exit(main())
