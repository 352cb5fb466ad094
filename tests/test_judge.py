"""A judge over HTTP: a real server on this machine, which also misbehaves."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from turnfast.config.schema import RewardConfig
from turnfast.envs import PlayedTurn, RewardFault, Task
from turnfast.envs.rewards.builtin import load_rewards
from turnfast.envs.rewards.judge import Judge
from turnfast.envs.rewards.judge_client import MAX_REPLY_BYTES, ChatEndpoint, JudgeError
from turnfast.envs.rewards.reward import score
from turnfast.errors import ConfigError

TASK = Task(id="q", question="Who wrote Ulm?", answers=("Ida", "I. Berg"))
TURNS = (
    PlayedTurn(text="<tool>x</tool>", messages=({"role": "user", "content": "Ulm {answers}"},)),
    PlayedTurn(text="<answer>Ida</answer>"),
)


def says(text: str, status: int = 200, **headers: str):
    body = json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})
    return status, headers, body.encode()


class Server:
    """Answers the n-th request with `reply(n, body)`: status, headers, body; or None to hang."""

    def __init__(self, reply: Callable) -> None:
        server = self
        self.bodies: list[dict] = []
        self.headers: list[dict] = []
        self.at_once = self.most_at_once = 0
        self.release = threading.Event()
        lock = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with lock:
                    number = len(server.bodies)
                    server.bodies.append(body)
                    server.headers.append(dict(self.headers))
                    server.at_once += 1
                    server.most_at_once = max(server.most_at_once, server.at_once)
                try:
                    answer = reply(number, body)
                finally:
                    with lock:
                        server.at_once -= 1
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


def endpoint(server: Server, **options) -> ChatEndpoint:
    return ChatEndpoint(base_url=server.url, model="m", backoff_s=0.01, **options)


def question(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def ask(judge: ChatEndpoint, *texts: str, read=str) -> list:
    async def run():
        asked = (judge.ask(question(text), read) for text in texts)
        return await asyncio.gather(*asked, return_exceptions=True)

    return asyncio.run(run())


def test_many_questions_at_once_within_the_limit_and_in_several_event_loops(serve):
    def reply(number, body):
        time.sleep(0.05)
        return says(body["messages"][0]["content"].upper())

    server = serve(reply)
    judge = endpoint(server, max_concurrent=3, api_key="key", temperature=0.5, max_tokens=7)
    first = ask(judge, *(f"q{i}" for i in range(10)))
    second = ask(judge, *(f"r{i}" for i in range(5)))  # another asyncio.run, the same client
    assert first == [f"Q{i}" for i in range(10)] and second == [f"R{i}" for i in range(5)]
    assert 1 < server.most_at_once <= 3
    assert server.bodies[0].keys() == {"model", "temperature", "max_tokens", "messages"}
    assert (server.bodies[0]["temperature"], server.bodies[0]["max_tokens"]) == (0.5, 7)
    assert server.headers[0]["Authorization"] == "Bearer key"


def test_equal_questions_are_asked_once_and_answers_outlive_the_process(serve, tmp_path):
    server = serve(lambda number, body: says(f"answer {number}"))
    path = tmp_path / "cache" / "answers.sqlite"
    judge = endpoint(server, cache=path)
    assert ask(judge, *["same"] * 8) == ["answer 0"] * 8  # at the same time
    assert ask(judge, "same", "other") == ["answer 0", "answer 1"]
    assert (judge.num_requests, judge.num_cached) == (2, 8)
    again = endpoint(server, cache=path)
    assert ask(again, "other", "same") == ["answer 1", "answer 0"] and again.num_requests == 0
    assert ask(endpoint(server, cache=path, temperature=1.0), "same") == ["answer 2"]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_may_pass_is_tried_again(serve, status):
    answers = [says("", status), (status, {}, b"<html>"), says("fine")]
    judge = endpoint(serve(lambda number, body: answers[number]))
    assert ask(judge, "q") == ["fine"]
    assert (judge.num_requests, judge.num_retries) == (3, 2)


def test_retry_after_is_kept(serve):
    answers = [says("", 429, retry_after="0.5"), says("fine")]
    judge = endpoint(serve(lambda number, body: answers[number]))
    begin = time.perf_counter()
    assert ask(judge, "q") == ["fine"] and time.perf_counter() - begin >= 0.5


def number_of(text: str) -> int:
    return int(text)


RUBBISH = [
    says("no number"),
    (200, {}, b"not json"),
    (200, {}, b"[]"),
    (200, {}, b'{"choices": []}'),
    (200, {}, b'{"choices": [{"message": {"content": null}}]}'),
    (200, {}, b'{"choices": [{"message": "7"}]}'),
    (200, {}, b"[" * 100_000),
    (200, {}, b"\xff\xfe\x00"),
    (200, {}, b" " * (MAX_REPLY_BYTES + 1)),
]


@pytest.mark.parametrize("answer", RUBBISH, ids=range(len(RUBBISH)))
def test_rubbish_is_asked_for_again_then_a_typed_fault_and_never_kept(serve, answer):
    server = serve(lambda number, body: says("7") if number == 3 else answer)
    judge = endpoint(server, attempts=3)
    (fault,) = ask(judge, "q", read=number_of)
    assert isinstance(fault, JudgeError) and fault.kind == "rubbish"
    assert judge.num_requests == 3
    assert ask(judge, "q", read=number_of) == [7]


def test_a_refusal_is_not_tried_again(serve):
    judge = endpoint(serve(lambda number, body: (401, {}, b"no such key\n")))
    (fault,) = ask(judge, "q")
    assert fault.kind == "refused" and "status 401: no such key" in str(fault)
    assert judge.num_requests == 1


def test_a_lasting_server_error_is_a_refusal_in_the_end(serve):
    judge = endpoint(serve(lambda number, body: says("", 502)), attempts=2)
    (fault,) = ask(judge, "q")
    assert fault.kind == "refused" and "502" in str(fault) and judge.num_requests == 2


def test_nobody_listens():
    judge = ChatEndpoint(base_url="http://127.0.0.1:9/v1", model="m", attempts=2, backoff_s=0.01)
    (fault,) = ask(judge, "q")
    assert fault.kind == "unreachable"


def test_a_hanging_server_costs_a_try_and_then_the_deadline(serve):
    judge = endpoint(
        serve(lambda number, body: None if number == 0 else says("fine")), request_timeout_s=0.3
    )
    assert ask(judge, "q") == ["fine"] and judge.num_requests == 2
    stuck = endpoint(serve(lambda number, body: None), deadline_s=0.3)
    (fault,) = ask(stuck, "q")
    assert fault.kind == "timeout" and "no answer in 0.3 s" in str(fault)
    short = endpoint(serve(lambda number, body: None), attempts=2, request_timeout_s=0.2)
    (fault,) = ask(short, "q")
    assert fault.kind == "timeout" and short.num_requests == 2


def judge_reward(server: Server, **options):
    entry = RewardConfig(
        function="judge",
        weight=2.0,
        deadline_s=options.pop("deadline_s", 30.0),
        options={"base_url": server.url, "model": "m", "backoff_s": 0.01, **options},
    )
    return load_rewards([entry])


def test_as_a_reward(serve):
    server = serve(lambda number, body: says("Right. <score>1</score> or <score> 7.5 </score>"))
    parts = asyncio.run(score(judge_reward(server), TASK, TURNS))
    assert parts == {"judge": pytest.approx(2.0 * 0.75)}
    asked = server.bodies[0]["messages"][0]["content"]
    assert "Who wrote Ulm?" in asked and "Ida\nI. Berg" in asked
    assert "[assistant] <tool>x</tool>\n[user] Ulm {answers}\n[assistant] <answer>" in asked


@pytest.mark.parametrize(
    "said", ["", "7", "<score>ten</score>", "<score>11</score>", "<score>nan</score>", "<score>"]
)
def test_no_score_is_a_fault_and_not_a_score(serve, said):
    rewards = judge_reward(serve(lambda number, body: says(said)), attempts=2)
    with pytest.raises(RewardFault) as caught:
        asyncio.run(score(rewards, TASK, TURNS))
    assert caught.value.kind == "judge" and "rubbish" in str(caught.value)


def test_the_rewards_deadline_is_over_all_attempts(serve):
    rewards = judge_reward(serve(lambda number, body: None), deadline_s=0.4)
    with pytest.raises(RewardFault) as caught:
        asyncio.run(score(rewards, TASK, TURNS))
    assert caught.value.kind == "timeout"


def test_bad_options_are_named(monkeypatch):
    with pytest.raises(ConfigError, match="api_key_env: NO_SUCH_KEY is not set"):
        Judge(base_url="http://h/v1", model="m", api_key_env="NO_SUCH_KEY")
    with pytest.raises(ConfigError, match="scale from low = 3 to high = 3"):
        Judge(base_url="http://h/v1", model="m", low=3.0, high=3.0)
    with pytest.raises(ConfigError, match="base_url: 'localhost' must begin with http"):
        load_rewards(
            [RewardConfig(function="judge", options={"base_url": "localhost", "model": "m"})]
        )
    with pytest.raises(ConfigError, match=r"env.rewards\[0\].options.model: this option is"):
        load_rewards([RewardConfig(function="judge", options={"base_url": "http://h/v1"})])
