"""Client of a judge model: chat completions, with shared requests and a cache of replies.

    client = JudgeClient(Endpoint(base_url="http://localhost:8000/v1", model="judge"))
    score = await client.ask(messages, read_score)

The requests go through the `openai` package, which retries failed connections, timeouts and the
statuses 408, 409, 429 and 5xx. They run in a background event loop, so they continue while the
trainer's engine computes.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ...tools import BackgroundLoop
from ...types import Message
from ..optional import import_optional

T = TypeVar("T")


class JudgeError(Exception):
    """The request failed or the reply cannot be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """An OpenAI-compatible endpoint and how to sample from it.

    Attributes:
        base_url: URL up to and including `/v1`.
        api_key: bearer token; "" for a server without authentication.
        max_concurrent: maximum number of requests at the same time.
        attempts: maximum number of requests until one succeeds, and of successful requests until a
            reply can be read.
        request_timeout_s: timeout of one request.
    """

    base_url: str
    model: str
    api_key: str = ""
    max_concurrent: int = 16
    attempts: int = 4
    request_timeout_s: float = 30.0
    temperature: float = 0.0
    max_tokens: int = 512


class JudgeClient:
    """Asks a judge model. Identical questions share one request, and replies are cached.

    Args:
        cache: SQLite file of replies; None keeps them in memory.
    Raises:
        ConfigError: the package `openai` is not installed.
    """

    def __init__(self, endpoint: Endpoint, *, cache: Path | None = None) -> None:
        self._openai = import_optional("openai", install="turnfast[judge]")
        self._endpoint = endpoint
        self._cache = _Cache(cache)
        self._in_flight: dict[str, asyncio.Task[str]] = {}
        self._background = BackgroundLoop("judge")
        self._client: Any = None
        self._slots = asyncio.Semaphore(endpoint.max_concurrent)

    async def ask(self, messages: Sequence[Message], read: Callable[[str], T]) -> T:
        """Ask the judge and return what `read` returns for the text of its reply.

        Args:
            read: raises ValueError if it cannot read the text.
        Raises:
            JudgeError: the request failed, or no reply could be read.
        """
        return await self._background.run(self._ask(messages, read))

    async def _ask(self, messages: Sequence[Message], read: Callable[[str], T]) -> T:
        body = {
            "model": self._endpoint.model,
            "temperature": self._endpoint.temperature,
            "max_tokens": self._endpoint.max_tokens,
            "messages": [dict(message) for message in messages],
        }
        key = hashlib.blake2b(json.dumps(body, sort_keys=True).encode(), digest_size=20).hexdigest()
        cached = self._cache.get(key)
        if cached is not None:
            # It may have been cached by a run that reads replies in another way.
            with contextlib.suppress(ValueError):
                return read(cached)
        request = self._in_flight.get(key)
        if request is None:
            request = asyncio.create_task(self._request_until_readable(body, read))
            self._in_flight[key] = request
            request.add_done_callback(lambda task: self._finish(key, task))
        # Shielded, because other callers may wait for the same request.
        return read(await asyncio.shield(request))

    def _finish(self, key: str, request: asyncio.Task[str]) -> None:
        del self._in_flight[key]
        if not request.cancelled() and request.exception() is None:
            self._cache.put(key, request.result())

    async def _request_until_readable(
        self, body: dict[str, Any], read: Callable[[str], Any]
    ) -> str:
        reason = "no request was made"
        for _ in range(self._endpoint.attempts):
            try:
                text = await self._request(body)
                read(text)
                return text
            except ValueError as error:
                reason = str(error)
        raise JudgeError(f"{self._endpoint.base_url}: unreadable reply: {reason}")

    async def _request(self, body: dict[str, Any]) -> str:
        """Return the text of one completion; raise ValueError if the reply is not a completion."""
        if self._client is None:
            # Created here, because its connections belong to this event loop. Without a key, the
            # package would send the one in OPENAI_API_KEY to this server.
            self._client = self._openai.AsyncOpenAI(
                base_url=self._endpoint.base_url,
                api_key=self._endpoint.api_key or "EMPTY",
                timeout=self._endpoint.request_timeout_s,
                max_retries=self._endpoint.attempts - 1,
            )
        async with self._slots:
            try:
                reply = await self._client.chat.completions.create(**body)
            except self._openai.APIError as error:
                raise JudgeError(
                    f"{self._endpoint.base_url}: {type(error).__name__}: {error}"
                ) from error
        try:
            text = reply.choices[0].message.content
        except (AttributeError, LookupError, TypeError):
            raise ValueError("the reply is not a chat completion") from None
        if not isinstance(text, str):
            raise ValueError("the reply contains no text")
        return text


class _Cache:
    """Replies by request; used in the background loop only."""

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
