"""A user's own parts, by a target or by the name that an installed package offers."""

from dataclasses import replace

import pytest

from ebc_lab.config.choices import offered
from ebc_lab.config.compose import compose, register_schema
from ebc_lab.config.dicts import from_dict, to_dict
from ebc_lab.config.errors import UserError
from ebc_lab.config.identity import digest, identity, run_id
from ebc_lab.config.own.parts import own_name
from ebc_lab.config.schema import Config
from ebc_lab.config.study_checks import validate

TEXT = "def made(params, lr):\n    return 1\n"
CUSTOM = ["optimizer=custom", "optimizer.target=own_parts:made"]
MODEL = ["model=custom", "model.target=own_parts:made"]
GRID = "lr_sweep.grids.custom=[1e-3,2e-3]"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_parts.py").write_text(TEXT)
    return tmp_path


def package(folder, name, **entry_points):
    """Leave in a folder what pip leaves of an installed package that offers parts: group -> its lines."""
    about = folder / f"{name}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [f"[ebc_lab.{group}]\n{entries}\n" for group, entries in entry_points.items()]
    (about / "entry_points.txt").write_text("".join(lines))


@pytest.fixture
def installed(folder, monkeypatch):
    """Two packages; their names are forgotten afterwards."""
    site = folder / "site"
    site.mkdir()
    (site / "tiny_parts.py").write_text(TEXT)
    offers = "\n".join(f"{name} = tiny_parts:made" for name in ("tiny", "adam", "both"))
    package(site, "tiny_parts", optimizers=offers)
    package(site, "other_parts", optimizers="both = own_parts:made", stabilizers="calm = tiny_parts:made")
    monkeypatch.syspath_prepend(site)
    for cached in (offered, register_schema):
        cached.cache_clear()
    yield site
    for cached in (offered, register_schema):
        cached.cache_clear()


def composed(*overrides):
    """A run, resolved as far as its identity needs."""
    config = compose(["scale=smoke", "device=cpu", *overrides], study=False)
    return replace(config, data=replace(config.data, sha256="0" * 64))


def name_of(*overrides):
    return digest(identity(composed(*overrides)))


@pytest.mark.thorough
def test_a_target_its_arguments_and_its_file_name_a_run(folder):
    (folder / "own_others.py").write_text(TEXT)
    base = name_of(*CUSTOM)
    assert name_of("optimizer=custom", "optimizer.target=own_parts.made") == base
    assert name_of(*CUSTOM, "optimizer.name=labelled") == base
    others = {
        name_of(*CUSTOM, "optimizer.arguments={a: 1}"),
        name_of(*CUSTOM, "optimizer.arguments.a=[1,{b: c}]"),
        name_of("optimizer=custom", "optimizer.target=own_others:made"),
        name_of(*CUSTOM, "stabilizer=custom", "stabilizer.target=own_parts:made"),
        name_of(*CUSTOM, "stabilizer=custom", "stabilizer.target=own_parts:made", "stabilizer.strength=2"),
        name_of(*CUSTOM, "lr_schedule=custom", "lr_schedule.target=own_parts:made"),
        name_of(*CUSTOM, *MODEL),
        name_of(*CUSTOM, *MODEL, "model.context=16"),
    }
    (folder / "own_parts.py").write_text(TEXT + "# edited\n")
    others.add(name_of(*CUSTOM))
    assert len({base, *others}) == 10


@pytest.mark.thorough
def test_settings_that_an_own_part_is_not_given_do_not_name_a_run(folder):
    sizes = identity(composed(*MODEL))["model"]
    assert set(sizes) == {"name", "context", "target", "arguments", "sha256"}
    stabilizer = ["stabilizer=custom", "stabilizer.target=own_parts:made"]
    assert name_of(*stabilizer) == name_of(*stabilizer, "budget.target_kl=0.5", "controller=pi")
    assert set(identity(composed())["optimizer"]) & {"target", "arguments", "sha256"} == set()
    whole = [*MODEL, *CUSTOM]
    schedule = ["lr_schedule=custom", "lr_schedule.target=own_parts:made"]
    assert "made_none_ebc_" in run_id("train", composed(*whole))
    assert "_made_made_n60" in run_id("train", composed(*whole, *schedule))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optimizer=custom"], "optimizer=custom needs optimizer.target=module:function"),
        (["optimizer=custom", "optimizer.target=own_part:made"], r"no module own_part \(did you mean"),
        (["optimizer=custom", "optimizer.target=own_parts:maed"], r"no maed \(did you mean made"),
        (["optimizer.target=own_parts:made"], "optimizer.target goes with optimizer=custom, not optimizer=a"),
        (["optimizer.arguments={a: 1}"], "optimizer.arguments goes with optimizer=custom"),
        ([*CUSTOM, "optimizer.arguments={a: [inf]}"], "optimizer.arguments takes finite numbers, not inf"),
        ([*CUSTOM, "optimizer.name='a b'"], "must be letters, digits and _"),
        ([*CUSTOM, "optimizer.sha256=abc"], "optimizer.sha256=abc is not the checksum of .*own_parts.py"),
        ([*CUSTOM, "determinism=verity"], "does not go with optimizer=made"),
        (["lr_schedule=custom", "lr_schedule.target=own_parts:made", "lr_schedule.source=x"], "goes with"),
    ],
)
def test_mistakes_are_refused_before_anything_is_imported(folder, overrides, words):
    with pytest.raises(UserError, match=words):
        composed(*overrides)


