"""results_final.json keeps to its schema, and the schema refuses what a reader could trip over."""

import copy
import json
import zipfile

import jsonschema
import pytest
from support.recorded import EVIDENCE


@pytest.fixture
def results(finished):
    _, outcome, _ = finished
    return json.loads((outcome.study.root / "results_final.json").read_text())


def test_what_a_study_leaves_is_valid(results, results_schema):
    assert results["stage"] == "finals"
    results_schema.validate(results)


@pytest.mark.parametrize("bundle", sorted(EVIDENCE.glob("*.zip")), ids=lambda path: path.stem)
def test_what_recorded_studies_left_is_valid(bundle, results_schema):
    with zipfile.ZipFile(bundle) as archive:
        [name] = [name for name in archive.namelist() if name.endswith("results_final.json")]
        results_schema.validate(json.loads(archive.read(name)))


def first(results, *keys):
    for key in ("tracks", None, *keys):
        results = next(iter(results.values())) if key is None else results[key]
    return results


def test_what_is_missing_misspelt_or_unknown_is_refused(results, results_schema):
    def refused(change):
        broken = copy.deepcopy(results)
        change(broken)
        with pytest.raises(jsonschema.ValidationError):
            results_schema.validate(broken)

    refused(lambda r: r.pop("rule"))
    refused(lambda r: r.update(surprise=1))
    refused(lambda r: r.update(inputs_sha256="0"))
    refused(lambda r: first(r, "verdict").pop())
    refused(lambda r: first(r, "verdict")[0].update(verdict="perhaps"))
    refused(lambda r: first(r, "arms", None).update(test_loss="low"))
    refused(lambda r: first(r, "differences", "control", None).update(judged="wins"))
    refused(lambda r: first(r, "differences", "control", None).pop("joint_high"))
