"""What own parts are called."""

import pytest

from ebc_lab.config.own.parts import own_name


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("./my_opt.py:Cautious", "cautious"),
        ("my_opt:MyAdamW2", "my_adam_w2"),
        ("lib.inner.SGDClip", "sgd_clip"),
        ("m:Kind.made", "made"),
        ("m:_hidden", "hidden"),
        ("m:Größe", "groe"),
        ("m:名", "own"),
    ],
)
def test_a_part_is_called_after_its_function(target, name):
    assert own_name(target) == name


def test_a_name_that_means_something_else_is_numbered():
    assert own_name("m:adam", ["adam", "adam_2"]) == "adam_3"
