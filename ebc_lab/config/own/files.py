"""Choices defined by the user, in files like those of `conf/`: `study=./mine.yaml`, or `launcher=mine` for
./conf/launcher/mine.yaml."""

from __future__ import annotations

import difflib
import filecmp
import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from ..errors import UserError, shown
from . import sources

ENDINGS = (".yaml", ".yml")
GROUP = "study"
WHOLE = (GROUP, "scale", "check")  # groups whose files set anything of a study, not just the group's settings
FOLDER = Path("conf")  # in the working folder
OTHER_NUMBER = re.compile(  # octal, binary and hexadecimal numbers, h:m:s times, numbers with underscores
    r"[-+]?(0[0-9_]+|0[bBoOxX][0-9a-fA-F_]+|[0-9][0-9_]*(:[0-9_]+)+(\.[0-9_]*)?"
    r"|(?=[0-9._]*_)[0-9.][0-9_.]*([eE][-+]?[0-9]+)?)"
)
DEEPEST = 64  # levels of nested lists and mappings
MOST_VALUES = 1_000_000
IN_THOUSANDS = re.compile(r"[-+]?[1-9][0-9]{0,2}(_[0-9]{3})+")  # such as 10_000, which is unambiguous


class OwnFile(NamedTuple):
    """The file of a choice that the user defined."""

    group: str
    path: Path

    @property
    def chosen_name(self) -> str:
        """Return the name under which the choice is registered with Hydra."""
        plain = re.sub(r"\W+", "-", self.path.stem, flags=re.ASCII).strip("-")
        return f"own-{plain}-{hashlib.sha256(str(self.path).encode()).hexdigest()[:8]}"

    def line_of(self, key: str) -> int | None:
        """Return the line that sets a dotted key, or else the line of the innermost mapping around the key.
        Return None if the file has neither."""
        return next(reversed(self._lines(key)), None)

    def sets(self, key: str) -> bool:
        """Return whether the file itself sets a dotted key."""
        return len(self._lines(key)) == len(self._inside(key))

    def _inside(self, key: str) -> list[str]:
        """Return the names of which a dotted key is made, in the file of most groups without the group's."""
        return key.split(".")[self.group not in WHOLE :]

    def _lines(self, key: str) -> list[int]:
        """Return the line of each name in a dotted key, up to the first that the file lacks."""
        import yaml

        if self.group not in (*WHOLE, key.partition(".")[0]):
            return []
        node: Any = yaml.compose(self.path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        lines = []
        for part in self._inside(key):
            inside = getattr(node, "value", None)  # for a mapping, a list of (name, value) pairs
            pairs = [one for one in inside if isinstance(one, tuple)] if isinstance(inside, list) else []
            pair = next((one for one in pairs if one[0].value == part), None)
            if pair is None:
                break
            lines.append(pair[0].start_mark.line + 1)
            node = pair[1]
        return lines


def conf_dir() -> Path:
    """Return the folder of the Hydra groups: inside the package if installed, beside it in a checkout."""
    package = Path(__file__).parent.parent.parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def own_choices(group: str) -> dict[str, Path]:
    """Return the files of a group's choices in conf/ of the working folder, by name. Files equal to those of
    the built-in `conf` are left out: in a clone of the repository they are nobody's own."""
    folder, built_in = Path.cwd() / FOLDER / group, conf_dir() / group
    if not folder.is_dir() or folder.resolve() == built_in.resolve():
        return {}
    files = [path for path in sorted(folder.iterdir()) if path.suffix in ENDINGS]
    copies, _, _ = filecmp.cmpfiles(folder, built_in, [path.name for path in files], shallow=False)
    return {path.stem: path for path in files if path.name not in copies}


def is_path(choice: str) -> bool:
    """Return whether a choice of a group is the path of a file rather than a name."""
    return choice.endswith(ENDINGS) or os.sep in choice


def own_file(group: str, choice: object) -> OwnFile | None:
    """Return the file of a user-defined choice, or None if `choice` names any other. Raises UserError for a
    path at which there is none."""
    if not isinstance(choice, str):
        return None
    if not is_path(choice):
        path = own_choices(group).get(choice)
        return OwnFile(group, path) if path else None
    path = Path(choice).expanduser()
    if path.is_file() and path.suffix in ENDINGS:
        return OwnFile(group, Path(os.path.abspath(path)))
    folder = path.parent
    there = sorted(one.name for one in folder.iterdir() if one.suffix in ENDINGS) if folder.is_dir() else []
    near = difflib.get_close_matches(path.name, there, 1) or there[:5]
    meant = f" (there is {', '.join(near)})" if near else ""
    what = "is no file that ends in .yaml" if path.exists() else "is not there"
    kind = "suite" if group == GROUP else group
    raise UserError(f"{group}={shown(choice)} {what}{meant}: give the file of a {kind}.")


def beside_us(name: object) -> str | None:
    """Return the path, such as `./mine.yaml`, of a suite in the working folder with this name or a similar
    one, or None if there is none."""
    files = {path.stem: path.name for path in Path.cwd().iterdir() if path.suffix in ENDINGS}
    near = difflib.get_close_matches(str(name), files, 1)
    return f"./{files[near[0]]}" if near else None


def read(own: OwnFile) -> dict[str, Any]:
    """Return the settings in the file of a choice. A suite's study is named after the file by default, and
    targets of parts in the same folder become paths. Raises UserError, with the line if it is known, if the
    file cannot be read."""
    import yaml
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    path, is_suite = own.path, own.group == GROUP
    try:
        with open(path, encoding="utf-8") as text:
            events = check_yaml(text)
            text.seek(0)
            # the words of a quoted document would be read as YAML once more
            words = any(isinstance(root, yaml.ScalarEvent) and root.value for root in events[2:3])
            loaded = None if words else OmegaConf.load(text)
            for event in events:
                if isinstance(event, yaml.ScalarEvent) and event.implicit[0]:  # neither quoted nor tagged
                    _refuse_other_number(path, event.start_mark.line + 1, event.value)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise _mistake(path, mark.line + 1 if mark else None, what) from None
    except OmegaConfBaseException as error:  # of a ${…} that cannot be read
        line = OwnFile(GROUP, path).line_of(error.full_key or "")  # the key is as the file has it
        raise _mistake(path, line, str(error).splitlines()[0]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): give a file of settings, in UTF-8.") from None
    if not isinstance(loaded, DictConfig):
        example = "a suite begins with lines such as ablation: …" if is_suite else "give it some, KEY: VALUE"
        raise UserError(f"{path} holds no settings: {example}")
    settings: Any = OmegaConf.to_container(loaded)
    named = settings.setdefault(GROUP, {}) if is_suite else None
    if isinstance(named, dict):
        named.setdefault("name", re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-."))
    defaults = settings.get("defaults", ["_self_"])
    if not isinstance(defaults, list) or not all(isinstance(one, str | dict) for one in defaults):
        raise UserError(f"{path}: defaults takes a list of names of choices, such as [NAME].")
    if "_self_" not in defaults:
        settings["defaults"] = [*defaults, "_self_"]
    made: dict[str, Any] = with_places(settings, path.parent)
    return made


def _refuse_other_number(path: Path, line: int, written: str) -> None:
    """Raise UserError for a number whose value in YAML 1.1 is not what its digits say, such as 010."""
    import yaml

    if OTHER_NUMBER.fullmatch(written) and not IN_THOUSANDS.fullmatch(written):
        number = yaml.safe_load(written)
        read = f"is read as {number} in YAML 1.1" if isinstance(number, int | float) else "is no plain number"
        raise UserError(
            f"{path.name}:{line}: {written} {read}: write the number you mean in decimal digits, with no "
            f"zeros before it, or '{written}' in quotes where it is text."
        )


def _mistake(path: Path, line: int | None, what: str) -> UserError:
    return UserError(f"{path}{f':{line}' if line else ''}: {what}: mend the file.")


def check_yaml(text: str | TextIO) -> list[Any]:
    """Return the events of YAML. Raise YAMLError where it is nested more than DEEPEST levels, or its aliases
    stand for more than MOST_VALUES values: a few lines of them fill a machine's memory once written out."""
    import yaml

    sizes = [1]  # of what is open: the document, and each mapping and list
    anchors: list[str | None] = [None]
    known: dict[str, int] = {}
    events = []
    for event in yaml.parse(text):
        events.append(event)
        if isinstance(event, yaml.CollectionStartEvent):
            sizes.append(1)
            anchors.append(event.anchor)
        elif isinstance(event, yaml.CollectionEndEvent):
            size, anchor = sizes.pop(), anchors.pop()
            sizes[-1] += size
            if anchor:
                known[anchor] = size
        elif isinstance(event, yaml.AliasEvent) and event.anchor in anchors:
            raise yaml.YAMLError(f"{event.anchor} holds itself")
        elif isinstance(event, yaml.NodeEvent):
            sizes[-1] += known.get(event.anchor, 1) if isinstance(event, yaml.AliasEvent) else 1
        if len(sizes) > DEEPEST or sizes[-1] > MOST_VALUES:
            raise yaml.YAMLError("it is nested too deeply, or its aliases stand for too many values")
    return events


def with_places(value: Any, folder: Path, key: str = "") -> Any:
    """Return the settings with every target of a file in this folder written as a path."""
    if isinstance(value, Mapping):
        return {name: with_places(inner, folder, str(name)) for name, inner in value.items()}
    if isinstance(value, list):
        return [with_places(inner, folder, key) for inner in value]
    return _place(value, folder) if key in ("target", "mine") and isinstance(value, str) else value


def _place(target: str, folder: Path) -> str:
    """Return `/folder/my_opt.py:Cautious` for a target whose file is in `folder`, and others unchanged. The
    target may name another folder, because a study copies parts into the folder of their suite."""
    written = sources.BY_PATH.fullmatch(target)
    if written is None:
        module, _, name = target.partition(":")
        beside = folder / f"{module}.py"
        if name and beside.is_file():
            return f"{beside}:{name}"
        if (folder / module.partition(".")[0]).is_dir():
            sources.remember(folder)
        return target
    file = Path(written["file"]).expanduser()
    places = (folder / file, Path.cwd() / file, folder / file.name)
    here = next((one for one in places if one.is_file()), file)
    return f"{here}:{written['name']}"
