"""Extremes of settings are refused in one sentence that names the setting, or planned."""

import dataclasses
import functools
import math
import random
import re
import signal

import pytest
from support.called import answered
from support.composed import refused

from ebc_lab.config import hints, overrides, study_checks
from ebc_lab.config.choices import groups
from ebc_lab.config.compose import compose, configurations
from ebc_lab.config.dicts import flat, to_dict
from ebc_lab.config.errors import UserError, any_of, clock, count, listed, shown
from ebc_lab.config.overrides import schema_keys
from ebc_lab.config.schema import ArmConfig
from ebc_lab.config.study_checks import most_runs
from ebc_lab.study.inspect.forecast import planned

SMOKE = ["scale=smoke"]
SEARCH = "study.stages=[lr_sweep,calibrate,controller_search,lr_scale,finals]"
ENDLESS = "1" + "0" * 400


def test_of_many_choices_the_last_are_counted():
    many = [f"kl_clip_{i:03}" for i in range(100)]
    assert any_of(many).startswith("kl_clip_000, kl_clip_001, ")
    assert any_of(many).endswith("kl_clip_029 or 70 more")
    assert any_of(many[:30]).endswith("kl_clip_028 or kl_clip_029")
    assert any_of(["x" * 18] * 20) == f"{', '.join(['x' * 18] * 19)} or {'x' * 18}", "400 characters"
    assert any_of(["x" * 18] * 19 + ["x" * 19]).endswith(f"{'x' * 18} or 1 more")
    assert [any_of(many[:n]) for n in (0, 1, 2)] == ["none", "kl_clip_000", "kl_clip_000 or kl_clip_001"]
    assert [listed(range(n)) for n in (0, 1, 2)] == ["", "0", "0 and 1"]
    assert [listed(range(n)) for n in (6, 7)] == ["0, 1, 2, 3, 4 and 5", "0, 1, 2, 3, 4, 5 and 1 more"]
    assert listed(range(5000), most=2) == "0, 1 and 4,998 more"


def test_what_is_long_is_shortened_and_what_is_not_is_left():
    assert [len(shown("x" * length)) for length in (59, 60, 61)] == [59, 58, 58]
    assert [len(str(UserError("x" * length))) for length in (3000, 3001)] == [3000, 3003]
    assert [count(n, "run") for n in (0, 1, 2, 1000)] == ["0 runs", "1 run", "2 runs", "1,000 runs"]
    seconds = [0, 89.4, 89.6, 3599.4, 3599.6, 7620, 360_000, None, math.inf, math.nan]
    spelled = ["0 s", "89 s", "1 min 30 s", "59 min 59 s", "1 h 00 min", "2 h 07 min", "100 h 00 min"]
    assert [clock(s) for s in seconds] == [*spelled, "–", "–", "–"]


@pytest.mark.parametrize(
    ("taken", "refused", "words"),
    [
        *((a, b, "20 at most") for a, b in ([f"seeds={'[' * n}{']' * n}" for n in (20, 21)],)),
        *((a, b, "31 digits") for a, b in ([f"seed=1{'0' * n}" for n in (29, 30)],)),
        *((a, b, "4000 at most") for a, b in ([f"notify={'x' * n}" for n in (3993, 3994)],)),
    ],
    ids=["brackets", "digits", "characters"],
)
def test_an_override_may_be_as_long_as_is_said_and_no_longer(taken, refused, words):
    assert len(overrides.parse([taken])) == 1
    with pytest.raises(UserError, match=words):
        overrides.parse([refused])


def test_overrides_together_may_be_as_long_as_is_said_and_sweeps_as_large(monkeypatch):
    assert len(overrides.expand(["batch_size=range(1,1001)"])) == overrides.MOST_COMBINATIONS
    for sweep in (["batch_size=range(1,1002)"], ["batch_size=range(1,14)", "steps=range(1,78)"]):  # 1001
        with pytest.raises(UserError, match="at most 1000 at a time"):
            overrides.expand(sweep)
    monkeypatch.setattr(overrides, "LONGEST_TOGETHER", 21)
    assert len(overrides.parse(["scale=smoke", "seeds=[10]"])) == 2
    with pytest.raises(UserError, match="22 characters: 21 at most"):
        overrides.parse(["scale=smoke", "seeds=[100]"])


