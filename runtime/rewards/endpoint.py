"""Asks a judge behind an OpenAI-compatible chat API.

Answers are kept on disk, so that a resumed run does not pay twice.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2

from tunelang.dsl.vocabulary.rewards import Endpoint
from tunelang.runtime.rewards.rubric import Reply
from tunelang.runtime.workers.worker_pool import LoadError

FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
"""Seconds between tries; each wait doubles the previous one."""
_CHECK_SECONDS = 10.0
"""Time-out of the request that tests the endpoint."""


class _RefusedError(Exception):
    """An answer that another try would not change."""


class _UnavailableError(Exception):
    """No answer this time; `pause` is how many seconds the server asks to wait."""

    def __init__(self, why: str, pause: float | None = None) -> None:
        super().__init__(why)
        self.pause = pause


class EndpointJudge:
    """A model behind an OpenAI-compatible chat API; as a callable, `rubric.Ask`."""

    def __init__(self, endpoint: Endpoint, cache: Path | None) -> None:
        """Connect; raises `LoadError` where the key is not set or nothing answers."""
        self.endpoint = endpoint
        self._answers = _AnswerCache(cache, endpoint)
        headers = {}
        if endpoint.key is not None:
            key = os.environ.get(endpoint.key)
            if not key:
                raise LoadError(("judge", endpoint.url), f"${endpoint.key} is not set")
            headers["Authorization"] = f"Bearer {key}"
        self._client = httpx2.Client(
            headers=headers,
            timeout=endpoint.timeout,
            limits=httpx2.Limits(max_connections=endpoint.concurrency),
        )
        self._threads = ThreadPoolExecutor(endpoint.concurrency, thread_name_prefix="judge")
        self._check()

    def _check(self) -> None:
        """Raise `LoadError` for a judge that does not answer, before the run starts."""
        url = f"{self.endpoint.url.rstrip('/')}/models"
        timeout = min(_CHECK_SECONDS, self.endpoint.timeout)
        try:
            status = self._client.get(url, timeout=timeout).status_code
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            self.close()
            why = f"the judge at {self.endpoint.url} does not answer: {_describe(error)}"
            raise LoadError(("judge", self.endpoint.url), why) from None
        if status in (401, 403):
            self.close()
            why = f"the judge at {self.endpoint.url} refuses the key (HTTP {status})"
            raise LoadError(("judge", self.endpoint.url), why)

    def __call__(self, requests: Sequence[str]) -> Sequence[Reply]:
        """Send requests to the judge; those that were answered before are read from the cache."""
        return list(self._threads.map(self._ask, requests))

    def close(self) -> None:
        """End the threads and connections."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._client.close()

    def _ask(self, request: str) -> Reply:
        """Return the answer, from the cache or after at most `retries` more tries."""
        cached = self._answers.get(request)
        if cached is not None:
            return cached
        for attempt in range(self.endpoint.retries + 1):
            try:
                reply = self._post(request)
            except _RefusedError as error:
                return error
            except _UnavailableError as error:
                if attempt == self.endpoint.retries:
                    return error
                pause = FIRST_WAIT * 2**attempt if error.pause is None else error.pause
                time.sleep(min(LONGEST_WAIT, pause))
            else:
                self._answers.put(request, reply)
                return reply
        raise AssertionError("the last attempt returns")

    def _post(self, request: str) -> str:
        """Send a request once; raises `_RefusedError` and `_UnavailableError`."""
        body = {
            "model": self.endpoint.model,
            "messages": [{"role": "user", "content": request}],
            "temperature": 0,
        }
        url = f"{self.endpoint.url.rstrip('/')}/chat/completions"
        try:
            response = self._client.post(url, json=body)
        except httpx2.HTTPError as error:
            raise _UnavailableError(_describe(error)) from None
        if response.status_code == 429 or response.status_code >= 500:
            header = response.headers.get("retry-after", "")
            pause = float(header) if re.fullmatch(r"\d+(\.\d+)?", header) else None
            raise _UnavailableError(f"the judge answers HTTP {response.status_code}", pause)
        if response.status_code >= 400:
            excerpt = " ".join(response.text.split())[:120]
            raise _RefusedError(f"the judge answers HTTP {response.status_code}: {excerpt}")
        try:
            content = response.json()["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError):
            raise _RefusedError("the judge's answer is no chat completion") from None
        return str(content or "")


def _describe(error: Exception) -> str:
    if isinstance(error, httpx2.TimeoutException):
        return "no answer in time"
    return str(error) or type(error).__name__


class _AnswerCache:
    """Answers by request: in memory, and in a file that outlives the run."""

    def __init__(self, folder: Path | None, endpoint: Endpoint) -> None:
        self._lock = threading.Lock()
        self._answers: dict[str, str] = {}
        self._path: Path | None = None
        if folder is None:
            return
        name = hashlib.blake2b(f"{endpoint.url} {endpoint.model}".encode(), digest_size=8)
        self._path = folder / f"judge-{name.hexdigest()}.jsonl"
        try:
            lines = self._path.read_text("utf-8").splitlines()
        except OSError:
            return
        for line in lines:
            try:
                row = json.loads(line)
                self._answers[row["request"]] = row["reply"]
            except (ValueError, LookupError, TypeError):  # cut off by a crash
                continue

    @staticmethod
    def _key(request: str) -> str:
        return hashlib.blake2b(request.encode(), digest_size=16).hexdigest()

    def get(self, request: str) -> str | None:
        """Return the stored answer to a request, or None."""
        with self._lock:
            return self._answers.get(self._key(request))

    def put(self, request: str, reply: str) -> None:
        """Store an answer, in memory and in the file."""
        with self._lock:
            key = self._key(request)
            self._answers[key] = reply
            if self._path is not None:
                line = json.dumps({"request": key, "reply": reply}, ensure_ascii=False)
                try:
                    self._path.parent.mkdir(parents=True, exist_ok=True)
                    with self._path.open("a", encoding="utf-8") as file:
                        file.write(line + "\n")
                except OSError:  # only costs the next run a request
                    self._path = None
