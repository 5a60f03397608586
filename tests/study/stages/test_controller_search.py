"""The optional search for a controller."""

from support.played import check_passed_over, config_of, decided_through, done, played

from ebc_lab.study.stages.stage import stage_of

SEARCH = "study.stages=[lr_sweep,calibrate,controller_search,lr_scale,finals]"
TRACK = "adam_none"


def searched(ratios, last="controller_search", best=""):
    """Decisions up to a controller search whose candidates reach these shares of their target; equal losses
    but for one's."""
    config = config_of("optimizer=adam", SEARCH)

    def answer(s):
        return done(2.0 - 0.1 * (s.role == best), kl_ratio_median=ratios.get(s.role), surrogate_median=1.0)

    return config, decided_through(last, config, answer)


def test_every_candidate_is_tried_where_delta_was_calibrated():
    config, decisions = searched({"rsl": 1.1}, last="calibrate")
    _, specs, _ = played("controller_search", config, decisions, lambda s: done(2.0))
    calibrated = decisions["calibrate"]["tracks"][TRACK]
    assert {s.role for s in specs} == set(config.controller_search.candidates)
    assert {s.run.budget.target_kl for s in specs} == {calibrated["delta_star"]}
    assert {s.lr_scale for s in specs} == {config.calibrate.lr_scale}
    assert {(s.run.steps, s.run.lr_schedule.name, s.run.budget.schedule) for s in specs} == {
        (600, "trapezoid", "hold_decay")
    }
    assert len({s.run_id for s in specs}) == len(specs)
    assert {s.role for s in specs if s.run_id == calibrated["run_id"]} == {"fixed"}  # trained already


def test_the_controller_that_holds_its_target_is_used_from_then_on():
    config, decisions = searched({"rsl": 1.1, "log_pi": 0.5, "log_pi_often": 1.5}, last="lr_scale")
    found = decisions["controller_search"]["tracks"][TRACK]
    assert (found["candidate"], found["settings"]) == ("rsl", {"controller": {"name": "rsl"}})
    specs = stage_of("lr_scale").runs(config, decisions, {})
    assert {s.run.controller.name for s in specs if s.role == "ebc"} == {"rsl"}
    assert all(s.run.stabilizer.name == "none" for s in specs if s.role == "none")
    finals = stage_of("finals").runs(config, decisions, {})
    assert {s.run.controller.name for s in finals if s.run.stabilizer.name == "ebc"} == {"rsl"}


def test_a_search_in_which_none_holds_its_target_takes_the_nearest_and_says_so():
    _, decisions = searched({"rsl": 4.0, "log_pi": 0.5, "fixed": 0.1})
    assert decisions["controller_search"]["tracks"][TRACK]["candidate"] == "log_pi"
    assert "no candidate held the KL" in decisions["controller_search"]["notes"][0]


def test_a_lower_loss_that_was_passed_over_is_named_with_the_reason():
    _, decisions = searched({"rsl": 0.4, "log_pi": 1.1}, best="rsl")
    said = "rsl, 1.9000: its median KL is 0.40 × δ*, not within ±30%"
    check_passed_over("controller_search", decisions["controller_search"], said)


def test_ebcs_runs_wait_for_a_search_and_without_one_for_nothing():
    config, decisions = searched({}, last="calibrate")
    assert {s.role for s in stage_of("lr_scale").runs(config, decisions, {})} == {"none"}
    plain = config_of("optimizer=adam")
    assert any(s.role == "ebc" for s in stage_of("lr_scale").runs(plain, decisions, {}))
