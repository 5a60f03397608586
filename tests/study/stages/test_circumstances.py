"""One run in many circumstances: what is trained, what is counted, and when the comparison shows nothing."""

from dataclasses import replace

import pytest
from support.played import DIVERGED, FAILED, config_of, decided, done

from ebc_lab.config.compose import compose
from ebc_lab.config.errors import UserError
from ebc_lab.config.identity import digest, identity
from ebc_lab.report.kinds import Evidence, modes
from ebc_lab.study.stages import circumstances
from ebc_lab.study.stages.rules import Undecidable
from ebc_lab.study.stages.stage import stage_of

EVERY = "circumstances.capabilities=[default,avx2,avx512]"


def study(*more, scale="smoke"):
    return config_of("study=determinism", *more, scale=scale)


def planned(*more):
    return stage_of("circumstances").runs(study(EVERY, *more), {}, {})


def answer(spec, **sums):
    """Verity ends with the same weights everywhere, every other run with its own."""
    own = spec.role if spec.role in sums else spec.run_id
    return done(2.0 + 1e-8 * (own == spec.run_id) * spec.run.threads_per_run, weights_checksum=own)


def test_circumstances_name_a_run_only_where_they_are_asked_about():
    specs = planned()
    assert len({s.run_id for s in specs}) == len({s.arm for s in specs}) == 3 * 2 * 3 * 3
    [a, b] = [s.run for s in planned("circumstances.capabilities=[avx2]") if s.arm.startswith("verity")][:2]
    assert digest(identity(a)) != digest(identity(b))
    a, b = replace(a, capability="auto"), replace(b, capability="auto")
    assert digest(identity(a)) == digest(identity(b))
    plain = replace(specs[0].run, capability="auto")
    assert "capability" not in identity(plain)
    assert digest(identity(plain)) != digest(identity(replace(plain, capability="avx2")))


def answered(config, decision):
    """The answer of the comparison, in a sentence."""
    [found] = modes.KIND.answers(Evidence(decision, config))
    return found.sentence


def test_distinct_weights_are_counted_for_each_mode():
    config = study(EVERY)
    decision = decided("circumstances", config, {}, lambda s: answer(s, verity=1))
    [track] = decision["tracks"].values()
    counts = {"runs": 18, "completed": 18, "diverged": 0, "checksums": 1}
    assert track["modes"]["verity"] == {**counts, "loss_range": 0.0}
    assert track["modes"]["none"]["checksums"] == track["modes"]["torch"]["checksums"] == 18
    assert track["modes"]["none"]["loss_range"] == pytest.approx(1e-8)
    assert decision["notes"] == []
    [line] = stage_of("circumstances").headlines(decision)
    many = "18 checksums in 18 runs"
    assert line == f"none {many}, torch {many}, verity 1 checksum in 18 runs"
    assert answered(config, decision) == "The same bits under verity."
    results = {c["run_id"]: {"steps": 10, "train_s": 2.0} for c in decision["candidates"]}
    [table] = modes.KIND.tables(Evidence(decision, config, results=results))
    assert table.texts()[2] == ["verity", "18", "18", "0", "1", "0", "5"]
    assert [row.chosen for row in table.rows] == [False, False, True]


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ([], "determinism=none has 1 checksum in 18 runs as well"),
        (["circumstances.modes=[verity]"], "determinism=none is not among the modes"),
    ],
)
def test_where_nothing_differs_without_it_the_table_says_that_it_shows_nothing(more, why):
    config = study(EVERY, *more)
    decision = decided("circumstances", config, {}, lambda s: answer(s, none=1, torch=1, verity=1))
    told = f"the comparison shows nothing: {why}"
    assert told in decision["notes"]
    assert told in modes.KIND.tables(Evidence(decision, config))[0].note
    assert "the comparison shows nothing" in stage_of("circumstances").headlines(decision)[0]
    assert answered(config, decision) == "The comparison shows nothing."


def test_runs_without_a_result_and_instructions_not_tried_are_noted():
    def fate(spec):
        if spec.role == "torch":
            return DIVERGED if spec.run.threads_per_run == 2 else FAILED
        return answer(spec)

    config = study("circumstances.capabilities=[default,avx2]")
    decision = decided("circumstances", config, {}, fate)
    assert decision["notes"] == ["not tried: avx512", "torch: of 12 runs 6 diverged, 6 have no result"]
    torch = decision["tracks"]["adam_none"]["modes"]["torch"]
    assert (torch["checksums"], torch["loss_range"]) == (0, None)
    with pytest.raises(Undecidable, match="circumstances could not decide: a bug"):
        decided("circumstances", config, {}, lambda s: FAILED)


def test_one_checksum_is_no_claim_where_some_runs_diverged():
    def fate(spec):
        return DIVERGED if spec.role == "verity" and spec.run.threads_per_run == 2 else answer(spec, verity=1)

    config = study(EVERY)
    decision = decided("circumstances", config, {}, fate)
    [track] = decision["tracks"].values()
    assert track["modes"]["verity"]["checksums"] == 1
    assert answered(config, decision) == "Under no mode the same bits."
    [table] = modes.KIND.tables(Evidence(decision, config))
    assert not any(row.chosen for row in table.rows)


def test_instructions_that_this_cpu_lacks_are_left_out_with_a_sentence(monkeypatch):
    monkeypatch.setattr(circumstances, "capabilities", lambda: ("default", "avx2"))
    said = []
    found = stage_of("circumstances").resolve(study(), said.append)
    assert found.circumstances.capabilities == ["default", "avx2"]
    assert said == ["circumstances: avx512 left out, which this CPU lacks"]
    asked = study(EVERY)
    assert stage_of("circumstances").resolve(asked, said.append) == asked
    assert len(said) == 1
    assert stage_of("circumstances").runs(study(), {}, {}) == stage_of("circumstances").runs(found, {}, {})


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["circumstances.parts=[1,5]"], "must divide batch_size"),
        (["dtype=bfloat16"], "determinism=verity does not go with dtype=bfloat16"),
        (["optimizer=muon"], "determinism=verity does not go with optimizer=muon"),
        (["circumstances.modes=[veritas]"], "did you mean verity"),
        (["circumstances.threads=[]"], "must not be empty"),
    ],
)
def test_what_cannot_be_compared_is_refused_at_once(more, told):
    with pytest.raises(UserError, match=told):
        compose(["study=determinism", "scale=smoke", *more])
