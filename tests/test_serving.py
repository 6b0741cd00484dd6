"""The server: what the openai client, two hundred of them, a browser, and somebody hostile get from it."""

from __future__ import annotations

import asyncio
import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.commands import serve as command
from runtime.answers import answer
from runtime.errors import BadArtifactError
from runtime.text import TextArtifact, open_text_artifact
from runtime.tokenizer import encode
from serving import app as routes
from serving.requests import Request, RequestError, read
from serving.turns import GoneError, Job, Turns
from serving.writing import Done, Ended, Piece, Served
from tests.browser import chromium
from tests.checkpoints import ROOT

PUZZLE = "1003\n0300\n3210\n4132"
SOLVED = "1423\n2341\n3214\n4132"
PUZZLES = [json.loads(line)["prompt"] for line in (ROOT / "assets/tasks/sudoku.jsonl").read_text().splitlines()[:200]]
JSON = {"Content-Type": "application/json"}
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
KEYS = ["prompt", "messages", "n", "stop", "stream", "role", "content", "type", "text", "seed", "cache"]


@contextmanager
def served(artifact: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """(its address, the process) of the command."""
    asked = [sys.executable, "-m", "pipeline", "serve", f"artifact={artifact}", "port=0", "threads=1", *options]
    process = subprocess.Popen(asked, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        assert "http://" in line, line + process.stderr.read()
        yield line.split("http://")[1].split("/")[0], process
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
        process.stderr.close()


@pytest.fixture(scope="module")
def address(sudoku: Path) -> Iterator[str]:
    with served(sudoku, "threshold=0.9") as (address, _):
        yield address


@pytest.fixture(scope="module")
def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://{address}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def artifact(sudoku: Path) -> TextArtifact:
    return open_text_artifact(sudoku)


def alone(artifact: TextArtifact, prompt: str, n_new: int = 19, **options: Any) -> str:
    options = {"threshold": 0.9, "stop_at_eos": True} | options
    return answer(artifact, encode(artifact.tokenizer, prompt), n_new, options).text


def test_the_openai_client_completes_and_talks(client: openai.OpenAI, sudoku: Path) -> None:
    name = sudoku.name
    assert [model.id for model in client.models.list()] == [client.models.retrieve(name).id] == [name]
    done = client.completions.create(model=name, prompt=PUZZLE, max_tokens=19)
    assert (done.choices[0].text, done.choices[0].finish_reason) == (SOLVED, "length")
    assert done.usage is not None
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (19, 19)
    message: Any = {
        "role": "user",
        "content": [{"type": "text", "text": PUZZLE[:5]}, {"type": "text", "text": PUZZLE[5:]}],
    }
    said = client.chat.completions.create(model=name, messages=[message], max_tokens=19, logprobs=True)
    assert said.choices[0].message.content == SOLVED
    assert said.choices[0].logprobs is not None
    kept = said.choices[0].logprobs.content
    assert kept is not None
    assert "".join(token.token for token in kept) == SOLVED
    assert all(-0.2 < token.logprob <= 0 for token in kept)
    cut = client.completions.create(model=name, prompt=PUZZLE, max_tokens=19, stop=["\n3", "zz"], logprobs=0)
    assert (cut.choices[0].text, cut.choices[0].finish_reason) == ("1423\n2341", "stop")


def test_a_stream_comes_in_blocks_and_is_the_whole(client: openai.OpenAI, sudoku: Path) -> None:
    messages: Any = [{"role": "user", "content": PUZZLE}]
    more: Any = {"stream_options": {"include_usage": True}, "extra_body": {"block_length": 5}}
    chunks = list(
        client.chat.completions.create(model=sudoku.name, messages=messages, max_tokens=19, stream=True, **more)
    )
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert "".join(pieces) == SOLVED
    assert len(pieces) >= 4, "a piece a block"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 19
    stop: Any = {"stop": ["41\n3"], "extra_body": {"block_length": 1, "threshold": None}}
    cut = client.completions.create(model=sudoku.name, prompt=PUZZLE, max_tokens=19, stream=True, **stop)
    assert "".join(chunk.choices[0].text for chunk in cut) == "1423\n23", "nothing of a stop was said"


def test_seeds_and_several_answers(client: openai.OpenAI, sudoku: Path, artifact: TextArtifact) -> None:
    empty = "0000\n0000\n0010\n4132"
    drawn: dict[str, Any] = {"model": sudoku.name, "prompt": empty, "max_tokens": 19, "temperature": 1.0, "seed": 5}
    several = client.completions.create(**drawn, n=3, extra_body={"steps": 4, "threshold": 1.0})
    texts = [choice.text for choice in several.choices]
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert texts == [alone(artifact, empty, temperature=1.0, seed=5 + i, threshold=1.0, steps=4) for i in range(3)]
    best = client.completions.create(**drawn, best_of=6, extra_body={"steps": 4, "threshold": 1.0})
    assert len(best.choices) == 1
    two = client.completions.create(model=sudoku.name, prompt=[PUZZLE, empty], max_tokens=19)
    assert [choice.text for choice in two.choices] == [SOLVED, alone(artifact, empty)]


def test_a_rule_of_a_request_takes_the_place_of_the_servers(client: openai.OpenAI, sudoku: Path) -> None:
    rule = {"gamma": 2.0, "cache": "dual", "block_length": 8}
    done = client.completions.create(model=sudoku.name, prompt=PUZZLE, max_tokens=19, extra_body=rule)
    assert done.choices[0].text.count("\n") == 3


def test_two_hundred_at_once_are_each_answered_as_alone(address: str, sudoku: Path, artifact: TextArtifact) -> None:
    async def all_of_them() -> list[str]:
        client = openai.AsyncOpenAI(base_url=f"http://{address}/v1", api_key="none", max_retries=0, timeout=300)
        asked = [client.completions.create(model=sudoku.name, prompt=p, max_tokens=19) for p in PUZZLES]
        return [done.choices[0].text for done in await asyncio.gather(*asked)]

    assert asyncio.run(all_of_them()) == [alone(artifact, prompt) for prompt in PUZZLES]


def test_what_is_wrong_is_said(client: openai.OpenAI, sudoku: Path) -> None:
    wrong: list[tuple[dict[str, Any], type[openai.APIStatusError], str]] = [
        ({"model": "gpt-4"}, openai.NotFoundError, "there is no model 'gpt-4'"),
        ({"max_tokens": 10**6}, openai.BadRequestError, "at most 256"),
        ({"max_tokens": 250}, openai.BadRequestError, "more than the 256 that fit"),
        ({"prompt": ""}, openai.BadRequestError, "a prompt is empty"),
        ({"prompt": [9999]}, openai.BadRequestError, "outside the vocabulary"),
        ({"temperature": -1}, openai.BadRequestError, "temperature -1"),
        ({"presence_penalty": 0.5}, openai.BadRequestError, "presence_penalty is not supported"),
        ({"best_of": 4}, openai.BadRequestError, "would be the same"),
        ({"extra_body": {"treshold": 1}}, openai.BadRequestError, "there is no 'treshold'"),
        ({"extra_body": {"cache": ["dual"]}}, openai.BadRequestError, "cache"),
    ]
    for changed, kind, said in wrong:
        asked: dict[str, Any] = {"model": sudoku.name, "prompt": PUZZLE, "max_tokens": 4} | changed
        with pytest.raises(openai.APIStatusError, match=said) as raised:
            client.completions.create(**asked)
        assert type(raised.value) is kind, changed


def test_a_page_shows_the_masks_being_filled_in(address: str, tmp_path: Path) -> None:
    with chromium(tmp_path / "profile") as browser:
        browser.open(f"http://{address}/")
        seen = (
            "new MutationObserver(() => seen.push(at('canvas').textContent)).observe(at('canvas'), {childList: true})"
        )
        browser.value(f"globalThis.seen = []; {seen}; 1")
        browser.value(f"at('prompt').value = {json.dumps(PUZZLE)}; at('most').value = 19; at('threshold').value = 1; 1")
        browser.value("at('go').click(); 1")
        for _ in range(300):
            if browser.value("at('said').textContent").startswith("19 tokens in"):
                break
            time.sleep(0.1)
        assert browser.value("at('canvas').textContent") == SOLVED
        shown = browser.value("seen")
        assert [text.count("░") for text in shown] == sorted((text.count("░") for text in shown), reverse=True)
        assert len({text.count("░") for text in shown}) > 10
        assert browser.complaints() == []
        browser.value("at('most').value = 4000; at('go').click(); 1")
        for _ in range(300):
            if browser.value("at('said').textContent").startswith("error:"):
                break
            time.sleep(0.1)
        assert "at most 256" in browser.value("at('said').textContent")


# ---- Somebody hostile ----


def asked(address: str, body: bytes | str, path: str = "/v1/completions", **headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(address, timeout=60)
    connection.request("POST", path, body, JSON | {name.replace("_", "-"): value for name, value in headers.items()})
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response.status, json.loads(content) if content.startswith(b"{") else content


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("", 400), ("{", 400), ("[]", 400), ("null", 400), ("[" * 100_000, 400), ('{"prompt": ' + "[" * 50_000, 400),
        ('{"prompt": NaN}', 400), ('{"prompt": 1e400}', 400), (b"\xff\xfe", 400), ('{"prompt": "\\ud800"}', 400),
        ('{"prompt": "x", "temperature": 1' + "0" * 5000 + "}", 400), ('{"prompt": "x", "seed": 1e30}', 400),
        ('{"prompt": "x", "n": 1000}', 400), ('{"prompt": ["x", 1]}', 400), ('{"prompt": {"a": 1}}', 400),
        ('{"prompt": "x", "stream": 1}', 400), ('{"prompt": "x", "stream_options": []}', 400),
        ('{"prompt": "x", "stop": [""]}', 400), ('{"prompt": "x", "max_tokens": true}', 400),
        ('{"prompt": "' + "1" * 2**21 + '"}', 413), ('{"prompt": "x", "model": {}}', 404),
    ],
    ids=lambda value: str(value)[:24],
)  # fmt: skip
def test_a_hostile_body_is_refused(address: str, body: bytes | str, status: int) -> None:
    found, content = asked(address, body)
    assert found == status
    assert content["error"]["message"]


def test_hostile_calls_are_refused(address: str) -> None:
    good = json.dumps({"prompt": PUZZLE, "max_tokens": 19})
    assert asked(address, good)[0] == 200
    assert asked(address, good, Content_Type="text/plain")[0] == 415, "which a page of somebody else's may send"
    assert asked(address, good, Host="evil.example")[0] == 400, "a name that leads here"
    assert asked(address, "", Content_Length=str(10**15))[0] == 413
    assert asked(address, good, path="/v1/nothing")[0] == 404
    assert asked(address, good, path="/health")[0] == 405
    assert asked(address, '{"messages": [{"role": "user"}]}', path="/v1/chat/completions")[0] == 400


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=8,
)


