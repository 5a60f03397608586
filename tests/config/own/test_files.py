"""Suites and other choices of one's own, from any folder, and own parts under their own names."""

import itertools
import os
import re
import shutil
import sys
from dataclasses import replace

import pytest
from support.called import answered, called
from support.invented import RESOLVED

from ebc_lab.cli import completion
from ebc_lab.config import choices
from ebc_lab.config.compose import compose
from ebc_lab.config.dicts import run_part, to_dict
from ebc_lab.config.errors import UserError
from ebc_lab.config.identity import digest, identity
from ebc_lab.config.own import files
from ebc_lab.config.own.files import conf_dir
from ebc_lab.config.own.sources import PLACES
from ebc_lab.records.json_files import read_json

PART = "import torch\n\n\nclass Cautious(torch.optim.Adam):\n    pass\n"
SUITE = """\
study: {stages: [lr_sweep, ablation]}
lr_sweep: {optimizers: [adam]}
ablation:
  question: is it better?
  reference: adam
  arms:
    adam: {about: Adam}
    mine: {about: mine, settings: {optimizer: {name: custom, target: './suite_opt.py:Cautious'}}}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(PLACES, "")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "suite_opt.py").write_text(PART)
    (tmp_path / "mine.yaml").write_text(SUITE)
    return tmp_path


def composed(*overrides):
    return compose(["scale=smoke", *overrides], here=False)


@pytest.mark.thorough
def test_a_suite_is_found_by_its_path_and_has_its_files_name(folder, monkeypatch):
    config = composed("study=./mine.yaml")
    assert config.study.name == "mine"
    assert set(config.own_files) == {"mine.yaml", "suite_opt.py"}
    assert set(config.ablation.arms) == {"adam", "mine"}
    chosen = config.ablation.arms["mine"].settings["optimizer"]
    assert (chosen["name"], chosen["target"]) == ("cautious", "suite_opt:Cautious")
    assert composed(f"study={folder / 'mine.yaml'}") == config
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")  # its parts are beside it
    assert composed("study=../mine.yaml") == config
    (folder / "parts_here").mkdir()
    (folder / "suite_opt.py").rename(folder / "parts_here" / "slow.py")
    (folder / "mine.yaml").write_text(SUITE.replace("./suite_opt.py:Cautious", "parts_here.slow:Cautious"))
    assert "parts_here/slow.py" in composed("study=../mine.yaml").own_files


def test_a_name_means_the_working_folders_suite_first(folder):
    (folder / "conf" / "study").mkdir(parents=True)
    (folder / "conf" / "study" / "controls.yml").write_text(SUITE.replace("./suite", "../../suite"))
    config = composed("study=controls")
    assert (config.study.name, set(config.ablation.arms)) == ("controls", {"adam", "mine"})
    with pytest.raises(UserError, match=r"study=contrls is unknown \(did you mean controls or .*stabilizers"):
        composed("study=contrls")


@pytest.mark.thorough
def test_a_suite_may_build_on_another(folder):
    (folder / "more.yaml").write_text("defaults: [controls]\nstudy: {name: mine}\nseeds: [4]\n")
    config = composed("study=./more.yaml")
    assert (config.study.name, config.seeds) == ("mine", [4])
    assert config.ablation.arms == composed("study=controls").ablation.arms


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ablation:\n  arms: [\n", r"bad.yaml:3: .*expected (the )?node content"),
        ("ablation: {}\nablatoin: 3\n", r"^bad.yaml:2: ablatoin is not a setting \(did you mean ablation"),
        ("ablation:\n  arms:\n    a: {lr_scal: 3}\n", r"^bad.yaml:3: .*a.lr_scal.*\(did you mean lr_scale"),
        ("\nseeds: 3\n", r"^bad.yaml:2: seeds: it is a list, seeds=\[…\]"),
        (SUITE.replace("[adam]", "[adm]"), r"^bad.yaml:2: lr_sweep.optimizers=adm"),
        ("- 1\n- 2\n", "bad.yaml holds no settings"),
        ("'True'\n", "bad.yaml holds no settings"),
        ("'ablation: {}'\n", "bad.yaml holds no settings"),
        (
            SUITE.replace("about: mine", "lr_scale: two"),
            r"^bad.yaml:8: .*mine.lr_scale: two is not a number$",
        ),
        (SUITE.replace("  reference: adam\n", ""), r"^bad.yaml:3: ablation.reference is missing: .*or mine"),
        (
            f"a: &a [{'1, ' * 999}]\nb: &b [{'*a, ' * 99}]\nc: [{'*b, ' * 99}]",
            r"bad.yaml.*its aliases stand for too many values",
        ),
        ("a: " + "[" * 99_999, r"bad.yaml.*it is nested too deeply"),
        ("a: &a [*a]", r"bad.yaml.*a holds itself"),
        ("ablation:\n  arms:\n    a: {budget: '${'}\n", r"bad.yaml:3: no viable alternative"),
    ],
)
def test_a_mistake_in_a_suite_is_told_with_its_line(folder, text, words):
    (folder / "bad.yaml").write_text(text)
    with pytest.raises(UserError, match=words) as refused:
        composed("study=./bad.yaml")
    assert "own-" not in str(refused.value)


@pytest.mark.parametrize(
    ("written", "read"),
    [("010", "is read as 8"), ("08", "is no plain number"), ("190:20:30.5", "is read as 685230.5")],
)
def test_a_number_that_yaml_reads_otherwise_is_refused_wherever_it_stands(folder, written, read):
    for setting in (f"seeds: [3, {written}]\n", f"ablation:\n  arms:\n    hot: {{lr_scale: {written}}}\n"):
        text = f"study: {{name: bad}}\n{setting}"
        (folder / "bad.yaml").write_text(text)
        where = rf"^bad.yaml:{text.count(chr(10))}: {re.escape(written)}"
        with pytest.raises(UserError, match=rf"{where} {read}.*'.*' in quotes"):
            composed("study=./bad.yaml")


def test_numbers_mean_in_a_file_what_they_mean_on_a_command_line(folder):
    numbers = "[0, 7, +8, 1_000, 12_345_678]"
    (folder / "mine.yaml").write_text(f"study: {{name: '010'}}\nseeds: {numbers}\neval_every: !!int '12'\n")
    config = composed("study=./mine.yaml")
    assert (config.study.name, config.eval_every) == ("010", 12)
    assert config.seeds == composed(f"seeds={numbers}").seeds == [0, 7, 8, 1000, 12345678]


def test_a_suite_that_is_not_there_names_those_that_are(folder):
    with pytest.raises(UserError, match=r"study=./mien.yaml is not there \(there is mine.yaml\)"):
        composed("study=./mien.yaml")
    with pytest.raises(UserError, match=r"study=mien is unknown \(did you mean ./mine.yaml\?\); study take"):
        composed("study=mien")


@pytest.mark.thorough
def test_new_arms_are_overrides_and_an_arm_is_left_out_by_one(folder):
    hot = "{about: hot, lr_scale: 4, settings: {stabilizer: {name: agc}}}"
    for sign in ("", "+", "++"):
        arms = composed("study=./mine.yaml", f"{sign}ablation.arms.hot={hot}").ablation.arms
        assert (arms["hot"].lr_scale, arms["hot"].settings) == (4, {"stabilizer": {"name": "agc"}})
        assert set(arms) == {"adam", "mine", "hot"}
    assert composed("study=controls", "ablation.arms.hot={lr_scale: 3}", "ablation.arms.hot.lr_scale=2")
    with pytest.raises(UserError, match=r"ablation.arms.hot.lr_scal: .*\(did you mean lr_scale\?\)"):
        composed("study=controls", "ablation.arms.hot={lr_scal: 3}")
    with pytest.raises(UserError, match=r"ablation.arms.hot: an arm is a mapping"):
        composed("study=controls", "ablation.arms.hot=3")
    new = ["+ablation.arms.new.lr_scale=3", "+ablation.arms.new.settings.stabilizer.name=agc"]
    arms = composed("study=./mine.yaml", "~ablation.arms.mine", *new).ablation.arms
    assert set(arms) == {"adam", "new"}
    assert (arms["new"].lr_scale, arms["new"].settings) == (3, {"stabilizer": {"name": "agc"}})
    with pytest.raises(
        UserError, match=r"^~ablation.arms.mime: .*\(did you mean mine\?\); leave out adam or"
    ):
        composed("study=./mine.yaml", "~ablation.arms.mime")


def test_two_parts_of_one_name_are_told_apart_and_two_files_of_one_name_refused(folder):
    (folder / "other_opt.py").write_text(PART)
    second = "    two: {settings: {optimizer: {name: custom, target: './other_opt.py:Cautious'}}}\n"
    again = "    hot: {settings: {optimizer: {name: cautious, target: './suite_opt.py:Cautious'}}}\n"
    for suite in (SUITE, SUITE.replace("name: custom", "name: cautious")):
        (folder / "mine.yaml").write_text(suite + second + again)
        arms = composed("study=./mine.yaml").ablation.arms
        names = [arms[arm].settings["optimizer"]["name"] for arm in ("mine", "two", "hot")]
        assert names == ["cautious", "cautious_2", "cautious"]
    (folder / "sub").mkdir()
    (folder / "sub" / "suite_opt.py").write_text(PART)
    (folder / "mine.yaml").write_text(SUITE + second.replace("other_opt", "sub/suite_opt"))
    with pytest.raises(UserError, match=r"suite_opt.py and .*sub/suite_opt.py have the same name"):
        composed("study=./mine.yaml")


CAUTIOUS = "settings: {optimizer: {name: cautious, target: './suite_opt.py:Cautious'}}"
LION = "settings: {optimizer: {name: lion}}, grid: {optimizer.lr: [1e-3]}"


@pytest.mark.parametrize(
    ("study", "key", "settings"),
    [
        ("units", "carry.arms", f"{CAUTIOUS}, unit: rate, over: optimizer.lr, grid: [1e-4, 2e-4]"),
        ("units", "carry.settings", f"{CAUTIOUS}, lr: 1e-3"),
        pytest.param("calibrated", "profiles.methods", LION, marks=pytest.mark.thorough),
        pytest.param(
            "calibrated", "profiles.workloads", "settings: {model: {name: gru}}", marks=pytest.mark.thorough
        ),
    ],
)
def test_the_other_suites_take_new_entries_and_carry_own_parts_too(folder, study, key, settings):
    stage, name = key.split(".")
    config = composed(f"study={study}", f"+{key}.new={{about: new, {settings}}}")
    entries = getattr(getattr(config, stage), name)
    assert [*entries][-1] == entries["new"].about == "new"
    if stage == "carry":
        assert entries["new"].settings["optimizer"]["target"] == "suite_opt:Cautious"
        assert "suite_opt.py" in config.own_files
    what = name.removesuffix("s")
    none = rf"^{key}.new: the suite has no such {what}; a new one is begun with a \+, \+{key}.new.about="
    with pytest.raises(UserError, match=none):
        composed(f"study={study}", f"{key}.new.about=x")
    with pytest.raises(UserError, match=rf"^{key}.new: an? {what} is a mapping"):
        composed(f"study={study}", f"+{key}.new=3")


def test_an_arm_tuned_as_the_one_that_mine_makes_is_not_taken_for_it(folder):
    part = '{optimizer: {name: cautious, target: "./suite_opt.py:Cautious"}}'
    longer = f"{{tuned_as: cautious, versus: cautious, steps: 2, settings: {part}}}"
    suite = composed(
        "study=optimizers", "mine=./suite_opt.py:Cautious", f"ablation.arms.longer={longer}"
    ).ablation
    assert [*suite.arms] == ["adamw", "muon", "longer", "cautious"]
    assert (suite.mine.arms, suite.arms["longer"].tuned_as) == (["cautious"], "cautious")


@pytest.mark.parametrize("sign", ["", "+"])
def test_an_arm_that_mine_makes_is_set_like_any_other(folder, sign):
    asked = ("study=optimizers", "mine=./suite_opt.py:Cautious")
    usual = composed(*asked).ablation.arms["cautious"]
    rates = {"lr": [1e-4, 2e-4, 4e-4]}
    own = composed(*asked, f"{sign}ablation.arms.cautious.tune.lr={rates['lr']}".replace(" ", ""))
    assert own.ablation.mine.arms == ["cautious"]
    assert set(own.ablation.arms) == {"adamw", "muon", "cautious"}
    assert own.ablation.arms["cautious"] == replace(usual, tune={**usual.tune, **rates})
    whole = composed(*asked, f"{sign}ablation.arms.cautious={{lr_scale: 2}}")
    assert whole.ablation.arms["cautious"] == replace(usual, lr_scale=2.0)
    with pytest.raises(UserError, match=r"^ablation.arms.cautios: .*no such arm \(did you mean cautious"):
        composed(*asked, "ablation.arms.cautios.tune.lr=[1e-4]")


def test_a_method_that_mine_makes_has_the_grid_of_the_yardstick_and_is_asked_about_first(folder):
    asked = ("study=calibrated", "mine=./suite_opt.py:Cautious")
    config = composed(*asked)
    profiles, usual = config.profiles, composed("study=calibrated").profiles
    own, nadamw = profiles.methods["cautious"], usual.methods["nadamw"]
    part = own.settings["optimizer"]
    assert (part["name"], part["target"], len(part["sha256"])) == ("cautious", "suite_opt:Cautious", 64)
    assert own == replace(nadamw, about=own.about, settings={**nadamw.settings, "optimizer": part})
    assert {name: profiles.methods[name] for name in usual.methods} == usual.methods
    assert profiles.asked_about == ["cautious", *usual.asked_about]
    assert (config.mine, list(config.own_files)) == (["suite_opt:Cautious"], ["suite_opt.py"])
    rates = "profiles.methods.cautious.grid={optimizer.lr: [1e-4, 2e-4]}"
    assert composed(*asked, rates).profiles.methods["cautious"].grid == {
        **nadamw.grid,
        "optimizer.lr": [1e-4, 2e-4],
    }
    with pytest.raises(UserError, match=r"no such method \(did you mean cautious"):
        composed(*asked, "profiles.methods.cautios.about=x")
    with pytest.raises(UserError, match=r"^mine=suite_opt:Cautious: .* or study=calibrated\.$"):
        composed("mine=./suite_opt.py:Cautious")


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("ablation.arms.hot={settings: {stabilizer: {name: agd}}}", r"^ablation.arms.hot: stabilizer=agd "),
        ("ablation.arms.mine.lr_scale=two", r"^ablation.arms.mine.lr_scale: two is not a number$"),
        ("ablation.arms.mine=null", r"^ablation.arms.mine: an arm is a mapping.*'~ablation.arms.mine' l"),
        ("ablation.arms.hot.lr_scale=2", r"^ablation.arms.hot: .*begun with a \+, \+ablation.arms.hot.lr_"),
        ("ablation.reference=none", r"^ablation.reference=none is none of the arms"),
        ("~ablation.arms.mine", r"^ablation.arms must name at least two arms"),
    ],
)
def test_a_mistake_in_an_override_is_not_told_of_the_suites_file(folder, override, words):
    with pytest.raises(UserError, match=words):
        composed("study=./mine.yaml", override)


@pytest.mark.parametrize("asked", [("study=optimizers", "mine"), ("optimizer=custom", "optimizer.target")])
def test_a_file_without_a_function_is_told_what_is_missing(folder, asked):
    group, key = asked
    missing = r"which function of that file is not said: write ./suite_opt.py:NAME\.$"
    with pytest.raises(UserError, match=rf"^{key}=./suite_opt.py: {missing}"):
        composed(group, f"{key}=./suite_opt.py")


# -- choices of other groups ---------------------------------------------------------------------------------

OWN = {
    "launcher/mine": "name: slurm\nslots: 4\npartition: gpu\n",
    "optimizer/slow": "defaults: [adam]\nbeta2: 0.99\n",
    "optimizer/slower": "defaults: [slow]\nbeta1: 0.8\n",
    "optimizer/round": "defaults: [bad]\n",
    "optimizer/cautious": "{name: custom, target: './suite_opt.py:Cautious', arguments: {eps: 1e-7}}\n",
    "scale/tiny": "defaults: [smoke]\nbatch_size: 12\n",
    "data/books": "{name: path, file: [a.txt, b.txt]}\n",
    "tracker/none": "{names: []}\n",
}


@pytest.fixture
def conf(folder):
    """OWN in conf/ of the working folder."""
    for name, settings in OWN.items():
        path = folder / "conf" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(settings)
    return folder / "conf"


def of(*overrides):
    """What is recorded of a study, and the hash that names its first run."""
    config = compose([*RESOLVED, f"data.sha256={'a' * 64}", *overrides])
    settings = {key: value for key, value in to_dict(config).items() if key not in ("launcher", "own_files")}
    return settings, digest(identity(run_part(config)))


WRITTEN = {
    "launcher=mine": [],
    "optimizer=slower": ["optimizer=adam", "optimizer.beta1=0.8", "optimizer.beta2=0.99"],
    "scale=tiny": ["scale=smoke", "batch_size=12"],
    "data=books": ["data=path", "data.file=[a.txt,b.txt]"],
}


@pytest.mark.filterwarnings("error")  # Hydra 1.4 gives one where a name is registered again
def test_a_choice_of_ones_own_is_nothing_but_its_settings(conf, monkeypatch):
    there = of(*itertools.chain(*WRITTEN.values()))
    looks = []
    monkeypatch.setattr(choices, "read", lambda file: [looks.append(file), files.read(file)][1])
    assert of(*WRITTEN) == there
    assert sorted(file.path.stem for file in looks) == [
        "books",
        "mine",
        "slow",
        "slower",
        "tiny",
    ]  # once each
    (conf.parent / "elsewhere").mkdir()
    os.chdir("elsewhere")
    assert of(*(f"{one.partition('=')[0]}=../conf/{one.replace('=', '/')}.yaml" for one in WRITTEN)) == there


def test_an_arm_takes_a_choice_of_ones_own_by_its_name(conf):
    def arm(optimizer):
        entry = f"+ablation.arms.own.settings={{optimizer: {optimizer}, budget: {{name: shadow}}}}"
        return composed("study=target_kl", entry).ablation.arms["own"]

    assert arm("{name: slower, eps: 1e-7}") == arm("{name: adam, beta1: 0.8, beta2: 0.99, eps: 1e-7}")
    target = "target: './suite_opt.py:Cautious'"
    assert arm("{name: cautious, arguments: {a: 1}}") == arm(
        f"{{name: custom, {target}, arguments: {{eps: 1e-7, a: 1}}}}"
    )
    with pytest.raises(UserError, match=r"^ablation\.arms\.own: \S+/round\.yaml: optimizer=bad is unknown"):
        arm("{name: round}")


@pytest.mark.thorough
def test_each_choice_of_ones_own_goes_with_ebc_labs_others_and_overrides_win(conf):
    for own, written in WRITTEN.items():
        scale = [] if "scale" in own else ["scale=smoke"]
        assert of(*scale, own) == of(*scale, *written)
    assert of("scale=tiny", "batch_size=10") == of("scale=smoke", "batch_size=10")


@pytest.mark.thorough
def test_a_sweep_trains_choices_of_ones_own_under_the_names_of_their_settings(conf):
    run = ["data=pydoc", "steps=2", "stabilizer=none", *RESOLVED]
    answered(
        "train", "-m", *run, "scale=tiny,smoke", "optimizer=slow", "hydra.sweep.dir=own", cwd=conf.parent
    )
    for number, batch in enumerate((12, 24)):
        written = ["scale=smoke", f"batch_size={batch}", "optimizer.beta2=0.99", f"hydra.run.dir=w/{number}"]
        answered("train", *run, *written, cwd=conf.parent)
        ids = [read_json(conf.parent / of / str(number) / "spec.json")["run_id"] for of in ("own", "w")]
        assert ids[0] == ids[1]


def test_a_launcher_and_a_part_of_ones_own_are_chosen_by_their_files(conf):
    config = compose(["scale=smoke", "launcher=mine", "device=cpu", "launcher.partition=big"])
    launcher = config.launcher
    assert (launcher.name, launcher.slots, launcher.partition) == ("slurm", 4, "big")
    run = compose(["scale=smoke", "optimizer=cautious", "device=cpu"], study=False)
    assert (run.optimizer.name, run.optimizer.target) == ("cautious", "suite_opt:Cautious")
    assert {"mine", "slurm"} <= {*completion.values("launcher")}


def test_a_list_that_takes_built_in_choices_says_how_one_of_ones_own_is_given(conf):
    with pytest.raises(
        UserError, match=r"lr_sweep.optimizers=slow is a choice of your own.*: .*optimizer=slow"
    ):
        composed("lr_sweep.optimizers=[slow]", "lr_sweep.grids.slow=[1e-3,2e-3]")


@pytest.mark.parametrize(
    ("file", "settings", "said"),
    [
        (
            "launcher/bad",
            "name: slurm\nslot: 4",
            r"bad\.yaml:2: launcher\.slot is not a setting \(did you mean",
        ),
        ("launcher/bad", "name: slurm\nslots: -1", r"bad\.yaml:2: launcher\.slots must be a whole number"),
        ("launcher/bad", "slots: 4", r"conf/launcher/bad\.yaml: a line `name: …` must say of which launcher"),
        ("optimizer/bad", "name: fast", r"bad\.yaml: a line `name: …` must say of which optimizer these are"),
        ("optimizer/bad", "defaults: [adm]", r"bad\.yaml: optimizer=adm is unknown \(did you mean adam"),
        ("optimizer/bad", "defaults: [adam, adm]", r"bad\.yaml: optimizer=adm is unknown"),
        (
            "optimizer/bad",
            "defaults: [bad]",
            r"optimizer/bad\.yaml → \S+bad\.yaml: `defaults` go in a circle",
        ),
        (
            "optimizer/bad",
            "defaults: [round]",
            r"/bad\.yaml → \S+/round\.yaml → \S+/bad\.yaml: `defaults` go",
        ),
        ("study/bad", "defaults: [bad]", r"conf/study/bad\.yaml → \S+bad\.yaml: `defaults` go in a circle"),
        ("study/bad", "defaults: [contrls]", r"bad\.yaml: study=contrls is unknown \(did you mean controls"),
        ("scale/bad", "defaults: 5", r"bad\.yaml: defaults takes a list of names of choices"),
        ("scale/bad", "steps: 4", r"bad\.yaml: a line `scale: …` must say of which scale .*: laptop, mini"),
        ("data/bad", "name: [", r"conf/data/bad\.yaml:1: .*: mend the file"),
        ("data/nix", None, r"data=bad is unknown; data takes books, nix, auto"),
    ],
)
def test_a_mistake_in_such_a_file_is_told_with_its_place(conf, file, settings, said):
    (conf / f"{file}.yaml").parent.mkdir(exist_ok=True)
    (conf / f"{file}.yaml").write_text(settings or "name: auto")
    with pytest.raises(UserError, match=said):
        composed(f"{file.partition('/')[0]}=bad", "device=cpu")


def test_a_choice_that_has_the_name_of_a_built_in_one_is_taken_and_told_if_it_says_something_else(conf):
    shutil.copy(conf_dir() / "data" / "pydoc.yaml", conf / "data")
    done = called("data", "data=pydoc", "tracker=none", "--json", cwd=conf.parent)
    assert done.stderr == "note: tracker=none is your conf/tracker/none.yaml, not ebc-lab's own\n"
