"""Suites defined by the user: `study=./mine.yaml`, or `study=mine` for ./conf/study/mine.yaml."""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import sources

ENDINGS = (".yaml", ".yml")
GROUP = "study"
FOLDER = Path("conf") / GROUP  # in the working folder
OTHER_NUMBER = re.compile(  # octal, binary and hexadecimal numbers, h:m:s times, numbers with underscores
    r"[-+]?(0[0-9_]+|0[bBoOxX][0-9a-fA-F_]+|[0-9][0-9_]*(:[0-9_]+)+(\.[0-9_]*)?"
    r"|(?=[0-9._]*_)[0-9.][0-9_.]*([eE][-+]?[0-9]+)?)"
)
IN_THOUSANDS = re.compile(r"[-+]?[1-9][0-9]{0,2}(_[0-9]{3})+")  # such as 10_000, which is unambiguous


def own_suites(package: Path) -> dict[str, Path]:
    """Return the files of the suites in conf/study of the working folder, by name. Return an empty dict if
    there is no such folder or it belongs to `package`, the built-in `conf`."""
    folder = Path.cwd() / FOLDER
    if not folder.is_dir() or folder.resolve() == (package / GROUP).resolve():
        return {}
    return {path.stem: path for path in sorted(folder.iterdir()) if path.suffix in ENDINGS}


def is_path(choice: str) -> bool:
    """Return whether a choice of `study` is the path of a file rather than a name."""
    return choice.endswith(ENDINGS) or os.sep in choice


def suite_file(choice: object, package: Path) -> Path | None:
    """Return the file of a user-defined suite, or None if `choice` names any other suite. Raises LookupError,
    whose message is a clause, if there is no suite at the given path."""
    if not isinstance(choice, str):
        return None
    if not is_path(choice):
        return own_suites(package).get(choice)
    path = Path(choice).expanduser()
    if path.is_file() and path.suffix in ENDINGS:
        return Path(os.path.abspath(path))
    folder = path.parent
    there = sorted(one.name for one in folder.iterdir() if one.suffix in ENDINGS) if folder.is_dir() else []
    near = difflib.get_close_matches(path.name, there, 1) or there[:5]
    meant = f" (there is {', '.join(near)})" if near else ""
    what = "is no file that ends in .yaml" if path.exists() else "is not there"
    raise LookupError(f"{what}{meant}: give the file of a suite")


def beside_us(name: object) -> str | None:
    """Return the path, such as `./mine.yaml`, of a suite in the working folder with this name or a similar
    one, or None if there is none."""
    files = {path.stem: path.name for path in Path.cwd().iterdir() if path.suffix in ENDINGS}
    near = difflib.get_close_matches(str(name), files, 1)
    return f"./{files[near[0]]}" if near else None


def chosen_name(path: Path) -> str:
    """Return the name under which the suite in this file is registered with Hydra."""
    return f"own-{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"


def read(path: Path) -> dict[str, Any]:
    """Return the settings in a suite's file. The study is named after the file by default, and targets of
    parts in the same folder become paths. Raises LookupError if the file cannot be read; the message is a
    sentence with the line, if known."""
    import yaml
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        with open(path, encoding="utf-8") as text:
            suite = OmegaConf.load(text)
            text.seek(0)
            for event in yaml.parse(text):
                if isinstance(event, yaml.ScalarEvent) and event.implicit[0]:  # neither quoted nor tagged
                    _refuse_other_number(path, event.start_mark.line + 1, event.value)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise _mistake(path, mark.line + 1 if mark else None, what) from None
    except OmegaConfBaseException as error:  # of a ${…} that cannot be read
        line = line_of(path, error.full_key or "")
        raise _mistake(path, line, str(error).splitlines()[0]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise LookupError(f"{path} cannot be read ({error}): give the file of a suite, in UTF-8.") from None
    if not isinstance(suite, DictConfig):
        raise LookupError(f"{path} holds no settings: a suite begins with lines such as ablation: …")
    settings: Any = OmegaConf.to_container(suite)
    named = settings.setdefault(GROUP, {})
    if isinstance(named, dict):
        named.setdefault("name", re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-."))
    if "_self_" not in settings.get("defaults", ["_self_"]):
        settings["defaults"] = [*settings["defaults"], "_self_"]
    made: dict[str, Any] = with_places(settings, path.parent)
    return made


def _refuse_other_number(path: Path, line: int, written: str) -> None:
    """Raise LookupError for a number whose value in YAML 1.1 is not what its digits say, such as 010."""
    import yaml

    if OTHER_NUMBER.fullmatch(written) and not IN_THOUSANDS.fullmatch(written):
        number = yaml.safe_load(written)
        read = f"is read as {number} in YAML 1.1" if isinstance(number, int | float) else "is no plain number"
        raise LookupError(
            f"{path.name}:{line}: {written} {read}: write the number you mean in decimal digits, with no "
            f"zeros before it, or '{written}' in quotes where it is text."
        )


def _mistake(path: Path, line: int | None, what: str) -> LookupError:
    return LookupError(f"{path}{f':{line}' if line else ''}: {what}: mend the file.")


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


def register(path: Path) -> dict[str, Any]:
    """Register the suite in a file with Hydra as a choice of `study`, and return its settings."""
    from hydra.core.config_store import ConfigStore

    settings = read(path)
    ConfigStore.instance().store(group=GROUP, name=chosen_name(path), node=settings, package="_global_")
    return settings


def line_of(path: Path, key: str) -> int | None:
    """Return the line of a suite's file that sets a dotted key, or else the line of the innermost mapping
    around the key. Return None if the file has neither."""
    return next(reversed(_lines(path, key)), None)


def sets(path: Path, key: str) -> bool:
    """Return whether a suite's file itself sets a dotted key."""
    return len(_lines(path, key)) == len(key.split("."))


def _lines(path: Path, key: str) -> list[int]:
    """Return the line of each part of a dotted key, up to the first part that the suite's file lacks."""
    import yaml

    node: Any = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    lines = []
    for part in key.split("."):
        inside = getattr(node, "value", None)  # for a mapping, a list of (name, value) pairs
        pairs = [one for one in inside if isinstance(one, tuple)] if isinstance(inside, list) else []
        pair = next((one for one in pairs if one[0].value == part), None)
        if pair is None:
            break
        lines.append(pair[0].start_mark.line + 1)
        node = pair[1]
    return lines
