import json

import hydra
import pytest
from omegaconf import OmegaConf
from support.composed import refused
from support.named import run

from ebc_lab.config.checks import validate_run
from ebc_lab.config.choices import changed, groups, read_choice, with_size
from ebc_lab.config.compose import compose, configurations
from ebc_lab.config.dicts import run_part
from ebc_lab.config.errors import UserError
from ebc_lab.config.overrides import expand
from ebc_lab.config.own.files import conf_dir
from ebc_lab.config.schema import ArmConfig


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["scal=smoke"], ["scal", "did you mean scale"]),
        (["scale=smok"], ["did you mean smoke", "laptop, mini, paper or smoke"]),
        (["+extra=1"], ["extra is not a setting"]),
        (["@target=1"], ["@target is not a setting"]),
        (["++model.widht=3"], ["did you mean model.width"]),
        (["~seeds"], ["cannot be deleted"]),
        (["optimizer=adan"], ["did you mean adam"]),
        (["steps"], ["KEY=VALUE"]),
        (["optimizer.lr=-1"], ["optimizer.lr", ">= 1e-12", "-1"]),
        (["model.heads=3"], ["multiple of model.heads"]),
        (["budget.probe_sequences=24"], ["probe_sequences", "1 to 23"]),
        (["study.name=../x"], ["study.name", "plain folder name"]),
        (["seeds=[]"], ["seeds"]),
        (["seeds=[1,1]"], ["twice"]),
        (["data=path"], ["data.file"]),
        (["lr_sweep.grids.adam=[2e-3,1e-3]"], ["increasing"]),
        (["lr_sweep.optimizers=[lyon]"], ["lyon", "did you mean lion or lionar?"]),
        (["optimizer=adam,sgd"], ["needs -m"]),
        (["budget.target_kl=1e-9"], ["target_kl", "1e-06"]),
        (["device=cuda"], ["no GPU"]),
        (["lr_sweep.control_shapes=[trapesoid]"], ["did you mean trapezoid"]),
        (["lr_sweep.control_shapes=[replay]"], ["replay"]),
        (["study.lr_schedule=replay"], ["study.lr_schedule"]),
        (["study.kl_schedule=holds"], ["study.kl_schedule", "hold_decay"]),
        (["calibrate.choose=best"], ["calibrate.choose", "loss"]),
        (["param_dtype=bfloat16", "projection=spectral"], ["no singular value decomposition"]),
        (["param_dtype=bfloat16", "budget.target_kl=5e-5"], ["bfloat16 can show"]),
        (["dtype=float32", "budget.schedule=linear", "budget.target_kl=1e-5"], ["where its schedule ends"]),
        (["stabilizer=agc", "stabilizer.strength=0"], ["stabilizer.strength must be"]),
        (["tokens=1e5", "steps=10"], ["both say how long the run is"]),
        (["tokens=0"], ["train_tokens", ">= 1"]),
        (["tokens=1e14"], ["130208333334 steps of 768 tokens: at most 100000000"]),
        (["tokens=2M"], ["bpe, bytes, characters or gpt2, or how many tokens to train on, as 2e6"]),
        (["tokens=1e5", "batch_size=0"], ["batch_size", ">= 1"]),
        (["finals.train_tokens=1e5", "finals.steps=9"], ["finals.steps and finals.train_tokens both say"]),
    ],
)
def test_a_mistake_is_named_in_one_sentence(overrides, words):
    said = refused(overrides, study=False)
    assert all(word in said for word in words), said


@pytest.mark.thorough
@pytest.mark.parametrize(
    "override",
    ["optimizer.lr=1e-3", "seed=3", "steps=10", "budget.target_kl=0.1", "stabilizer=none", "tokens=1e5"],
)
def test_a_study_refuses_settings_that_it_decides_itself(override):
    words = {"tokens=1e5": "finals.steps or finals.train_tokens", "stabilizer=none": "study=stabilizers"}
    assert words.get(override, "decided by the study itself") in refused([override])
    compose(["scale=smoke", override], study=False)


@pytest.mark.thorough
def test_it_composes_in_a_program_that_has_begun_hydra_itself():
    with hydra.initialize_config_dir(str(conf_dir().resolve()), version_base="1.3"):
        assert compose(["scale=smoke"]).scale == "smoke"


def test_groups_narrow_what_a_study_covers():
    config = compose(["scale=laptop", "optimizer=muon", "projection=spectral", "budget=surrogate"])
    assert config.lr_sweep.optimizers == ["muon"]
    assert config.lr_sweep.projections == ["spectral"]
    assert config.calibrate.budgets == ["surrogate"]


NEED_MORE = {  # than a run has by default
    *("data=bin", "data=digits", "data=path", "model=cnn", "model=vit", "workload=images", "tokens=gpt2"),
    *("decoder=transformer", "encoder=transformer", "index=exact", "index=hnsw", "index=ivf"),
    *("sampler=adjusted", "sampler=original", "projection=sphere", "memory=all", "memory=hooks"),
    *("init=run", "lr_schedule=replay", "race=bounds"),
}


@pytest.mark.parametrize("group", [*groups()])
def test_a_choice_is_read_as_hydra_reads_it(group):
    for name in groups()[group]:
        as_hydra_does = OmegaConf.to_container(OmegaConf.load(conf_dir() / group / f"{name}.yaml"))
        found, wanted = (
            json.dumps(node, sort_keys=True) for node in (read_choice(group, name), as_hydra_does)
        )
        assert found == wanted