@given(ANY, st.booleans())
@settings(max_examples=300, deadline=None)
def test_any_json_is_a_request_or_refused(content: Any, is_chat: bool) -> None:
    message = {"messages": [{"role": "user", "content": "x"}]}
    for body in (content, message | (content if isinstance(content, dict) else {})):
        status = 200
        try:
            assert isinstance(read(json.dumps(body).encode(), is_chat, "model"), Request)
        except RequestError as error:
            status = error.status
        assert 200 <= status < 500


# ---- Turns, with a model that is told when to go on ----


class Model:
    """In place of writing: a step ends when it is let go on."""

    def __init__(
        self, sudoku: TextArtifact, monkeypatch: pytest.MonkeyPatch, most: int = 2, seconds: float = 60
    ) -> None:
        self.go, self.begun, self.ended = threading.Semaphore(0), list[Any](), list[str]()
        monkeypatch.setattr(routes, "write", self.write)
        self.turns = Turns(most)
        served = Served("model", sudoku, {}, 64)
        app = routes.application(served, self.turns, seconds, ["127.0.0.1"])
        listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{listening.getsockname()[1]}"
        self.server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off", ws="none"))
        self.thread = threading.Thread(target=self.server.run, args=([listening],), daemon=True)
        self.thread.start()

    def write(self, served: Served, request: Request, job: Job) -> None:
        (prompt,) = request.prompts
        self.begun.append(prompt)
        job.say(Piece(0, "well, "))
        try:
            while not self.go.acquire(timeout=0.01):
                job.check()
            if prompt == "broken":
                raise BadArtifactError("the program failed")
            if prompt == "odd":
                raise KeyError("what")
        except GoneError:
            self.ended.append(f"{prompt} is gone")
            raise
        job.say(Ended(0, f"{prompt}!", "stop", None))
        job.say(Done(1, 1))
        self.ended.append(str(prompt))

    def ask(self, prompt: str, **more: Any) -> socket.socket:
        """A request that is not waited for."""
        body = json.dumps({"prompt": prompt} | more).encode()
        connection = socket.create_connection(("127.0.0.1", int(self.address.split(":")[1])), timeout=60)
        connection.sendall(HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        return connection

    def end(self) -> None:
        self.turns.close()
        self.server.should_exit = self.server.force_exit = True
        self.thread.join(timeout=60)


def until(holds: Callable[[], bool]) -> None:
    for _ in range(3000):
        if holds():
            return
        time.sleep(0.01)
    raise AssertionError("it never came to that")


@pytest.fixture
def model(artifact: TextArtifact, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Model]]:
    made: list[Model] = []

    def make(**options: Any) -> Model:
        made.append(Model(artifact, monkeypatch, **options))
        return made[-1]

    yield make
    for one in made:
        one.end()


