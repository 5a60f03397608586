"""An interrupted run continues bit for bit, and a checkpoint that is not its own is refused."""

import errno
import hashlib
import io
from dataclasses import replace

import pytest
import torch
from support.runs import assert_run_resumes, ebc, made, untimed

from ebc_lab.config.choices import changed
from ebc_lab.config.errors import UserError
from ebc_lab.records.weights import seal, unseal
from ebc_lab.training.ends import Interrupted
from ebc_lab.training.outcome import run_and_record
from ebc_lab.training.run import Training

PARTS = {  # what carries state from step to step
    "surrogate, dropout": {"model": {"dropout": 0.1}, "budget": {"name": "surrogate"}},
    "tracked": {"budget": {"name": "tracked"}},
    "muon, shadow": {"optimizer": {"name": "muon"}, "budget": {"name": "shadow"}},
    "guard, rsl": {
        "budget": {"name": "surrogate", "guard": "shrink_inflate", "aggregate": "l2"},
        "controller": {"name": "rsl"},
    },
    "held text, agreement": {"budget": {"probe_tokens": "held"}, "controller": {"name": "agreement"}},
    "confidence": {"controller": {"name": "confidence"}, "audit_every": 4},
    "schedule-free, stiefel": {"optimizer": {"name": "schedule_free"}, "projection": {"name": "stiefel"}},
    "calibrated, energy": {
        "budget": {"name": "calibrated", "grouping": "matrices", "schedule": "cosine"},
        "controller": {"name": "energy", "a": 0.05},
    },
    "zclip, soap": {"stabilizer": {"name": "zclip"}, "optimizer": {"name": "soap"}},
}


@pytest.mark.parametrize("settings", PARTS.values(), ids=PARTS)
def test_an_interrupted_run_resumes_bit_for_bit(run, tmp_path, settings):
    assert_run_resumes(changed(ebc(run, target_kl=0.005), settings), tmp_path)


@pytest.mark.thorough
def test_rows_written_after_the_checkpoint_are_cut_back(run, tmp_path):
    whole = run_and_record(run, tmp_path / "whole", "x")
    killed = Training(run, made(tmp_path / "killed"))
    killed.advance(12)
    killed.save_checkpoint()
    killed.advance(5)
    killed.recording.close()  # what a kill leaves: rows past the checkpoint
    assert run_and_record(run, tmp_path / "killed", "x")["val_loss"] == whole["val_loss"]
    assert (tmp_path / "whole/steps.csv").read_bytes() == (tmp_path / "killed/steps.csv").read_bytes()


def interrupted(run, directory, steps=20):
    """A run stopped at its checkpoint, after its second evaluation."""
    begun = Training(run, made(directory))
    with pytest.raises(Interrupted):
        begun.run(should_stop=lambda: begun.step == steps)


@pytest.mark.thorough
@pytest.mark.parametrize("stream", ["steps.csv", "evals.csv"])
@pytest.mark.parametrize("damage", ["gone", "a row less", "edited"])
def test_rows_lost_before_the_checkpoint_are_noticed_and_the_run_begins_again(run, tmp_path, stream, damage):
    whole = run_and_record(run, tmp_path / "whole", "x")
    interrupted(run, tmp_path / "damaged")
    path = tmp_path / "damaged" / stream
    lines = path.read_text().splitlines(keepends=True)
    path.unlink()
    if damage == "a row less":
        path.write_text("".join([*lines[:1], *lines[2:]]))
    elif damage == "edited":
        path.write_text("".join(lines).replace(",2.", ",1.", 1))
    said = []
    resumed = run_and_record(run, tmp_path / "damaged", "x", say=said.append)
    assert said == [f"{stream} is not what the checkpoint was written after: it starts from its first step"]
    assert untimed(whole) == untimed(resumed)
    assert (tmp_path / "whole/steps.csv").read_bytes() == (tmp_path / "damaged/steps.csv").read_bytes()


def test_a_stream_changed_under_a_training_run_gives_no_result(run, tmp_path):
    training_ = Training(run, tmp_path)
    training_.advance(5)
    training_.recording.flush()
    (tmp_path / "steps.csv").write_text("")
    with pytest.raises(UserError, match=r"steps\.csv was changed while the run was training: delete"):
        training_.run()


DAMAGE = {
    "half": lambda whole: whole[: len(whole) // 2],
    "a bit": lambda whole: whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:],
}


