"""Find the study that a command's argument stands for: a name, a folder, a pattern or a bundle; and the model
that one has kept."""

from __future__ import annotations

import glob
import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ebc_lab.config.errors import UserError, any_of, nearest, visible
from ebc_lab.config.own.files import ENDINGS, GROUP, OwnFile, read
from ebc_lab.config.schema import STAGES
from ebc_lab.records.paths import RunFiles, matching_paths

from .bundle import SUFFIX, Bundled, is_bundle, unpack, verify
from .study import Study, studies_in, study_around
from .verify import verify as verify_study

Say = Callable[[str], None]
FILES = (*ENDINGS, ".csv", ".json", ".jsonl", ".parquet", ".py", SUFFIX)  # of names that mean no folder
INSERTED = re.compile(r"\$\{.*?\}")


def find(name: str | None, output_dir: str, say: Say = lambda text: None) -> Study:
    """Return the study or bundle of this name or path; without a name, the newest study in `output_dir`.
    Raises UserError if `output_dir` holds no study, the bundle is damaged, or the name is a suite's file."""
    if name:
        path = place_of(name, output_dir, say)
        return Bundled(path) if is_bundle(path) else Study(path)
    base = Path(output_dir).expanduser()
    studies = studies_in(base)
    if not studies:
        raise UserError(no_study_in(base))
    return studies[0]


def find_all(names: Sequence[str], output_dir: str, say: Say) -> list[Study]:
    """Return the studies that the names, folders of studies and patterns stand for, each once; without names,
    the newest study. Raises UserError if a pattern matches no study, and as `find` does."""
    studies: dict[Path, Study] = {}
    for study in (study for name in names for study in _meant(name, output_dir, say)):
        studies.setdefault(study.root.resolve(), study)
    return list(studies.values()) if names else [find(None, output_dir, say)]


def _meant(name: str, output_dir: str, say: Say) -> list[Study]:
    """Return the study called `name`. If there is none, return all studies in the folder `name`, or all that
    match `name` as a pattern. If nothing is found, raise UserError for a pattern; for a plain name, return
    its study although it does not exist."""
    named = find(name, output_dir, say)
    if named.exists():
        return [named]
    for place in dict.fromkeys([named.root, Path(name).expanduser()]):
        inside = studies_in(place) if place.is_dir() else map(Study, matching_paths(place))
        if studies := [study for study in inside if study.exists()]:
            return sorted(studies, key=lambda study: study.name)
    if glob.has_magic(name):
        raise UserError(f"no study is called {visible(name)}, neither in {output_dir} nor here.")
    return [named]


def no_study_in(folder: Path) -> str:
    """Return the error message for a folder without a study. It names any studies in the working folder."""
    here = [study.name for study in studies_in(Path()) if study.exists()]
    here += sorted(path.name for path in Path().glob(f"*{SUFFIX}"))
    if not here or folder.resolve() == Path.cwd():
        start = "start one with `ebc-lab autopilot`, or judge runs of another trainer with `ebc-lab judge`"
        return f"there is no study in {folder}: {start}."
    there, first = visible(", ".join(here)), visible(shlex.quote(f"./{here[0]}"))
    which = f"name {'it' if len(here) == 1 else 'one of them'}, {first}, or this folder with `.`"
    return f"there is no study in {folder}, but this folder has {there}: {which}."


def not_a_study(file: Path) -> str:
    """Return the error message for a file that is given for a study: it may be one of a study's files, a part
    of the user's own, or of runs of another trainer."""
    place = visible(str(file))
    if study := study_around(file):
        name = visible(study.root.resolve().name)
        return f"{place} is a file of the study {name}: give the study, {visible(str(study.root))}."
    if file.suffix == ".py":
        part = visible(shlex.quote(f"mine={file if os.sep in str(file) else f'./{file}'}"))
        return (
            f"{place} is a file and no study: `ebc-lab autopilot study=optimizers {part}` tries what it has."
        )
    return (
        f"{place} is a file and no study: if it holds runs that you have already, "
        f"`ebc-lab judge {visible(shlex.quote(str(file)))}` answers from them."
    )