@pytest.mark.thorough
def test_a_study_may_have_as_many_runs_as_is_said(monkeypatch):
    runs = sum(most_runs(compose(SMOKE)).values())
    monkeypatch.setattr(study_checks, "MOST_RUNS", runs)
    monkeypatch.setattr(study_checks, "SENSIBLE_RUNS", runs)
    assert not study_checks.beyond_sensible(compose(SMOKE))
    monkeypatch.setattr(study_checks, "SENSIBLE_RUNS", runs - 1)
    assert study_checks.beyond_sensible(compose(SMOKE))
    monkeypatch.setattr(study_checks, "MOST_RUNS", runs - 1)
    assert f"more than {runs - 1} runs" in refused([])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("finals.max_seeds=1000", ["finals.max_seeds", "<= 100", "1000"]),
        (f"seeds=[{','.join(map(str, range(200, 800)))}]", ["seeds", "at most 100", "600"]),
        ("study.stages=[]", ["study.stages", "must not be empty"]),
        (f"finals.steps={ENDLESS}", ["finals.steps", "401 digits"]),
        (f"seeds={'[' * 500}{']' * 500}", ["seeds", "500 deep"]),
        (f"ablation.question={'{a:' * 500}1{'}' * 500}", ["ablation.question", "500 deep"]),
        ("study.name=x.zip", ["study.name", ".zip", "bundle"]),
        (f"study.name={'x' * 81}", ["study.name", "at most 80"]),
        ("study.name=-rf", ["study.name", "plain folder name"]),
        ("study.name=größe", ["study.name", "in quotes"]),
        (f"output_dir={'x/' * 1000}", ["output_dir", "at most 1000 characters"]),
        (f"output_dir={'x' * 300}", ["output_dir", "255 bytes"]),
        ("output_dir='a\x1b[2Jb'", ["output_dir", "control character"]),
        (f"ablation.question={'x' * 1_000_000}", ["ablation.question", "characters"]),
        ("ablation.question='a\udcffb'", ["ablation.question", "control characters"]),
        ("model.width=1000000", ["model.width", "<= 65536"]),
        ("lr_sweep.skip_threshold=nan", ["lr_sweep.skip_threshold", "finite"]),
        ("finals.steps=${finals.steps}", ["Recursive"]),
        ("ablation.arms.a={budget: '${'}", ["ablation.arms.a.budget", "no viable"]),
        ("data='a\nb'", ["data=a\\nb is unknown"]),
        (["model.width=16384", "model.blocks=256"], ["memory", "model.width"]),
        (["study=controls", "ablation.lr_scales=[1e-6,1]"], ["ablation.lr_scales", ">= 0.0001"]),
        (["study=target_kl", "ablation.lr_scales=[1,1.0001]"], ["ablation.lr_scales", "three digits"]),
        (["finals.max_seeds=100", "finals.seeds_per_look=1"], ["finals.seeds_per_look", "looks"]),
        (["seeds=[0,1]", "finals.max_seeds=64", "finals.seeds_per_look=3"], ["more than 20 looks", "give 4"]),
        (
            [
                "study=stabilizers",
                f"seeds=[{','.join(map(str, range(200, 300)))}]",
                f"ablation.lr_scales=[{','.join(map(str, range(1, 40)))}]",
            ],
            ["ablation", "runs", "2000"],
        ),
        ([SEARCH, "+controller_search.candidates.x={steps: 10.5}"], ["candidates.x", "whole number"]),
        ([SEARCH, "+controller_search.candidates.x=laptop"], ["candidates.x", "settings of a run"]),
        (["seeds=[0,1,2,3,4,5]"] * 2500, ["overrides", "characters"]),
    ],
    ids=lambda value: (value if isinstance(value, str) else value[-1])[:60],
)
def test_an_extreme_is_refused_in_one_sentence_that_names_the_setting(overrides, words, monkeypatch):
    monkeypatch.setattr(study_checks, "MOST_RUNS", 2000)
    overrides = [overrides] if isinstance(overrides, str) else overrides
    said = refused(overrides)
    assert all(word in said for word in words), said


