"""A run that starts from another's weights: what it is named by, what it forgets, and what is refused."""

import io
from dataclasses import replace

import pytest
import torch
from support.runs import made, plain, resumed_after, untimed

from ebc_lab.components.adapter import merged
from ebc_lab.config.choices import changed
from ebc_lab.config.compose import compose
from ebc_lab.config.dicts import run_part
from ebc_lab.config.errors import UserError
from ebc_lab.config.identity import run_id
from ebc_lab.records.streams import read_columns
from ebc_lab.records.weights import seal, unseal
from ebc_lab.study.inspect.forecast import forecast
from ebc_lab.training.outcome import run_and_record
from ebc_lab.training.run import Training
from ebc_lab.workloads.gpt import build
from ebc_lab.workloads.starts import arms_pinned, pinned
from ebc_lab.workloads.text import checked_text


def on_text(run, text, **settings):
    run = changed(run, {"data": {"name": "path", "file": str(text), "sha256": None}, **settings})
    return pinned(run, *checked_text(run))


@pytest.fixture(scope="module")
def texts(tmp_path_factory, small_text):
    folder = tmp_path_factory.mktemp("texts")
    (folder / "old.txt").write_text(small_text)
    (folder / "new.txt").write_text("".join(f"{n} × {n} = {n * n}; " for n in range(400)))
    return folder / "old.txt", folder / "new.txt"


@pytest.fixture(scope="module")
def run(tiny):
    shared = [o for o in tiny if not o.startswith(("lr_s", "cal", "fin", "data"))]
    return plain(
        run_part(
            compose([*shared, "tokens=bytes", "optimizer.lr=1e-2", "steps=20", "data=pydoc"], study=False)
        )
    )


@pytest.fixture(scope="module")
def source(run, texts, tmp_path_factory):
    """A finished run whose weights were kept, and its result."""
    folder = tmp_path_factory.mktemp("source") / "run"
    return folder, run_and_record(on_text(run, texts[0], init={"keep": True}), folder, "x")


def tuned(run, source, texts, **settings):
    init = {"name": "run", "run": str(source[0]), "text": "path", "file": str(texts[0])}
    return on_text(run, texts[1], init=init, **settings)


def test_a_run_starts_from_kept_weights_and_its_forgetting_is_measured(run, source, texts, tmp_path):
    again = resumed_after(on_text(run, texts[0], init={"keep": True}), tmp_path / "kept", [7])
    assert untimed(again) == untimed(source[1])
    whole = (source[0] / "weights.pt").read_bytes()
    assert (tmp_path / "kept/weights.pt").read_bytes() == whole  # interrupted or not

    fine = tuned(run, source, texts)
    training = Training(fine, made(tmp_path / "begun"))
    assert training.advance(0) is None
    drawn = build(fine.model, 256, fine.seed)
    assert not torch.equal(training.model.head.weight, drawn.head.weight)

    result = run_and_record(fine, tmp_path / "fine", "x")
    assert result["init_start_loss"] == source[1]["val_loss"]  # the same weights on the same text
    assert result["forgotten"] == result["init_val_loss"] - result["init_start_loss"] > 0
    assert 0 < result["weights_moved"] < 1
    losses = read_columns(tmp_path / "fine/evals.csv")["init_val_loss"]
    assert losses[1] > losses[0]
    assert untimed(resumed_after(fine, tmp_path / "resumed", [3, 12])) == untimed(result)


def test_weights_name_a_run_and_the_place_where_they_lie_does_not(run, source, texts, tmp_path):
    fine = tuned(run, source, texts)
    moved = made(tmp_path / "moved")
    (moved / "weights.pt").write_bytes((source[0] / "weights.pt").read_bytes())
    assert run_id("train", tuned(run, (moved,), texts)) == run_id("train", fine)
    assert tuned(run, (moved,), texts).init.run != fine.init.run
    other = replace(fine, init=replace(fine.init, sha256="1" * 64))
    assert len({run_id("train", r) for r in (fine, other, replace(fine, init=type(fine.init)()))}) == 3
    with pytest.raises(UserError, match="must be looked at"):
        run_id("train", replace(fine, init=replace(fine.init, sha256=None)))


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('a pickle was executed')",))


