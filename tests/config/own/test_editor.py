"""What editors check settings against says what the program says."""

import json
import re
from pathlib import Path

import json_schemas
import jsonschema
import pytest
from omegaconf import OmegaConf
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT7

from ebc_lab.config.compose import compose
from ebc_lab.config.errors import UserError
from ebc_lab.config.own import editor

ROOT = Path(__file__).parent.parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SUITE = """\
study: {stages: [lr_sweep, ablation]}
steps: ${finals.steps}
lr_sweep: {optimizers: [adam]}
ablation:
  reference: adam
  arms:
    adam: {about: Adam}
    clipped: {lr_scale: 2, settings: {stabilizer: {name: norm_clip}}}
"""
MISTAKES = {  # -> what the schema's message names
    "study: {": ("studdy: {", "studdy"),
    "[lr_sweep, ablation]": ("[lr_sweep, ablatoin]", "ablatoin"),
    "${finals.steps}": ("${env:HOME}", "HOME"),
    "[adam]": ("[adm]", "adm"),
    "optimizers: [adam]": ("steps: many", "many"),
    "about: Adam": ("steps: -1", "-1"),
    "lr_scale: 2": ("lr_scal: 2", "lr_scal"),
    "name: norm_clip": ("name: norm_clp", "norm_clp"),
    "{name: norm_clip}": ("{name: norm_clip, strenght: 1}", "strenght"),
    "settings: {stabilizer": ("settings: {stabiliser", "stabiliser"),
}


@pytest.fixture(scope="module")
def schemas():
    """Name -> what validates against it."""
    read = {path.name: json.loads(path.read_text()) for path in editor.FOLDER.glob("*.json")}
    for schema in read.values():
        jsonschema.Draft7Validator.check_schema(schema)
    known = Registry().with_resources((name, Resource(schema, DRAFT7)) for name, schema in read.items())
    return {name: jsonschema.Draft7Validator(schema, registry=known) for name, schema in read.items()}


def settings(text):
    return OmegaConf.to_container(OmegaConf.create(text))


def test_every_reference_of_a_schema_has_its_definition():
    folder = ROOT / "ebc_lab" / "config" / "schemas"
    known = json.loads((folder / "suite.json").read_text())["definitions"]
    for file in folder.glob("*.json"):
        assert set(re.findall(r"#/definitions/(\w+)", file.read_text())) <= known.keys(), file.name


@pytest.mark.thorough
def test_the_schemas_are_made_from_the_settings_as_they_are():
    assert json_schemas.out_of_date() == [], "run python scripts/json_schemas.py --write"


@pytest.mark.thorough
def test_every_file_of_conf_and_every_suite_of_the_pages_fits(schemas):
    for schema, pattern in json_schemas.of_the_editor()["yaml.schemas"].items():
        paths = list(ROOT.glob(pattern))
        assert paths, pattern
        for path in paths:
            schemas[Path(schema).name].validate(settings(path.read_text()))
    suites = [s for page in PAGES for s in re.findall(r"^```yaml\n(.*?)^```", page.read_text(), re.M | re.S)]
    assert len(suites) > 3
    for suite in suites:
        group = re.match(r"# conf/(\w+)/", suite)
        schemas[f"{group[1]}.json" if group else "suite.json"].validate(
            settings(f"ablation:\n{suite}" if suite[0] == " " else suite)
        )


@pytest.mark.thorough
def test_a_mistake_that_the_program_refuses_is_underlined(schemas, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "mine.yaml"
    file.write_text(SUITE)
    schemas["suite.json"].validate(settings(SUITE))
    assert compose(["scale=smoke", "study=./mine.yaml"], here=False)
    for right, (wrong, named) in MISTAKES.items():
        text = SUITE.replace(right, wrong)
        assert text != SUITE
        file.write_text(text)
        with pytest.raises(UserError):
            compose(["scale=smoke", "study=./mine.yaml"], here=False)
        [error] = schemas["suite.json"].iter_errors(settings(text))
        assert named in error.message