@pytest.mark.thorough
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_set_aside_and_the_run_begins_again(run, tmp_path, damage):
    whole = run_and_record(run, tmp_path / "whole", "x")
    folder, left, said = tmp_path / "damaged", [], []
    for steps in (20, 10):  # damaged twice
        interrupted(run, folder, steps)
        path = folder / "checkpoint.pt"
        left.append(DAMAGE[damage](path.read_bytes()))
        path.write_bytes(left[-1])
    resumed = run_and_record(run, folder, "x", say=said.append)
    assert untimed(whole) == untimed(resumed)
    assert (tmp_path / "whole/steps.csv").read_bytes() == (folder / "steps.csv").read_bytes()
    aside = [(folder / f"checkpoint.damaged-{n}.pt").read_bytes() for n in (1, 2)]
    assert aside == left
    assert not path.exists()
    why = "its checkpoint is damaged (its checksum does not match), and is now checkpoint.damaged-2.pt"
    assert said == [f"{why}: it starts from its first step"]
    assert said[0] in (folder / "log.txt").read_text()


@pytest.mark.thorough
def test_a_disk_that_cannot_read_a_checkpoint_is_no_damage_to_it(run, tmp_path):
    whole = run_and_record(run, tmp_path / "whole", "x")
    interrupted(run, tmp_path / "broken")
    path, elsewhere = tmp_path / "broken/checkpoint.pt", tmp_path / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to("/proc/self/mem")  # a file whose first byte cannot be read
    with pytest.raises(OSError, match="Input/output error") as failed:
        run_and_record(run, tmp_path / "broken", "x")
    assert (failed.value.errno, failed.value.filename) == (errno.EIO, str(path))
    assert path.is_symlink()
    assert not (tmp_path / "broken/result.json").exists()
    elsewhere.rename(path)
    said = []
    assert untimed(run_and_record(run, tmp_path / "broken", "x", say=said.append)) == untimed(whole)
    assert said == []


def test_a_checkpoint_from_before_checksums_is_not_read(run, tmp_path):
    interrupted(run, tmp_path)
    torch.save({"identity": Evil()}, tmp_path / "checkpoint.pt")
    said = []
    assert run_and_record(run, tmp_path, "x", say=said.append)["outcome"] == "completed"
    assert said == [
        "an earlier version wrote its checkpoint, without a checksum: it starts from its first step"
    ]


@pytest.mark.parametrize("kind", ["foreign", "pickle"])
def test_a_checkpoint_of_others_is_named_with_its_remedy_and_never_executed(run, tmp_path, kind):
    training_ = Training(run, tmp_path)
    training_.advance(1)
    training_.save_checkpoint()
    path = tmp_path / "checkpoint.pt"
    if kind == "foreign":
        run = replace(run, seed=run.seed + 1)
    else:
        buffer = io.BytesIO()
        torch.save({"identity": Evil()}, buffer)
        checksum = hashlib.sha256(buffer.getvalue()).hexdigest()
        path.write_bytes(f"ebc-lab checkpoint, sha256 {checksum}\n".encode() + buffer.getvalue())
    with pytest.raises(
        UserError, match=r"checkpoint\.pt (is none of ours|belongs to another run).*delete it"
    ):
        run_and_record(run, tmp_path, "x")
    assert path.exists()
    assert not (tmp_path / "result.json").exists()


def _of_optimizer(change):
    return lambda state: change(state["optimizer"])


OTHERS = {  # what a checkpoint of another program or version may hold behind a checksum that is right
    "weights": lambda state: state["model"].popitem(),
    "a weight's shape": lambda state: state["model"].update({n: w[None] for n, w in state["model"].items()}),
    "clock": lambda state: state.update(wall_s="long"),
    "no step": lambda state: state.pop("step"),
    "random numbers": lambda state: state.update(rng=state["rng"][:100]),
    "streams": lambda state: state.update(streams={"steps.csv": 3}),
    "streams as a tensor": lambda state: state.update(streams=torch.zeros(2)),
    "no controller": _of_optimizer(lambda state: state.pop("controller")),
    "step of EBC": _of_optimizer(lambda state: state.update(step_index="2")),
    "filters": _of_optimizer(lambda state: state.update(filters=[1])),
    "moments": _of_optimizer(lambda state: state["bases"][0]["state"][0].update(exp_avg=3.0)),
    "rate": _of_optimizer(lambda state: state["bases"][0]["param_groups"][0].update(eps="small")),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_sealed_checkpoint_with_another_state_is_named(run, tmp_path, kind):
    begun = Training(run, tmp_path)
    begun.advance(1)
    begun.save_checkpoint()
    path = tmp_path / "checkpoint.pt"
    about, archive = unseal(path.read_bytes())
    state = torch.load(io.BytesIO(archive), weights_only=True)
    OTHERS[kind](state)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    path.write_bytes(seal("checkpoint", about, buffer.getvalue()))
    with pytest.raises(UserError, match=r"checkpoint\.pt is (damaged|none of ours).*delete it") as refused:
        Training(run, tmp_path)
    assert "\n" not in str(refused.value)


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('a pickle was executed')",))
