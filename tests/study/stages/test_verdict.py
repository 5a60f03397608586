import pytest

from ebc_lab.study.stages import finals
from ebc_lab.study.stages.compare_arms import efficiency
from ebc_lab.study.stages.stage import planned_runs
from ebc_lab.study.stages.verdict import MOST_NAMED, told_apart


def test_efficiency_is_paired_by_seed_and_wants_half_of_the_seeds():
    curves = {"a": [[10, 3.0, 1.0], [20, 2.0, 2.0]], "b": [[10, 1.9, 1.5], [20, 1.8, 3.0]]}
    curves |= {"never": [[10, 4.0, 1.0]], "nan": [[10, None, 1.0], [20, 1.9, 2.0]]}
    results = {run: {"curve": curve, "outcome": "completed"} for run, curve in curves.items()}

    def found(**runs):
        """By arm, from its runs under the seeds 0, 1 …"""
        arms = {
            name: {"runs": {str(seed): run for seed, run in enumerate(own)}} for name, own in runs.items()
        }
        return efficiency(arms, "base", results, tokens_per_step=100)

    arms = {"base": ["a"], "fast": ["b"], "slow": ["never"], "late": ["nan"]}
    one = found(**arms)
    assert one["base"]["steps"] == one["late"]["steps"] == 20
    assert one["fast"] == {"steps": 10, "tokens": 1000, "train_s": 1.5, "seeds": 1}
    assert one["slow"] is None
    assert found(base=["a"] * 3, arm=["b", "never", "never"])["arm"] is None, "one seed of three"
    results["a"]["outcome"] = "diverged"
    assert set(found(**arms).values()) == {None}


def decided_again(finished, resolved, change):
    """The finals, after `change` has been at the result of every run; the verdict by line."""
    study = finished[1].study
    decisions = study.decisions()
    specs, results = planned_runs("finals", resolved, decisions, study.results)
    for s in specs:
        results[s.run_id] |= change(s)
    earlier = {k: v for k, v in decisions.items() if k != "finals"}
    found = finals.STAGE.decide(resolved, specs, results, earlier)
    return found, {line["name"]: line["verdict"] for line in found["tracks"]["adam_none"]["verdict"]}


@pytest.mark.parametrize(
    ("quartiles", "expected"), [([1.0, 4.9], "pass"), ([4.0, 6.0], "undecided"), ([5.1, 9.0], "fail")]
)
def test_the_overhead_is_judged_by_its_quartiles(finished, resolved, quartiles, expected):
    measured = {"overhead_pct": sum(quartiles) / 2, "overhead_iqr_pct": quartiles}
    _, lines = decided_again(finished, resolved, lambda s: measured if s.kind == "overhead" else {})
    assert lines["overhead"] == expected


def test_an_arm_without_usable_runs_does_not_break_the_verdict(finished, resolved):
    failed = {"outcome": "failed", "cause": "x", "overhead_pct": None, "overhead_iqr_pct": None}
    found, lines = decided_again(
        finished, resolved, lambda s: failed if s.role in ("ebc_x2", "overhead") else {}
    )
    assert lines["kl_on_target"] == lines["c_in_band"] == lines["overhead"] == "undecided"
    assert found["notes"]


@pytest.mark.parametrize(
    ("name", "verdict", "could"),
    [
        ("kl_on_target", "undecided", "another recipe"),
        ("kl_on_target", "fail", "another recipe"),
        ("c_in_band", "undecided", "a run that ends"),
        ("c_in_band", "fail", "another recipe"),
        ("no_plateau", "undecided", "longer runs"),
        ("no_plateau", "fail", "another recipe"),
        ("lr_window", "fail", "another recipe"),
        ("overhead", "undecided", "a quieter machine"),
        ("overhead", "fail", "a cheaper recipe"),
    ],
)
def test_what_could_change_a_line_that_did_not_pass(name, verdict, could):
    """Only intervals depend on the number of seeds, and on how many the tuning had (test_finals.py)."""
    lines = [{"name": name, "verdict": verdict}, {"name": "other", "verdict": "pass"}]
    told = flips(lines)
    assert could in told
    assert told.endswith(f"could change {name}")
    assert "seeds" not in told
    assert flips([{"verdict": "pass"}]) == "every line passed"


def flips(lines):
    return "; ".join(finals.STAGE.turning_points("adam_none", {"tracks": {"adam_none": {"verdict": lines}}}))


def arm_beside(low: float, high: float, shape: str | None = None, **more):
    """An arm of a suite whose difference from its reference has this interval."""
    difference = {"seeds": 3, "joint_low": low, "joint_high": high, "margin": 0.01}
    return {"difference": difference | more, "shape": shape}


def test_arms_are_told_from_their_reference_by_side_and_the_undecided_with_what_would_decide():
    none = {"difference": None}
    unpaired = arm_beside(-0.2, -0.1, seeds=0)
    assert told_apart({"arms": {"plain": none, "unpaired": unpaired}}) == "no arm was compared"
    assert told_apart({"arms": {}}) == "no arm was compared"
    lower = {f"low{n}": arm_beside(-0.2, -0.1) for n in range(MOST_NAMED)}
    start = "test loss beside the reference's, all intervals holding at once: "
    names = ", ".join(lower)
    assert told_apart({"arms": {"plain": none, **lower}}) == f"{start}lower: {names}"
    more = {"one": arm_beside(-0.2, -0.1), "two": arm_beside(-0.2, -0.1)}
    more |= {"high": arm_beside(0.1, 0.2, "8 layers"), "level": arm_beside(-0.001, 0.001)}
    more |= {"open": arm_beside(-0.2, 0.2, "2 layers", seeds_needed=9)}
    more |= {"zero": arm_beside(-0.2, 0.0, seeds_needed=None), "nil": arm_beside(0.0, 0.2)}
    assert told_apart({"arms": {**lower, **more}}) == (
        f"{start}lower: {names} and 2 more; higher: high (8 layers); "
        "not told apart: level, open (2 layers; about 9 seeds would decide it), zero, nil"
    )