@pytest.mark.thorough
def test_a_study_of_more_runs_than_is_sensible_is_told_so_and_not_refused(tmp_path, monkeypatch):
    seeds, scales = (",".join(map(str, values)) for values in (range(200, 300), range(1, 21)))
    suite = ["study=stabilizers", "ablation.reference=adam_trapezoid_x1"]  # when it is swept
    many = compose([*SMOKE, *suite, f"seeds=[{seeds}]", f"ablation.lr_scales=[{scales}]"])
    said = study_checks.beyond_sensible(many)
    assert re.match(r"this study may have 3\d,\d{3} runs, and more than 20,000 are not sensible: ", said)
    monkeypatch.setattr(study_checks, "SENSIBLE_RUNS", 1)
    assert "more than 1 are not sensible" in answered("plan", *SMOKE, "device=cpu", cwd=tmp_path).stdout


@pytest.mark.parametrize(
    "override",
    [
        "ablation.question=${oc.env:HOME}",
        "ablation.question='${oc.decode:${oc.env:HOME}}'",
        "ablation.question=${oc.create:x}",
        "ablation.question=${hydra:runtime.cwd}",
        "ablation.question=${tracker.mlflow_uri}",
        "ablation.question=${..output_dir}",
        "ablation.question=${launcher[setup]}",
        "seeds=['${oc.env:HOME}']",
        "+launcher.sbatch={a: {b: ['${oc.env:HOME}']}}",
    ],
)
def test_nothing_of_the_environment_is_read_through_a_setting(override, monkeypatch):
    monkeypatch.setenv("HOME", "/a/secret")
    said = refused([override])
    assert "/a/secret" not in said
    assert "another setting" in said
    assert override.lstrip("+").partition("=")[0].split(".")[0] in said


def test_a_setting_may_still_follow_another():
    assert compose([*SMOKE, "finals.steps=${batch_size}"]).finals.steps == 24
    assert compose([*SMOKE, "study.name=mine_${scale}"]).study.name == "mine_smoke"


@pytest.mark.parametrize("sweep", ["seeds=range(0,1000000000)", "model.blocks=range(1,90)"])
def test_a_sweep_of_too_many_studies_is_counted_before_it_is_expanded(sweep):
    with pytest.raises(UserError, match="at most 1000"):
        configurations([*SMOKE, sweep, "batch_size=range(1,60)"], multirun=True)


@pytest.mark.slow
@pytest.mark.parametrize("study", groups()["study"])
def test_every_suite_is_planned_and_asks_for_no_more_runs_than_are_counted_beforehand(study, tmp_path):
    config = compose(["scale=smoke", f"study={study}", f"output_dir={tmp_path}", "device=cpu"])
    assert bool(config.ablation.question) == bool(config.ablation.all_arms())
    assert all(label == label.lower() for label in config.ablation.all_arms())
    counted = most_runs(config)
    stages = planned(config)["stages"]
    total = stages["total"]
    assert 0 < total["min"]["runs"] <= total["expected"]["runs"] <= total["max"]["runs"]
    assert all(stages[stage]["max"]["runs"] <= counted[stage] for stage in counted)
    share = 2 if study == "units" else 4  # its 16 settings × 9 arms may each extend their grids
    assert sum(counted.values()) < study_checks.SENSIBLE_RUNS / share
    assert not study_checks.beyond_sensible(config)


