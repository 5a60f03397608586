"""A model behind HTTP: a real server on a free port, asked as a client would."""

import copy
import http.client
import json
import math
import sys
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

from ebc_lab.config.errors import UserError
from ebc_lab.ebm.apps import serve
from ebc_lab.ebm.apps.writer import MOST_STEPS, MOST_TOKENS, SEEDS, Writer, Writing


@contextmanager
def running(app):
    """The address of a server that answers until the end of the block."""
    made = serve.server_of(app)
    with serve.listening() as place:
        thread = threading.Thread(target=made.run, kwargs={"sockets": [place]})
        thread.start()
        try:
            yield serve.address_of(place)  # it listens already: who asks waits until it answers
        finally:
            made.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def address(model, letters, context):
    with running(serve.app_of(model, letters, context=context, refused=(UserError,))) as address:
        yield address


def ask(address, path, body=None, headers=None):
    """(status, answer); a body that is no text is sent as JSON."""
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    request = urllib.request.Request(address + path, data, headers or {})
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        content = error.read()
        return error.code, json.loads(content) if content.startswith(b"{") else content.decode()


def test_health_tells_the_sizes(address, context):
    known = {"vocabulary": 29, "n": 8, "context": context, "splats": 12}
    assert ask(address, "/health") == (200, {"status": "ok", **known})


@pytest.mark.thorough
def test_generate_answers_what_the_library_writes_and_the_same_for_the_same_seed(
    address, model, letters, context
):
    body = {"prompt": "the cat", "tokens": 30, "temperature": 1, "langevin_steps": 3, "seed": 4}
    status, answer = ask(address, "/generate", body)
    assert status == 200
    writer = Writer(model, letters, context)
    assert answer["text"] == writer.continued("the cat", Writing(30, 1.0, langevin_steps=3, seed=4))
    assert len(answer["text"]) == 30
    assert (answer["seed"], answer["top_k"]) == (4, 0)
    assert ask(address, "/generate", body)[1] == answer
    assert ask(address, "/generate", body | {"seed": 5})[1]["text"] != answer["text"]


def test_energy_and_states_of_each_token_in_windows_of_the_context(address, model, letters, context):
    text = "the cat sat on a mat"  # two windows and a half
    ids = torch.tensor(letters.encode(text))
    states, contexts = [], []
    for start in range(0, len(ids), context):
        found = model.encode(ids[None, start : start + context])
        states += found[0]
        contexts += found[1]
    states, contexts = torch.stack(states), torch.stack(contexts)
    status, answer = ask(address, "/embed", {"text": text})
    assert (status, answer["tokens"], answer["n"]) == (200, len(text), 8)
    torch.testing.assert_close(torch.tensor(answer["states"]), states.detach())
    status, answer = ask(address, "/energy", {"text": text})
    assert status == 200
    torch.testing.assert_close(torch.tensor(answer["energy"]), model.energy(states, contexts).detach())
    assert answer["mean"] == pytest.approx(sum(answer["energy"]) / len(text))
    assert len(answer["splats"]) == len(text)


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/generate", b"{", "must be a JSON object"),
        ("/generate", b"[" * 100_000, "must be a JSON object"),
        ("/generate", ["a"], "must be a JSON object"),
        ("/generate", {}, "lacks prompt"),
        ("/generate", {"prompt": 3}, "prompt must be a text"),
        ("/generate", {"prompt": ""}, "one token at least"),
        ("/generate", {"prompt": "It"}, "the vocabulary has no 'I'"),
        ("/generate", {"prompt": "\ud800"}, r"the vocabulary has no '\ud800'"),
        ("/generate", {"prompt": "a", "tokens": 10**9}, "tokens must lie between 0 and 4096"),
        ("/generate", b'{"prompt": "a", "temperature": NaN}', "temperature must lie between"),
        ("/generate", {"prompt": "a", "temperature": "warm"}, "temperature must be a number"),
        ("/generate", {"prompt": "a", "seed": 2**63}, "seed must lie between"),
        ("/generate", {"prompt": "a", "model": "b"}, "'model' is unknown"),
        ("/energy", {"text": ""}, "1 to 4096 tokens"),
        ("/embed", {"text": "a" * 4097}, "1 to 4096 tokens, not 4097"),
        ("/embed", {"prompt": "a"}, "'prompt' is unknown"),
    ],
)
def test_a_bad_request_is_400_with_one_sentence(address, path, body, words):
    status, answer = ask(address, path, body)
    assert status == 400
    assert words in answer["error"]
    assert len(answer["error"]) < 200
    assert "\n" not in answer["error"]