def test_a_study_sweeps_one_own_optimizer_and_keeps_its_file(folder):
    config = compose(["scale=smoke", *CUSTOM, GRID])
    assert config.lr_sweep.optimizers == ["made"]
    assert config.lr_sweep.grids["made"] == [1e-3, 2e-3]
    assert compose(["scale=smoke", *CUSTOM, "lr_sweep.grids.made=[1e-3,2e-3]"]) == config
    both = compose(["scale=smoke", *CUSTOM, GRID, "lr_sweep.optimizers=[adam,custom]"])
    assert both.optimizer.sha256 == config.optimizer.sha256
    assert both.lr_sweep.optimizers == ["adam", "made"]
    with pytest.raises(UserError, match=r"lr_sweep\.grids\.made lacks the learning rates"):
        compose(["scale=smoke", *CUSTOM])
    with pytest.raises(UserError, match="give optimizer=custom as well"):
        compose(["scale=smoke", GRID, "lr_sweep.optimizers=[adam,custom]"])
    with pytest.raises(UserError, match="cannot be chosen for a study"):
        compose(["scale=smoke", "stabilizer=custom", "stabilizer.target=own_parts:made"])


def test_arms_keep_their_files_too(folder):
    def suite(arm):
        return compose(["scale=smoke", "study=target_kl", f"+ablation.arms.own={{{arm}}}"])

    arm = suite("settings: {stabilizer: {name: mine, target: own_parts.made, strength: 1}}")
    kept = arm.ablation.arms["own"].settings["stabilizer"]
    assert (kept["target"], len(kept["sha256"])) == ("own_parts:made", 64)
    with pytest.raises(UserError, match="width_scale goes with model=gpt"):
        suite("width_scale: 2, settings: {model: {name: mine, target: own_parts:made}}")
    with pytest.raises(UserError, match=r"^ablation.arms.own: stabilizer.target=own_parts:gone: there is no"):
        suite("settings: {stabilizer: {name: x, target: own_parts:gone}}")


def test_what_an_installed_package_offers_is_custom_by_a_name(installed):
    run = composed("optimizer=tiny", "stabilizer=calm")
    assert (run.optimizer.name, run.optimizer.target) == ("tiny", "tiny_parts:made")
    custom = ["optimizer=custom", "optimizer.target=tiny_parts:made"]
    assert name_of("optimizer=tiny") == name_of(*custom)
    assert run_id("train", composed("optimizer=tiny")).startswith("tiny_none_ebc")
    with pytest.raises(UserError, match=r"optimizer=tin is unknown \(did you mean tiny\?\).* both or tiny"):
        composed("optimizer=tin")
    assert composed("optimizer=adam").optimizer.target is None  # ebc-lab's own stays
    with pytest.raises(UserError, match="both is what installed packages call own_parts:made or tiny_parts"):
        composed("optimizer=both")


def test_a_study_with_an_offered_part_is_read_where_the_package_is_not(installed, monkeypatch):
    config = compose(["scale=smoke", "optimizer=tiny", "lr_sweep.grids.tiny=[1e-3,2e-3]"])
    assert config.lr_sweep.optimizers == ["tiny"]
    with pytest.raises(UserError, match="give optimizer=tiny as well"):
        compose(["scale=smoke", "lr_sweep.optimizers=[tiny]", "lr_sweep.grids.tiny=[1e-3,2e-3]"])
    monkeypatch.undo()
    offered.cache_clear()
    read = from_dict(Config, to_dict(config))
    validate(read, study=True, here=False)
    assert read == config
    with pytest.raises(UserError, match="optimizer=tiny is unknown"):
        composed("optimizer=tiny")


def test_a_part_is_called_after_its_function():
    targets = (
        "./my_opt.py:Cautious",
        "my_opt:MyAdamW2",
        "lib.inner.SGDClip",
        "m:Kind.made",
        "m:_hidden",
        "m:名",
    )
    names = ["cautious", "my_adam_w2", "sgd_clip", "made", "hidden", "own"]
    assert [own_name(target) for target in targets] == names
