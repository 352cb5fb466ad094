"""A language model asked over HTTP: any endpoint that speaks OpenAI's chat completions.

    endpoint = ChatEndpoint(base_url="http://localhost:8000/v1", model="judge")
    score = await endpoint.ask(messages, read_score)

One question is asked once: equal questions under way share their answer, and answers are kept, in
memory or in a SQLite file. At most `max_concurrent` requests are open. What may pass (no
connection, 408, 409, 425, 429, 5xx, a slow answer, one that cannot be read) is tried again after a
growing, jittered wait, or the server's own Retry-After. What goes wrong for good is a `JudgeError`
with a kind. Requests run in a background loop, so they go on while the trainer's engine computes.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import random
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import httpx

from ...errors import ConfigError
from ...tools import BackgroundLoop
from ...types import Message

T = TypeVar("T")
Fault = Literal["unreachable", "refused", "timeout", "rubbish"]
MAX_REPLY_BYTES = 1 << 20
_MAY_PASS = frozenset({408, 409, 425, 429, *range(500, 600)})
_MAX_WAIT_S = 30.0


class JudgeError(RuntimeError):
    """No usable answer; `kind` says in one word why."""

    def __init__(self, kind: Fault, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class ChatEndpoint:
    """One model at one address.

    Args:
        base_url: up to and including `/v1`.
        api_key: sent as a bearer token; "" sends none.
        max_concurrent: open requests.
        attempts: tries per question, the first included.
        backoff_s: mean wait after the first failed try, doubled after each, at most 30 s.
        request_timeout_s: one try.
        deadline_s: all tries of one question, and the waits; None leaves that to the caller.
        cache: SQLite file of answers; None keeps them in memory.
        temperature, max_tokens: sampling of the answer; both are part of the question's identity.

    `num_requests`, `num_cached` and `num_retries` count since the start.
    """

    def __init__(
        self,
        *,
        base_url: str,
        model: str,
        api_key: str = "",
        max_concurrent: int = 16,
        attempts: int = 4,
        backoff_s: float = 0.5,
        request_timeout_s: float = 30.0,
        deadline_s: float | None = 120.0,
        cache: Path | None = None,
        temperature: float = 0.0,
        max_tokens: int = 512,
    ) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise ConfigError(
                f"env.rewards: base_url: {base_url!r} must begin with http:// or https://"
            )
        self._url = base_url.rstrip("/") + "/chat/completions"
        self._body = {"model": model, "temperature": temperature, "max_tokens": max_tokens}
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._max_concurrent = max_concurrent
        self._attempts = attempts
        self._backoff_s = backoff_s
        self._request_timeout_s = request_timeout_s
        self._deadline_s = deadline_s
        self._answers = _Answers(cache)
        self._asking: dict[str, asyncio.Task[str]] = {}
        self._background = BackgroundLoop("judge")
        self._client: httpx.AsyncClient | None = None
        self._places = asyncio.Semaphore(max_concurrent)
        self.num_requests = 0
        self.num_cached = 0
        self.num_retries = 0

    async def ask(self, messages: Sequence[Message], read: Callable[[str], T]) -> T:
        """Ask, and read the answer.

        Args:
            read: from the answer's text to what is wanted; a ValueError means it is rubbish.
        Raises:
            JudgeError: with kind "unreachable", "refused" (a status that will not pass),
                "timeout" or "rubbish".
        """
        return await self._background.run(self._ask(messages, read))

    async def _ask(self, messages: Sequence[Message], read: Callable[[str], T]) -> T:
        body = {**self._body, "messages": [dict(message) for message in messages]}
        key = hashlib.blake2b(json.dumps(body, sort_keys=True).encode(), digest_size=20).hexdigest()
        known = self._answers.get(key)
        if known is not None:
            # kept for a reader with other demands, it may be rubbish to this one
            with contextlib.suppress(ValueError):
                value = read(known)
                self.num_cached += 1
                return value
        asking = self._asking.get(key)
        if asking is None:
            asking = asyncio.create_task(self._insist(body, read))
            self._asking[key] = asking
            asking.add_done_callback(lambda task: self._note(key, task))
        else:
            self.num_cached += 1
        # shielded: whoever else waits for the same answer must not lose it
        return read(await asyncio.shield(asking))

    def _note(self, key: str, task: asyncio.Task[str]) -> None:
        del self._asking[key]
        if not task.cancelled() and task.exception() is None:
            self._answers.put(key, task.result())

    async def _insist(self, body: Mapping[str, Any], read: Callable[[str], Any]) -> str:
        fault = JudgeError("timeout", "the first is under way")
        try:
            async with asyncio.timeout(self._deadline_s):
                for attempt in range(self._attempts):
                    pause_s = 2**attempt * self._backoff_s * random.uniform(0.5, 1.5)
                    try:
                        text = await self._request(body)
                        read(text)
                        return text
                    except _Later as later:
                        fault = later.fault
                        pause_s = max(pause_s, later.retry_after_s)
                    except ValueError as error:
                        fault = JudgeError("rubbish", f"{self._url}: {error}")
                    if attempt + 1 < self._attempts:
                        self.num_retries += 1
                        await asyncio.sleep(min(pause_s, _MAX_WAIT_S))
        except TimeoutError:
            text = f"{self._url}: no answer in {self._deadline_s} s; the last try: {fault}"
            raise JudgeError("timeout", text) from None
        raise fault

    async def _request(self, body: Mapping[str, Any]) -> str:
        if self._client is None:
            limits = httpx.Limits(max_connections=self._max_concurrent)
            self._client = httpx.AsyncClient(headers=self._headers, limits=limits, timeout=None)
        try:
            async with self._places:
                self.num_requests += 1
                async with (
                    asyncio.timeout(self._request_timeout_s),
                    self._client.stream("POST", self._url, json=body) as response,
                ):
                    content = await _read_body(response)
        except TimeoutError:
            text = f"{self._url} gave no answer in {self._request_timeout_s:g} s"
            raise _Later(JudgeError("timeout", text)) from None
        except httpx.HTTPError as error:
            text = f"{self._url}: {type(error).__name__}: {error}"
            raise _Later(JudgeError("unreachable", text)) from None
        if response.status_code != 200:
            shown = " ".join(content.decode("utf-8", errors="replace").split())[:200]
            fault = JudgeError("refused", f"{self._url}: status {response.status_code}: {shown}")
            if response.status_code in _MAY_PASS:
                raise _Later(fault, _retry_after_s(response.headers.get("retry-after", "")))
            raise fault
        return _content_of(content)


class _Later(Exception):
    def __init__(self, fault: JudgeError, retry_after_s: float = 0.0) -> None:
        super().__init__(str(fault))
        self.fault = fault
        self.retry_after_s = retry_after_s


class _Answers:
    """Answers by question, in memory or in a file; used from the background loop alone."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._open: sqlite3.Connection | None = None

    def get(self, key: str) -> str | None:
        row = self._table().execute("SELECT text FROM answers WHERE key = ?", (key,)).fetchone()
        return row[0] if row else None

    def put(self, key: str, text: str) -> None:
        with self._table() as table:
            table.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, text))

    def _table(self) -> sqlite3.Connection:
        if self._open is None:
            if self._path is not None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
            self._open = sqlite3.connect(self._path or ":memory:", timeout=10)
            with self._open:
                self._open.execute("CREATE TABLE IF NOT EXISTS answers (key PRIMARY KEY, text)")
        return self._open


async def _read_body(response: httpx.Response) -> bytes:
    chunks: list[bytes] = []
    size_bytes = 0
    async for chunk in response.aiter_bytes():
        size_bytes += len(chunk)
        if size_bytes > MAX_REPLY_BYTES:
            raise ValueError(f"the answer has more than {MAX_REPLY_BYTES} bytes")
        chunks.append(chunk)
    return b"".join(chunks)


def _content_of(body: bytes) -> str:
    """The text of the first choice; raises ValueError for anything else."""
    try:
        content = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        raise ValueError("the answer is no chat completion") from None
    if not isinstance(content, str):
        raise ValueError("the answer holds no text")
    return content


def _retry_after_s(header: str) -> float:
    try:
        return max(0.0, min(float(header), _MAX_WAIT_S))
    except ValueError:  # a date, or nothing
        return 0.0
