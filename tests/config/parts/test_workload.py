"""What `ebc-lab train workload=ebm …` refuses before anything is written: exit code 2 and one sentence."""

import json
import sys

import pytest
from support.called import answered, refused

from ebc_lab.config.compose import compose
from ebc_lab.config.errors import UserError

REFUSED = [
    ("accumulate=5", "accumulate=5 must divide batch_size=24 into equal parts"),
    ("workload=emb", "workload=emb is unknown (did you mean ebm?)"),
    ("index=hsnw", "index=hsnw is unknown (did you mean hnsw?)"),
    ("ebm.kappa_min=60", "ebm.kappa_min=60 must be below ebm.kappa_max=50"),
    ("ebm.levels=[0.2,0.1]", "ebm.levels must be increasing"),
    ("ebm.levels=[]", "ebm.levels must not be empty"),
    ("ebm.neighbours=200", "200 splats act on a state, of at most ebm.splats=160: choose fewer"),
    ("ebm.splats=0 ebm.adapt=gradient", "ebm.adapt=gradient trains the splats, and ebm.splats=0 has none"),
    ("decoder.active=5", "decoder.active=5 must be at most decoder.experts=4"),
    ("ebm.temperature=[1,1]", "ebm.temperature needs 3 values, not 2"),
    ("device=vulkan", "torch's Vulkan backend only infers"),
    ("compile=on", "workload=ebm does not go with compile=on"),
    ("budget.grouping=matrices", "workload=ebm does not go with budget.grouping=matrices"),
    ("optimizer=muonclip", "shrinks queries and keys by the logits of attention that they make: choose "),
    ("workload=gpt model=modern optimizer=muonclip", "shrinks queries and keys by the logits of attention"),
    ("ebm.embeddings=gpt2", "ebm.embeddings=gpt2 needs ebm.gpt2=FOLDER"),
    ("ebm.embeddings=gpt2 ebm.gpt2=x", "are those of GPT-2's own tokens: add tokens=gpt2"),
    ("accumulate=6", "must leave rows of each part of the batch for the audit: 1 to 3"),
]


@pytest.mark.parametrize(("overrides", "words"), REFUSED, ids=[given for given, _ in REFUSED])
def test_what_an_ebm_cannot_be_is_refused(overrides, words):
    with pytest.raises(UserError) as caught:
        compose(["workload=ebm", "scale=smoke", *overrides.split()], study=False)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("asked", "module"), [("workload=ebm index=ivf", "faiss"), ("tokens=bpe", "tokenizers")]
)
def test_a_library_that_is_missing_is_named_with_its_remedy(monkeypatch, asked, module):
    settings = ["scale=smoke", *asked.split()]
    compose(settings, study=False)
    monkeypatch.setitem(sys.modules, module, None)
    needs = rf"{settings[-1]} needs the library {module}: pip install 'ebc-lab\[ebm\]'"
    with pytest.raises(UserError, match=needs):
        compose(settings, study=False)
    compose(["workload=ebm", "scale=smoke", "index=exact"], study=False)


def test_a_run_of_images_needs_no_more_than_its_workload(tmp_path):
    run = ["workload=images", "scale=smoke", "stabilizer=none", "steps=30", "device=cpu"]
    answered("train", *run, cwd=tmp_path)
    [spec] = tmp_path.rglob("spec.json")
    config = json.loads(spec.read_text())["config"]
    assert [config["data"]["name"], config["model"]["name"]] == ["digits", "cnn"]


def refused_by_the_command(folder, text_file, *overrides):
    given = ["workload=ebm", "scale=smoke", "data=path", f"data.file={text_file}", "device=cpu"]
    return refused("train", *given, *overrides, cwd=folder)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("device=vulkan", "Vulkan"),
        ("ebm.splats=6000", "ebm.splats=6000 is more than one for 2 of the"),
        ("ebm.neighbours=17", "more than the 16 splats that there are in the first third of the run"),
        ("tokens=gpt2 tokens.folder=nowhere", "tokens.folder=nowhere is not a folder"),
    ],
)
def test_the_command_ends_with_one_sentence_and_writes_nothing(tmp_path, text_file, overrides, words):
    assert words in refused_by_the_command(tmp_path, text_file, *overrides.split())


def test_auto_without_faiss_is_refused_where_it_would_search(tmp_path, monkeypatch):
    (tmp_path / "long.txt").write_text("some words to fill a page with. " * 1600)
    monkeypatch.setitem(sys.modules, "faiss", None)
    said = refused_by_the_command(tmp_path, tmp_path / "long.txt", "ebm.splats=16385")
    assert "index=auto searches 16385 splats with the library faiss: pip install 'ebc-lab[ebm]'" in said
    assert "or index=exact" in said
