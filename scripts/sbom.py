"""The software bill of materials: the packages that ebc-lab needs when it runs, with versions and licences.

usage: python scripts/sbom.py [FILE]    CycloneDX as JSON, into a file or printed

`make package` puts it in the sdist. Versions are those of constraints.txt; licences, and what needs what, are
read from the installed packages. What only extras need has the scope `optional` and names them. Extras for
work on ebc-lab itself are left out, and so is what a build of torch for GPUs brings. Without a date and a
serial number the same packages give the same bytes.
"""

from __future__ import annotations

import json
import sys
import tomllib
from importlib.metadata import Distribution
from itertools import chain
from pathlib import Path

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import Property
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentScope, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from lock import LOCK, OF_CUDA, needed
from packageurl import PackageURL
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import ebc_lab

ROOT = Path(__file__).parent.parent
NAME = "sbom.cdx.json"  # in the sdist
OURS = "ebc-lab"
FOR_DEVELOPERS = ("docs", "dev")  # extras that nothing needs at run time
CLASSIFIED = {  # licences as classifiers call them -> SPDX
    "Apache Software License": "Apache-2.0",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
}
READ = {"torchao": "BSD-3-Clause"}  # whose metadata names none: read in its licence file


def licences(package: Distribution) -> list[str]:
    """Return what a package's metadata says of its licence, in SPDX's words where that is clear."""
    about = package.metadata
    if expressions := about.get_all("License-Expression"):
        return list(expressions)
    classifiers = [line.split(" :: ") for line in about.get_all("Classifier") or []]
    names = {line[-1] for line in classifiers if line[0] == "License"} - {"OSI Approved"}
    if names:
        return sorted(CLASSIFIED.get(name, name) for name in names)
    [free] = about.get_all("License") or ["UNKNOWN"]
    name = canonicalize_name(about["Name"])
    return [READ[name]] if free == "UNKNOWN" and name in READ else [free.strip().splitlines()[0]]


def sbom() -> str:
    """Return the bill of materials as JSON. Ends the script where a package's licence is unknown, or one that
    asks for a judgement."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {k: v for k, v in project["optional-dependencies"].items() if k not in FOR_DEVELOPERS}
    asked = [*project["dependencies"], *chain.from_iterable(extras.values())]
    always = needed(project["dependencies"])
    brought = {extra: needed(lines) for extra, lines in extras.items()}
    everything = {name: package for name, package in needed(asked).items() if not OF_CUDA.match(name)}
    locked = dict(line.split("==") for line in LOCK.read_text(encoding="utf-8").splitlines() if "==" in line)
    parts = {}
    for name in sorted(everything):
        package = everything[name].distribution
        version = locked.get(name, Version(package.version).public)
        by = [] if name in always else [extra for extra in brought if name in brought[extra]]
        parts[name] = _component(name, version, licences(package), by)

    lab = Component(
        name=OURS,
        version=ebc_lab.__version__,
        type=ComponentType.APPLICATION,
        bom_ref=OURS,
        licenses=[LicenseFactory().make_from_string(project["license"])],
        purl=PackageURL("pypi", name=OURS, version=ebc_lab.__version__),
    )
    bom = Bom(components=parts.values())
    bom.metadata.component = lab
    direct = {canonicalize_name(Requirement(line).name) for line in asked}
    bom.register_dependency(lab, [parts[name] for name in sorted(direct)])
    for name, part in parts.items():
        bom.register_dependency(part, [parts[n] for n in sorted(everything[name].requires) if n in parts])
    return _written(bom)


def _component(name: str, version: str, found: list[str], extras: list[str]) -> Component:
    if any(licence == "UNKNOWN" or "GPL" in licence for licence in found):
        sys.exit(f"the licence of {name} is {', '.join(found)}: see Licences in CONTRIBUTING.md")
    return Component(
        name=name,
        version=version,
        bom_ref=name,
        scope=ComponentScope.OPTIONAL if extras else ComponentScope.REQUIRED,
        licenses=[LicenseFactory().make_from_string(licence) for licence in found],
        purl=PackageURL("pypi", name=name, version=version),
        properties=[Property(name="ebc-lab:extra", value=extra) for extra in extras],
    )


def _written(bom: Bom) -> str:
    """Return the bill as JSON, checked against its schema, without what would differ from call to call."""
    bill = json.loads(JsonV1Dot6(bom).output_as_string())
    del bill["serialNumber"], bill["metadata"]["timestamp"]
    text = json.dumps(bill, indent=2, ensure_ascii=False) + "\n"
    if wrong := JsonStrictValidator(SchemaVersion.V1_6).validate_str(text):
        sys.exit(f"{NAME}: {wrong}")
    return text


if __name__ == "__main__":
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(sbom(), encoding="utf-8")
    else:
        print(sbom(), end="")
