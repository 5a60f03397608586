"""What a shell is offered behind <TAB>."""

import pytest
from support.called import called

from ebc_lab.cli import completion


@pytest.mark.parametrize(
    ("word", "offered"),
    [
        ("optimizer=ad", {"optimizer=adam", "optimizer=adamw"}),
        ("optimizer=adam,mu", {"optimizer=adam,muon"}),
        ("opti", {"optimizer=muon", "optimizer.lr="}),
        ("lr_sweep.optimizers=[adam,mu", {"lr_sweep.optimizers=[adam,muon"}),
        ("study=mem", {"study=memory"}),
        ("dtype=b", {"dtype=bfloat16"}),
        ("budget.target", {"budget.target_kl="}),
        ("", {"scale=", "stabilizer=", "seeds="}),
    ],
)
def test_settings_and_their_values_are_offered(word, offered):
    found = completion.overrides(word)
    assert offered <= set(found)
    assert all(value.startswith(word) for value in found)
    assert len(found) == len(set(found))


def test_what_is_unknown_or_a_number_offers_nothing():
    assert [completion.overrides(word) for word in ("optimizer.lr=", "nothing=", "nothi")] == [[], [], []]


@pytest.mark.parametrize(
    ("words", "at", "offered"),
    [
        ("ebc-lab train optimizer = muo", 4, ["muon", "muonclip"]),
        ("ebc-lab train optimizer =", 3, completion.values("optimizer")),
    ],
)
def test_bash_which_breaks_words_at_the_sign_is_offered_values_alone(words, at, offered, monkeypatch):
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(at))
    assert completion.overrides(words.split()[at]) == offered


def test_a_shell_gets_commands_settings_and_studies(tmp_path):
    def offered(line):
        """What bash would be offered for the last word of this line."""
        asked = {"_EBC_LAB_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
        return called(cwd=tmp_path, **asked).stdout.split()

    for name in ("mine", "s_d", "s_b", "s_a", "s_e", "s_c"):
        (tmp_path / "outputs/ebc_ablation" / name).mkdir(parents=True)
        (tmp_path / "outputs/ebc_ablation" / name / "study.json").write_text("{}")
    for name in ("s_9.zip", "s_7.zip", "s_8.zip", "s_6.zip", "s_5.zip"):
        (tmp_path / name).write_text("")
    assert offered("ebc-lab auto") == ["autopilot"]
    assert offered("ebc-lab train -m stabilizer=no") == ["stabilizer=none", "stabilizer=norm_clip"]
    assert offered("ebc-lab status mi") == ["mine"]
    assert offered("ebc-lab status s_") == [
        *(f"s_{x}" for x in "abcde"),
        *(f"s_{n}.zip" for n in range(5, 10)),
    ]
    assert offered("ebc-lab why mine lr_sw") == ["lr_sweep"]