@pytest.mark.thorough
@pytest.mark.parametrize("prefix", ["", "+", "++"])
def test_an_entry_of_a_mapping_is_changed_or_added_in_any_spelling(prefix):
    config = compose(
        [
            *SMOKE,
            "study=stabilizers",
            f"{prefix}controller_search.candidates.mine={{controller: {{name: pi}}}}",
            f"{prefix}controller_search.candidates.log_pi_soft.controller.kp=0.3",
            f"{prefix}lr_sweep.grids.adam=[1e-3,5e-3]",
            f"{prefix}ablation.arms.agc.settings.eval_windows=8",
            f"{prefix}ablation.arms.agc.tune.strength=[0.3,1,3]",
        ]
    )
    assert config.controller_search.candidates["mine"] == {"controller": {"name": "pi"}}
    assert config.controller_search.candidates["log_pi_soft"]["controller"]["kp"] == 0.3
    assert config.lr_sweep.grids["adam"] == [1e-3, 5e-3]
    assert config.ablation.arms["agc"].settings["eval_windows"] == 8
    assert config.ablation.arms["agc"].tune["strength"] == [0.3, 1, 3]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer.wd=0.1", "did you mean optimizer.weight_decay?"),
        ("n_layer=3", "did you mean model.blocks?"),
        ("block_size=3", "did you mean model.context?"),
        ("lr=3", "did you mean optimizer.lr for a run, lr_sweep.grids for a study?"),
        ("scheduler=cosine", "lr_schedule for a run, study.lr_schedule"),
        ("kl=0.1", "budget.target_kl for a run, calibrate.multiples for a study?"),
        ("max_norm=1", "stabilizer.strength for a run, the arms of a suite"),
        ("name=x", "did you mean study.name?"),
        ("dataset=x", "did you mean data?"),
        ("threads=2", "did you mean threads_per_run?"),
        ("optimiser.name=adam", "did you mean optimizer.name, "),
        ("optimizer=adam_w", "did you mean adamw?"),
        ("lr_schedule=wsd", "did you mean trapezoid?"),
        ("dtype=bf16", "did you mean bfloat16?"),
        ("study=smoke", "did you mean scale=smoke?"),
        ("seeds=3", "seeds: it is a list, seeds=[…]"),
    ],
)
def test_a_name_from_elsewhere_gets_the_name_it_has_here(override, words):
    assert words in refused([override], study=False)


def test_every_hint_leads_to_a_setting_or_choice():
    names = {*schema_keys(), *groups()}
    assert set(hints.MEANT) <= names
    assert set(hints.STUDY_DECIDES) <= names
    assert len(hints.SETTING_MEANT) == sum(map(len, hints.MEANT.values())), "a name with two meanings"
    assert not set(hints.SETTING_MEANT) & names
    kinds = {"dtype": ("float32", "bfloat16"), "device": ("cuda",)}
    for group, meant in hints.MEANT_CHOICE.items():
        assert set(meant) <= set(groups().get(group) or kinds[group])
        assert not {name for names in meant.values() for name in names} & set(groups().get(group, ()))


# -- any override, mutated -----------------------------------------------------------------------------------

NUMBERS = ["0", "-1", "1", "2", "1e-6", "0.5", "1e308", "-1e308", "1e400", "nan", "inf", "-inf", "true"]
NUMBERS += ["null", "1000", "100000000", f"{2**64}", "1e-320", "007", "0x10"]
NUMBERS += ["1" + "0" * 40, ENDLESS, "1" + "0" * 5000]
TEXTS = ["''", "x", "../x", "-x", "x.zip", "'a b'", "größe", "'größe'", "'a\x00b'", "'\udcff'", "'a\nb'"]
TEXTS += ["x" * 90, "x" * 1500, "x" * 10_000, "x" * 1_000_000, "[]", "{}", "'[' ", "'${'", "${", "${steps}"]
TEXTS += ["${oc.env:HOME}", "${seeds}", "~", "null", "'null'", "=", ":", "a=b", "a,b"]
TEXTS += ["range(0,1000000000)", "glob(*)", "choice(1,2)"]
NESTED = ["[" * d + "]" * d for d in (1, 2, 15, 50, 500)] + [
    "{a:" * d + "1" + "}" * d for d in (1, 3, 15, 500)
]
NESTED += ["[[1],[2]]", "{1: 2}", "{name: [1]}", "{name: x}", "[null]", "[{a: 1}]", "[1,[2]]", "{a: null}"]
INSIDE = [  # settings inside mappings, which `schema_keys` does not list
    *(f"lr_sweep.grids.{name}" for name in ("adam", "lion", "new", "''")),
    *(f"controller_search.candidates.{name}" for name in ("x", "log_pi.controller", "log_pi.controller.kp")),
    *(f"launcher.sbatch.{name}" for name in ("x", "time", "a.b.c")),
    *(f"ablation.arms.{arm}" for arm in ("baseline", "agc", "new", "ebc.settings.model")),
    *(f"ablation.arms.agc.{field.name}" for field in dataclasses.fields(ArmConfig)),
    "ablation.arms.agc.tune.strength",
    *(f"ablation.arms.agc.settings.{name}" for name in ("steps", "data.file", "optimizer.name", "x")),
]


