"""Formats whose library is not installed: the error names the extra that brings it."""

import sys

import pytest

from ebc_lab.config.errors import UserError
from ebc_lab.judging.asked import Asked
from ebc_lab.judging.readers import optuna_storage, tensorboard_events, wandb_offline

JOURNAL = b'{"op_code":0,"worker_id":"w","study_name":"sgd","directions":[1]}\n'


@pytest.mark.parametrize(
    ("reader", "name", "content", "extra"),
    [
        (wandb_offline, "run-x.wandb", b":W&B\xe1\xbe\x00", "wandb"),
        (tensorboard_events, "events.out.tfevents.1.host", b"", "tensorboard"),
        (optuna_storage, "journal.log", JOURNAL, "optuna"),
    ],
)
def test_the_extra_is_named(reader, name, content, extra, tmp_path, monkeypatch):
    (tmp_path / name).write_bytes(content)
    for loaded in list(sys.modules):
        if loaded.partition(".")[0] == extra:
            monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, extra, None)
    assert reader.claims(tmp_path)
    with pytest.raises(UserError, match=rf"pip install 'ebc-lab\[{extra}\]'"):
        reader.read(tmp_path, Asked())