def test_weights_that_cannot_be_meant_are_refused(run, source, texts, tmp_path):
    fine = tuned(run, source, texts)
    whole = (source[0] / "weights.pt").read_bytes()
    path = made(tmp_path / "bad") / "weights.pt"
    for content in (whole[:-100], whole.replace(b'"bytes"', b'"bytex"'), whole[:-1] + b"?"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"is truncated or was edited .*train that run again"):
            tuned(run, (path,), texts)
    about, archive = unseal(whole)
    for odd in ([torch.ones(3)], Evil()):
        buffer = io.BytesIO()
        torch.save({"model": odd}, buffer)
        path.write_bytes(seal("weights", about, buffer.getvalue()))
        with pytest.raises(UserError, match="is damaged"):
            Training(tuned(run, (path,), texts), made(tmp_path / type(odd).__name__))
    for name, words in (("bin", "come from tokens, not a text"), ("path", "come from a text of one's own")):
        path.write_bytes(seal("weights", about | {"text": about["text"] | {"name": name}}, archive))
        with pytest.raises(UserError, match=words):
            on_text(run, texts[1], init={"name": "run", "run": str(path), "text": "source"})
    torch.save({"model": Evil()}, path)
    with pytest.raises(UserError, match="holds no weights of ebc-lab"):
        tuned(run, (path,), texts)
    run_and_record(on_text(run, texts[0], init={"keep": True}, seed=5, steps=1), tmp_path / "bad", "x")
    with pytest.raises(UserError, match="have changed"):
        Training(replace(fine, init=replace(fine.init, run=str(path))), tmp_path / "fine")
    with pytest.raises(UserError, match=r"holds no weights: train that run again with init\.keep=true"):
        tuned(run, (made(tmp_path / "empty"),), texts)
    with pytest.raises(UserError, match=r"model\.width is 16 there and 32 here: .*model\.width=16"):
        tuned(run, source, texts, model={"width": 32})
    with pytest.raises(UserError, match="tokens is bytes there and characters here: train both with"):
        tuned(run, source, texts, tokens={"name": "characters"})
    kept = changed(run, {"tokens": {"name": "characters"}, "steps": 1})
    run_and_record(on_text(kept, texts[0], init={"keep": True}), tmp_path / "letters", "x")
    with pytest.raises(UserError, match="characters of another text than these"):
        tuned(kept, (tmp_path / "letters",), texts)


def test_low_rank_matrices_alone_are_trained_and_merged_into_what_is_kept(run, source, texts, tmp_path):
    ebc = {"stabilizer": {"name": "ebc"}, "budget": {"target_kl": 0.01}}
    fine = tuned(run, source, texts, adapter={"name": "lora", "rank": 2}, **ebc)
    training = Training(replace(fine, init=replace(fine.init, keep=True)), made(tmp_path / "lora"))
    before = {name: p.clone() for name, p in training.model.state_dict().items()}
    tokens = training.workload.tokens["val"][None, :16]
    plain_model = build(fine.model, 256, 0)
    plain_model.load_state_dict(merged(training.model))
    assert torch.equal(plain_model(tokens), training.model(tokens))  # B is zero
    result = training.run()
    moved = {n for n, p in training.model.state_dict().items() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if "lora_" in n}
    plain_model.load_state_dict(merged(training.model))
    torch.testing.assert_close(plain_model(tokens), training.model(tokens), rtol=1e-4, atol=1e-5)
    assert result["init_val_loss"] != result["init_start_loss"]
    again = tuned(run, (tmp_path / "lora",), texts)  # what was kept is a plain model's weights
    assert (
        Training(again, made(tmp_path / "again")).model.state_dict().keys() == plain_model.state_dict().keys()
    )


@pytest.mark.thorough
def test_an_arm_starts_each_seed_from_the_same_seed_of_another(texts):
    old, new = texts
    own = f"ablation.arms.kl.settings.data={{name: path, file: {new}}}"
    asked = ["study=finetune", "scale=smoke", "data=path", f"data.file={old}", "device=cpu", own]
    config = compose(asked)
    config = arms_pinned(pinned(config, *checked_text(config)))
    planned = forecast(config)
    starts = {s.run_id: s.run for stage in planned.values() for s in stage if s.role == "pretrained"}
    assert {r.seed for r in starts.values()} == {config.study.stage_seed, *config.seeds}
    assert all(r.init.keep for r in starts.values())
    tuned_runs = [s.run for stage in ("tune", "ablation") for s in planned[stage] if s.role == "kl"]
    assert {r.seed for r in tuned_runs} == {r.seed for r in starts.values()}
    for r in tuned_runs:
        assert starts[r.init.run].seed == r.seed
        assert r.init.text_sha256 == config.data.sha256 != r.data.sha256
    with pytest.raises(UserError, match=r"arms\.lora\.init=lr"):
        compose([*asked, "+ablation.arms.lora.init=lr"])