def a_value(draw):
    many = draw.choice((3, 90, 150, 900, 100_000))
    if draw.random() < 0.5:
        return draw.choice(["1", "2", "3", "30", "100", "0.5", "1e-3", "[0.5,2]", "[1,2,4]", "[7,8,9]", "x"])
    return draw.choice(
        [
            draw.choice(NUMBERS),
            draw.choice(NUMBERS),
            draw.choice(TEXTS),
            draw.choice(NESTED),
            f"[{','.join(draw.choices(NUMBERS[:12], k=draw.randint(0, 5)))}]",
            f"[{','.join(map(str, range(200, 200 + many)))}]",
            f"{{{','.join(f'a{i}: {draw.choice(NUMBERS[:8])}' for i in range(draw.choice((1, 90, 200))))}}}",
            draw.choice([choice for choices in groups().values() for choice in choices]),
        ]
    )


@functools.cache
def usual():
    """The settings of a usual study, those aside that a study decides itself."""
    return {k: v for k, v in flat(to_dict(compose(SMOKE))).items() if k not in hints.STUDY_DECIDES}


def near(draw, value):
    """Another value of the same kind, such as a study might have."""
    times = draw.choice((0.5, 1, 2, 3))
    if isinstance(value, bool):
        return str(draw.random() < 0.5).lower()
    if isinstance(value, int | float):
        return repr(type(value)(value * times))
    if isinstance(value, list) and all(isinstance(item, int | float) for item in value):
        return repr([type(item)(item * times) for item in value])
    return a_value(draw) if value is None else str(value).replace("'", "")


def mutated(draw):
    """A set of overrides that was valid, until one to three of its words were changed."""
    kinds = [[*schema_keys()]] * 8 + [[*groups()], INSIDE, INSIDE, [*hints.SETTING_MEANT]]
    overrides = ["scale=smoke", f"study={draw.choice(groups()['study'])}"]
    if draw.random() < 0.3:
        overrides.append(f"optimizer={draw.choice(groups()['optimizer'])}")
    if draw.random() < 0.2:
        overrides.append(SEARCH)
    for _ in range(draw.choice((1, 1, 2, 3))):
        key = draw.choice(draw.choice(kinds))
        if draw.random() < 0.5 and key in usual():
            overrides.append(f"{key}={near(draw, usual()[key])}")
            continue
        if draw.random() < 0.1:  # a slip of the keyboard
            at = draw.randrange(len(key))
            key = key[:at] + draw.choice(["", "x", ".", " ", "/", "@", key[at] * 2]) + key[at + 1 :]
        overrides.append(f"{draw.choice([*[''] * 12, '+', '++', '~'])}{key}={a_value(draw)}")
    return overrides


def too_long(number, frame):
    raise TimeoutError


@pytest.mark.parametrize("cases", [30, pytest.param(2000, marks=pytest.mark.slow)])
def test_whatever_is_overridden_is_planned_or_refused_in_a_sentence(cases, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study_checks, "MOST_RUNS", 2000)  # more may take longer to plan than is waited here
    draw = random.Random(cases)
    plans = 0
    before = signal.signal(signal.SIGALRM, too_long)
    try:
        for _ in range(cases):
            overrides = mutated(draw)
            shown = [override[:200] for override in overrides]
            signal.alarm(20)
            try:
                [config] = configurations(overrides)
                plans += 1
                assert planned(config)["stages"]["total"]["max"]["runs"] <= study_checks.MOST_RUNS
            except UserError as error:
                said = str(error)
                assert "\n" not in said, shown
                assert len(said) <= 600, shown
                settings = " ".join(override.partition("=")[0] for override in overrides)
                assert any(word in said for word in re.findall(r"\w+", settings)), shown
            except BaseException as error:
                raise AssertionError(shown) from error
            finally:
                signal.alarm(0)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert plans
    assert not list(tmp_path.iterdir())