@pytest.mark.thorough
def test_every_choice_of_every_group_is_read_and_fits_a_usual_run_or_needs_more():
    """But for the suites, each of which test_extremes.py plans."""
    refused = set()
    for group, names in groups().items():
        for name in names:
            if group in ("scale", "launcher", "tracker"):
                compose(["device=cpu", f"{group}={name}"])
            elif group == "check":
                compose(["study=optimizers", f"{group}={name}"])
            elif group != "study":
                read = read_choice(group, name)
                assert read["name"] == name
                assert read.keys() <= vars(getattr(run(), group)).keys()
                own = {"target": "my_part:make", "sha256": "1" * 64} if name == "custom" else {}
                try:
                    validate_run(changed(run(), {group: {"name": name, **own}}))
                except UserError:
                    refused.add(f"{group}={name}")
    assert refused == NEED_MORE


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["stabilizer=norm_clip"], ["study=stabilizers", "ebc-lab train"]),
        (["study=stabilizers", "mine=[[1],[2]]"], ["mine=[1]: yours is written ./file.py:Class"]),
        (["stabilizer.strength=0.1"], ["the arms of a suite"]),
        (["seeds=[7,101]"], ["100 to 102"]),
        (["seeds=[7,105]", "lr_sweep.replicates=5"], ["100 to 105"]),
        (["seeds=[7,106]", "calibrate.seeds=7"], ["100 to 106"]),
        (["study=stabilizers", "study.stages=[lr_sweep,ablation]"], ["need the stage tune"]),
        (["seeds=[0,1,2]", "finals.max_seeds=3"], ["finals.max_seeds", "fewer, not 3"]),
        (["seeds=[0]", "finals.max_seeds=3"], ["finals.max_seeds", "two at least"]),
        (["study.stages=[calibrate,lr_sweep,lr_scale,finals]"], ["in the order lr_sweep, calibrate"]),
        (["study.stages=[lr_sweep,finals]"], ["finals needs lr_scale"]),
        (["study.stages=[lr_sweep,ablation]"], ["study=NAME"]),
        (["study.stages=[lr_sweep,finale]"], ["did you mean finals"]),
        (["ablation.arms.l1_none.lr_skale=3", "study=guard"], ["lr_skale"]),
        (["ablation.arms.x.lr_scale=3", "study=guard"], ["a new one is begun with a +", "written whole"]),
    ],
)
def test_a_study_that_cannot_be_meant_is_refused(overrides, words):
    said = refused(overrides)
    assert all(word in said for word in words), said


@pytest.mark.thorough
def test_a_named_choice_in_an_arm_is_what_its_file_says():
    """Gains of another controller, or another stabilizer's strength, do not come along."""
    asked = [
        "scale=smoke",
        "controller=log_pi",
        "stabilizer=norm_clip",
        "optimizer=axiom",
        "optimizer.rank=4",
    ]
    base = run_part(compose(asked, study=False))
    other = changed(
        base, {"controller": {"name": "fixed"}, "stabilizer": {"name": "agc"}, "optimizer": {"name": "lion"}}
    )
    assert (other.controller.kp, other.controller.ki) == (None, None)
    assert other.stabilizer.strength == read_choice("stabilizer", "agc")["strength"]
    settings = other.optimizer
    assert (settings.rank, settings.beta2, settings.lr) == (0, 0.99, base.optimizer.lr)
    surrogate = changed(base, {"budget": {"name": "surrogate"}}).budget
    assert surrogate.probe_sequences == base.budget.probe_sequences


@pytest.mark.parametrize(
    ("scale", "expected"), [(2.5, (320, 40, 50)), (1.0, (128, 16, 20)), (1e-6, (4, 1, 1))], ids=str
)
def test_a_run_of_another_size_keeps_its_heads_and_is_never_empty(scale, expected):
    made = with_size(run({"steps": 20}), ArmConfig(width_scale=scale, batch_scale=scale, steps=scale))
    assert (made.model.width, made.batch_size, made.steps) == expected
    assert made.model.heads == 4


@pytest.mark.thorough
@pytest.mark.parametrize("said", ["tokens=1e5", "tokens=100_000", "+tokens=100000", "train_tokens=1e5"])
def test_a_number_of_tokens_is_a_number_of_steps_rounded_up(said):
    given, asked = (compose(["scale=smoke", length], study=False) for length in (said, "steps=131"))
    assert given.batch_size * given.model.context == 768  # 100,000 of them are 130.2 steps
    assert given == asked


def test_a_number_of_tokens_goes_with_the_name_of_a_tokenizer_and_is_what_other_settings_see():
    config = compose(
        ["scale=smoke", "tokens=bpe", "tokens=7681", "eval_every=${steps}", "batch_size=12"], study=False
    )
    assert (config.tokens.name, config.steps, config.eval_every) == ("bpe", 21, 21)


def test_a_stage_takes_its_length_in_tokens_and_what_follows_it_follows():
    tokens, steps = (
        compose(["scale=smoke", f"finals.{length}"]) for length in ("train_tokens=1e5", "steps=131")
    )
    assert (tokens.finals.steps, tokens.calibrate.steps, tokens.lr_sweep.long_steps) == (131, 131, 131)
    assert tokens == steps


def test_budgets_of_tokens_are_swept_with_what_a_step_holds():
    found = [compose(c, study=False) for c in expand(["scale=smoke", "tokens=1e5,2e5", "batch_size=24,48"])]
    assert [config.steps for config in found] == [131, 66, 261, 131]


def test_studies_of_a_sweep_are_named_after_what_varies_unless_they_are_named():
    sweep = ["scale=smoke", "study.name=mine", "optimizer.weight_decay=0,0.1", "audit_every=5"]
    names = [config.study.name for config in configurations(sweep, multirun=True)]
    assert names == ["mine_optimizer.weight_decay_0", "mine_optimizer.weight_decay_0.1"]
    named = configurations(["scale=smoke", "study.name=a,b"], multirun=True)
    assert [config.study.name for config in named] == ["a", "b"]