def test_a_request_of_10_mb_is_refused_with_a_sentence_however_it_is_sent(address):
    body = b'{"prompt": "' + b"a" * 10_000_000 + b'"}'
    status, answer = ask(address, "/generate", body)
    assert status == 413
    assert "1048576 bytes" in answer["error"]
    connection = http.client.HTTPConnection(address.removeprefix("http://"))
    parts = (body[at : at + 65536] for at in range(0, len(body), 65536))
    connection.request("POST", "/generate", parts, encode_chunked=True)  # no length told in advance
    assert connection.getresponse().status == 413
    connection.close()
    lead = b'{"text": "a"'
    body = lead + b" " * (serve.MOST_BYTES - len(lead) - 1) + b"}"  # exactly the limit
    assert ask(address, "/energy", body)[0] == 200
    assert ask(address, "/energy", body + b" ")[0] == 413


def test_other_addresses_methods_and_hosts_are_refused(address):
    assert ask(address, "/nothing") == (404, {"error": "Not Found"})
    assert ask(address, "/generate") == (405, {"error": "Method Not Allowed"})
    assert ask(address, "/health", headers={"Host": "evil.example"})[0] == 400


def test_one_request_at_a_time_reaches_the_model(model, letters, context):
    """Two that were inside at once would meet at the barrier; none does, and each waits in vain."""
    meeting = threading.Barrier(2)

    class Slow:
        met = 0

        def encode(self, text):
            try:
                meeting.wait(timeout=0.2)
                Slow.met += 1
            except threading.BrokenBarrierError:
                meeting.reset()
            return letters.encode(text)

        decode = letters.decode

    with running(serve.app_of(model, Slow(), context=context)) as address, ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda text: ask(address, "/energy", {"text": text}), ["a", "b", "c"]))
    assert [status for status, _ in answers] == [200] * 3
    assert Slow.met == 0


def test_a_model_whose_energy_is_not_finite_says_so(model, letters, context):
    model = copy.deepcopy(model)
    model.pair_weight.data.fill_(float("nan"))
    with running(serve.app_of(model, letters, context=context)) as address:
        status, answer = ask(address, "/energy", {"text": "a"})
    assert status == 400
    assert "not finite" in answer["error"]


def test_a_port_in_use_or_out_of_range_is_named():
    with serve.listening() as taken:
        port = taken.getsockname()[1]
        assert taken.getsockname()[0] == "127.0.0.1"
        with pytest.raises(ValueError, match=f"port {port} is in use"):
            serve.listening(port)
    for port in (-1, 65536):
        with pytest.raises(ValueError, match="is no port"):
            serve.listening(port)


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "ebc_lab.ebm.apps.serve")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ImportError, match=r"pip install 'ebc-lab\[serve\]'"):
        from ebc_lab.ebm.apps.serve import app_of  # noqa: F401


LIMITS = {
    "tokens": (0, MOST_TOKENS),
    "top_k": (0, SEEDS),
    "langevin_steps": (0, MOST_STEPS),
    "seed": (0, SEEDS - 1),
    "temperature": (0, 1e6),
    "langevin_temperature": (0.0, 1e6),
}


@pytest.mark.parametrize("name", LIMITS)
def test_a_limit_itself_can_be_asked_for_and_nothing_beyond(name):
    low, high = LIMITS[name]
    for value in (low, high):
        assert getattr(Writing(**{name: value}), name) == value
    for value in (low - 1, high + 1, math.nan):
        kinds = "whole number|between" if value != value else f"{name} must lie between 0 and "
        with pytest.raises(ValueError, match=kinds):
            Writing(**{name: value})
    for value in (True, "1", None):
        with pytest.raises(ValueError, match=f"{name} must be a "):
            Writing(**{name: value})
