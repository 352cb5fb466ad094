"""The judge reward, with a scripted HTTP server as the judge."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from turnfast.config.schema import RewardConfig
from turnfast.envs import Outcome, PlayedTurn, RewardFault, Scorer, Step, Task
from turnfast.envs.rewards.builtin import load_rewards
from turnfast.envs.rewards.judge_client import Endpoint, JudgeClient, JudgeError
from turnfast.errors import ConfigError

TASK = Task(id="q", question="Who wrote Ulm?", answers=("Ida", "I. Berg"))
TURNS = (
    PlayedTurn(text="<tool>x</tool>", messages=({"role": "user", "content": "Ulm {answers}"},)),
    PlayedTurn(text="<answer>Ida</answer>"),
)


def completion(text: str, status: int = 200, **headers: str):
    body = json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})
    return status, {"content-type": "application/json", **headers}, body.encode()


class Server:
    """Replies to request n with `reply(n, body)`: (status, headers, body), or None to hang."""

    def __init__(self, reply: Callable) -> None:
        server = self
        self.bodies: list[dict] = []
        self.headers: list[dict] = []
        self.num_open = self.max_open = 0
        self.release = threading.Event()
        lock = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with lock:
                    number = len(server.bodies)
                    server.bodies.append(body)
                    server.headers.append({k.lower(): v for k, v in self.headers.items()})
                    server.num_open += 1
                    server.max_open = max(server.max_open, server.num_open)
                answer = reply(number, body)
                with lock:
                    server.num_open -= 1
                if answer is None:
                    server.release.wait(60)
                    self.close_connection = True
                    return
                status, headers, content = answer
                self.send_response(status)
                for name, value in {**headers, "content-length": str(len(content))}.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args):
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.release.set()
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    servers: list[Server] = []

    def start(reply: Callable) -> Server:
        servers.append(Server(reply))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def make_client(server: Server, cache=None, **options) -> JudgeClient:
    return JudgeClient(Endpoint(base_url=server.url, model="m", **options), cache=cache)


def ask(client: JudgeClient, *texts: str, read=str) -> list:
    async def run():
        questions = ([{"role": "user", "content": text}] for text in texts)
        asked = (client.ask(question, read) for question in questions)
        return await asyncio.gather(*asked, return_exceptions=True)

    return asyncio.run(run())


def test_concurrent_requests_from_several_event_loops(serve):
    def reply(number, body):
        time.sleep(0.05)
        return completion(body["messages"][0]["content"].upper())

    server = serve(reply)
    client = make_client(server, max_concurrent=3, api_key="key", temperature=0.5, max_tokens=7)
    assert ask(client, *(f"q{i}" for i in range(10))) == [f"Q{i}" for i in range(10)]
    assert ask(client, *(f"r{i}" for i in range(5))) == [f"R{i}" for i in range(5)]
    assert 1 < server.max_open <= 3
    assert server.bodies[0].keys() == {"model", "temperature", "max_tokens", "messages"}
    assert (server.bodies[0]["temperature"], server.bodies[0]["max_tokens"]) == (0.5, 7)
    assert server.headers[0]["authorization"] == "Bearer key"


def test_the_key_in_the_environment_is_not_sent_to_the_judge(serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "the key of another service")
    server = serve(lambda number, body: completion("fine"))
    assert ask(make_client(server), "q") == ["fine"]
    assert server.headers[0]["authorization"] == "Bearer EMPTY"


def test_identical_questions_share_a_request_and_replies_are_cached(serve, tmp_path):
    server = serve(lambda number, body: completion(f"answer {number}"))
    path = tmp_path / "cache" / "answers.sqlite"
    client = make_client(server, path)
    assert ask(client, *["same"] * 8) == ["answer 0"] * 8
    assert ask(client, "same", "other") == ["answer 0", "answer 1"]
    assert ask(make_client(server, path), "other", "same") == ["answer 1", "answer 0"]
    assert len(server.bodies) == 2
    assert ask(make_client(server, path, temperature=1.0), "same") == ["answer 2"]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_transient_errors_are_retried(serve, status):
    soon = {"retry-after-ms": "5"}
    replies = [completion("", status, **soon), (status, soon, b"<html>"), completion("fine")]
    server = serve(lambda number, body: replies[number])
    assert ask(make_client(server), "q") == ["fine"] and len(server.bodies) == 3


UNREADABLE = [
    completion("no number"),
    (200, {}, b"not json"),
    (200, {}, b"[]"),
    (200, {}, b'{"choices": []}'),
    (200, {}, b'{"choices": [{"message": {"content": null}}]}'),
    (200, {}, b'{"choices": [{"message": "7"}]}'),
    (200, {}, b"\xff\xfe\x00"),
]


@pytest.mark.parametrize("answer", UNREADABLE, ids=range(len(UNREADABLE)))
@pytest.mark.parametrize("content_type", ["application/json", "text/plain"])
def test_an_unreadable_reply_is_requested_again_and_never_cached(serve, answer, content_type):
    status, headers, body = answer
    bad = (status, {**headers, "content-type": content_type}, body)
    server = serve(lambda number, body: completion("7") if number == 3 else bad)
    client = make_client(server, attempts=3)
    (error,) = ask(client, "q", read=int)
    assert isinstance(error, JudgeError) and "unreadable reply" in str(error)
    assert len(server.bodies) == 3
    assert ask(client, "q", read=int) == [7]


@pytest.mark.parametrize(("status", "num_requests"), [(401, 1), (502, 2)])
def test_a_permanent_error_names_the_status_and_the_body(serve, status, num_requests):
    headers = {"content-type": "application/json", "retry-after-ms": "5"}
    body = b'{"error": {"message": "no such key"}}'
    server = serve(lambda number, request: (status, headers, body))
    (error,) = ask(make_client(server, attempts=2), "q")
    assert isinstance(error, JudgeError) and "no such key" in str(error)
    assert len(server.bodies) == num_requests


def test_an_unreachable_server_is_an_error():
    endpoint = Endpoint(base_url="http://127.0.0.1:9/v1", model="m", attempts=1)
    (error,) = ask(JudgeClient(endpoint), "q")
    assert isinstance(error, JudgeError) and "127.0.0.1:9/v1: APIConnectionError" in str(error)


def test_a_hanging_request_times_out_and_is_retried(serve):
    server = serve(lambda number, body: None if number == 0 else completion("fine"))
    assert ask(make_client(server, request_timeout_s=0.3), "q") == ["fine"]
    assert len(server.bodies) == 2
    server = serve(lambda number, body: None)
    (error,) = ask(make_client(server, attempts=1, request_timeout_s=0.2), "q")
    assert isinstance(error, JudgeError) and "APITimeoutError" in str(error)


def judge_reward(server: Server, **options):
    entry = RewardConfig(
        function="judge",
        weight=2.0,
        deadline_s=options.pop("deadline_s", 30.0),
        options={"base_url": server.url, "model": "m", **options},
    )
    return load_rewards([entry])


def score(rewards) -> dict[str, float]:
    """Return the reward parts of the outcome of a trajectory with `TURNS`."""

    async def run() -> dict[str, float]:
        scorer = Scorer(rewards, TASK)
        for turn in TURNS:
            await scorer.score_step(turn.text, Step(messages=turn.messages))
        return dict((await scorer.score_outcome(Outcome())).reward_parts)

    return asyncio.run(run())


def test_the_judge_as_a_reward(serve):
    text = "Right. <score>1</score> or <score> 7.5 </score>"
    server = serve(lambda number, body: completion(text))
    parts = score(judge_reward(server))
    assert parts == {"judge": pytest.approx(2.0 * 0.75)}
    request = server.bodies[0]["messages"][0]["content"]
    assert "Who wrote Ulm?" in request and "Ida\nI. Berg" in request
    assert "[assistant] <tool>x</tool>\n[user] Ulm {answers}\n[assistant] <answer>" in request


@pytest.mark.parametrize(
    "text", ["", "7", "<score>ten</score>", "<score>11</score>", "<score>nan</score>", "<score>"]
)
def test_a_reply_without_a_score_is_a_reward_fault(serve, text):
    rewards = judge_reward(serve(lambda number, body: completion(text)), attempts=2)
    with pytest.raises(RewardFault, match="unreadable reply") as caught:
        score(rewards)
    assert caught.value.kind == "judge"


def test_the_deadline_of_the_reward_bounds_all_attempts(serve):
    rewards = judge_reward(serve(lambda number, body: None), deadline_s=0.4)
    with pytest.raises(RewardFault) as caught:
        score(rewards)
    assert caught.value.kind == "timeout"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"api_key_env": "NO_SUCH_KEY"}, "api_key_env: the environment variable NO_SUCH_KEY is"),
        ({"low": 3.0, "high": 3.0}, "low = 3 must be less than high = 3"),
        ({"base_url": "localhost"}, "base_url: 'localhost' must begin with http"),
        ({"model": None}, r"env.rewards\[0\].options.model: "),
    ],
)
def test_invalid_options_are_named(options, message):
    options = {"base_url": "http://h/v1", "model": "m", **options}
    with pytest.raises(ConfigError, match=message):
        load_rewards([RewardConfig(function="judge", options=options)])