@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_frees_the_place(model: Callable[..., Model], stream: bool) -> None:
    one = model()
    first = one.ask("first", stream=stream)
    until(lambda: one.begun == ["first"])
    second = one.ask("second", stream=stream)
    until(lambda: one.turns.n_waiting == 1)
    third = one.ask("third", stream=stream)
    until(lambda: one.turns.n_waiting == 2)
    second.close()
    until(lambda: one.turns.n_waiting == 1)
    first.close()
    until(lambda: len(one.ended) == 1 and len(one.begun) == 2)
    assert one.ended == ["first is gone"]
    assert one.begun[1] == "third"
    one.go.release()
    said = b""
    while (b'"stop"' if stream else b"third!") not in said:
        said += third.recv(2**16)


def test_no_more_wait_than_may_and_an_error_is_its_own(model: Callable[..., Model]) -> None:
    one = model()
    first = one.ask("first")
    until(lambda: one.begun == ["first"])
    others = [one.ask("broken"), one.ask("odd")]
    until(lambda: one.turns.n_waiting == 2)
    status, content = asked(one.address, '{"prompt": "one too many"}')
    assert (status, content["error"]["type"]) == (429, "invalid_request_error")
    for _ in range(3):
        one.go.release()
    assert b"200 OK" in first.recv(2**16)
    assert [b"500 Internal" in other.recv(2**16) for other in others] == [True, True]
    one.go.release()
    assert asked(one.address, '{"prompt": "fourth"}')[0] == 200