def place_of(name: str, output_dir: str, say: Say) -> Path:
    """Return the path of a study's folder or bundle. A path is returned as given; a plain name is looked up
    in `output_dir`, then in the working folder. If both hold one, `say` is told which is taken. Raises
    UserError for a file that is no bundle, or is not there."""
    here = Path(name).expanduser()
    if here.name in ("", ".."):  # `.` and `..`, which name no folder
        here = here.resolve()
    if here.suffix in ENDINGS and here.is_file():
        try:
            study = str(read(OwnFile(GROUP, here))["study"]["name"])
        except (LookupError, TypeError):
            study = here.stem
        # a name into which a setting goes, such as ${scale}, is that of several studies
        pattern = INSERTED.sub("*", study)
        made = [s.name for s in studies_in(Path(output_dir).expanduser()) if fnmatch(s.name, pattern)]
        names = visible(any_of(made) if made else study)
        raise UserError(f"{here} is a suite's file, not a study: give the study's name, {names}.")
    inside = Path(output_dir).expanduser() / name
    if here.suffix in FILES and not here.exists() and not inside.exists():
        raise UserError(
            f"there is no file {visible(name)}: say where it is, or name a study that `ebc-lab list` shows."
        )
    is_path = os.sep in str(Path(name)) or name.startswith((".", "~"))
    if here.is_file() and not is_bundle(here) and (is_path or not Study(inside).exists()):
        raise UserError(not_a_study(here))
    if is_path:
        return here
    both = [path for path in (inside, here) if (path.is_file() if is_bundle(path) else Study(path).exists())]
    if both == [here]:
        return here
    if len(both) == 2 and not inside.samefile(here):
        say(f"taking {inside} for {name}; the one in this folder is ./{name}")
    return inside


@contextmanager
def to_rebuild(
    name: str | None, output_dir: str, output: Path | None, say: Say = lambda text: None
) -> Iterator[Study]:
    """Yield the study that `report` rebuilds. A bundle is first unpacked, into `output` or else beside the
    bundle; that folder is removed again if rebuilding fails. Raises UserError if there is no such study, or
    another study is in the way."""
    path = place_of(name, output_dir, say) if name else None
    if not (path and is_bundle(path)):
        if output:
            raise UserError(
                "--output is for bundles: a study's tables and pictures are rebuilt in its own folder."
            )
        yield Study(path) if path else find(None, output_dir)
        return
    study = unpack(path, output.expanduser() if output else _folder_beside(path, output_dir))
    try:
        yield study
    except BaseException:
        shutil.rmtree(study.root, ignore_errors=True)
        raise


def _folder_beside(path: Path, output_dir: str) -> Path:
    """Return the folder that a bundle is unpacked into by default. Raises UserError if a study is there, or
    one in `output_dir` has its name."""
    into = path.with_suffix("")
    study = Path(output_dir).expanduser() / into.name
    other = f"--output {shlex.quote(str(path.with_name(f'{into.name}_unpacked')))}"
    if Study(into).exists():
        raise UserError(
            f"{into} is there already: `ebc-lab report {shlex.quote(str(into))}` rebuilds it, or choose "
            f"another folder for the bundle, {other}."
        )
    if Study(study).exists():
        raise UserError(
            f"{path} cannot be unpacked into {into}, because it would have the name of the study {study}: "
            f"choose another folder, {other}."
        )
    return into


def verify_named(name: str | None, output_dir: str, sha256: str | None, say: Say) -> dict[str, Any]:
    """Return the findings of `verify` on a study or bundle. `sha256`: the checksum required of a bundle."""
    path = place_of(name, output_dir, say) if name else None
    if path and is_bundle(path):
        return verify(path, sha256)
    if sha256:
        raise UserError("--sha256 is for bundles: a study's manifest.json has those of its files.")
    return verify_study(Study(path) if path else find(None, output_dir))


def find_model(name: str, arm: str | None, output_dir: str, say: Say) -> Path:
    """Return the path of a kept model.pt: a run's folder names its last, and with `arm` a study names that of
    the arm's run in the latest stage with the lowest seed. Raises UserError if a study has no such model."""
    path = Path(name).expanduser()
    if arm is None and not Study(path).exists():
        return RunFiles(path).model if path.is_dir() else path
    study = Study(path) if arm is None else find(name, output_dir, say)
    study.must_exist()
    models = _models_in(study)
    if arm in models:
        return models[arm]
    if not models:
        raise UserError(f"the study {study.root} has no model: it is of another workload, or not done yet.")
    arms = any_of([*models])
    if arm is None:
        raise UserError(f"{path} is a study: name one of its arms with --arm, {arms}.")
    raise UserError(
        f"no run of {study.root} with arm {arm}{nearest(arm, [*models])} has a model: it has {arms}."
    )


def _models_in(study: Study) -> dict[str, Path]:
    """Return, by arm, the model.pt of the run in the latest stage, with the lowest seed, that has one."""
    models = []
    for record in study.records():
        path = study.run_files(record.run_id).model
        if record.spec is not None and record.spec["kind"] == "train" and path.is_file():
            place = STAGES.index(record.spec["stage"]) if record.spec["stage"] in STAGES else -1
            models.append((-place, record.spec["config"]["seed"], record.run_id, record.spec["arm"], path))
    first: dict[str, Path] = {}
    for *_, arm, path in sorted(models):
        first.setdefault(arm, path)
    return first