def test_a_request_has_so_much_time(model: Callable[..., Model]) -> None:
    one = model(seconds=0.3)
    waits = one.ask("first")
    status, content = asked(one.address, '{"prompt": "second"}')
    assert status == 408
    assert "time that a request may take" in content["error"]["message"]
    assert b"408" in waits.recv(2**16)


def test_a_body_has_so_much_time(model: Callable[..., Model], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "BODY_SECONDS", 0.2)
    one = model()
    endless = socket.create_connection(("127.0.0.1", int(one.address.split(":")[1])), timeout=60)
    endless.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n")
    assert b"408" in endless.recv(2**16)


def test_it_ends_well(sudoku: Path) -> None:
    """The answer that is being written comes; who waits is told."""
    with served(sudoku, "max_queue=8") as (address, process):
        long = json.dumps({"prompt": PUZZLE[:4], "max_tokens": 250, "eos_penalty": 50.0, "stream": True})
        found: list[tuple[int, Any]] = []
        threads = [threading.Thread(target=lambda: found.append(asked(address, long))) for _ in range(2)]
        for thread in threads:
            thread.start()

        def waiting() -> int:
            connection = http.client.HTTPConnection(address, timeout=60)
            connection.request("GET", "/health")
            return int(json.loads(connection.getresponse().read())["waiting"])

        until(lambda: waiting() == 1)
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(timeout=120)
    assert sorted(status for status, _ in found) == [200, 503]
    (whole,) = [content for status, content in found if status == 200]
    assert whole.endswith(b"data: [DONE]\n\n")


def test_what_cannot_be_served(
    pipeline: Callable[..., tuple[int, str, str]], sudoku: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    wrong = {
        "port=70000": "port 70000", "max_queue=0": "max_queue 0", "timeout=-1": "timeout -1",
        "max_new_tokens=0": "max_new_tokens 0",
        "host=no.such.host.invalid": "cannot listen there", f"port={address.split(':')[1]}": "cannot listen there",
    }  # fmt: skip
    for option, said in wrong.items():
        code, out, err = pipeline("serve", f"artifact={sudoku}", option)
        assert (code, out) == (2, ""), option
        assert said in err
    assert pipeline("serve", "artifact=/nowhere", "port=0")[0] == 6
    monkeypatch.setattr(command, "find_spec", lambda _: None)
    code, _, err = pipeline("serve", f"artifact={sudoku}")
    assert code == 2
    assert "pip install 'dreamedge[serve]'" in err
