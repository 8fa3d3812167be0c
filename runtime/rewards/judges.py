"""Rubrics: a language model scores completions against criteria in plain words.

The judge is a model behind an OpenAI-compatible chat API, or one of the spec. It is asked for a
number from 0 to 10 for each criterion, as JSON; what it says around that does not matter. Identical
requests are sent once, and answers are kept on disk, so that a resumed run does not pay twice.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from typing_extensions import override

from tunelang.dsl.diagnostics.tune_error import FailureText, SpecPlace, TuneError
from tunelang.dsl.messages import run_failures
from tunelang.dsl.vocabulary.rewards import Endpoint, Rubric
from tunelang.runtime.data.row_errors import MissingFieldError, WrongTypeError
from tunelang.runtime.data.text_templates import render
from tunelang.runtime.rewards.reward_parts import Row, Scorer
from tunelang.runtime.workers.worker_pool import LoadError, Result

HIGHEST = 10.0
"""What the judge gives for a criterion that is met in full."""
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
"""Seconds between tries; each wait is twice the one before."""

_STOCK = """\
You are a strict judge. Read the task and the text that was written for it, and score the text by \
each criterion.

<task>
{task}
</task>

<text>
{completion}
</text>

Criteria:
{criteria}
"""
_FORM = """
Answer with JSON only: {"scores": [...]}, one number from 0 (not at all) to 10 (fully) for each \
criterion, in their order."""

Reply = str | Exception
Ask = Callable[[Sequence[str]], Sequence[Reply]]
"""What a judge says to each of some requests, or why it says nothing."""


@dataclass(eq=False)
class JudgeDownError(TuneError):
    """A judge answered none of the requests of a batch; `why` is what the first one got."""

    code = "reward-fails"
    judge: str
    why: str

    @override
    def text(self, stage: str) -> FailureText:
        return run_failures.judge_down(self.judge, self.why)

    @override
    def place(self) -> SpecPlace:
        return SpecPlace(declaration=self.judge)


class _Refused(Exception):
    """An answer that another try would not change."""


def rubric(kind: Rubric, ask: Ask, name: str) -> Scorer:
    """Make the scorer of a rubric from what asks its judge; `name` is for messages.

    The scorer raises `JudgeDownError` where the judge answers nothing at all.
    """

    def score(rows: Sequence[Row]) -> Sequence[Result]:
        results: list[Result] = [""] * len(rows)
        asked: dict[str, list[int]] = {}
        for at, row in enumerate(rows):
            try:
                asked.setdefault(request(kind, row), []).append(at)
            except (MissingFieldError, WrongTypeError) as error:
                results[at] = str(error)
        replies = ask(list(asked))
        failed = [reply for reply in replies if isinstance(reply, Exception)]
        if failed and len(failed) == len(replies):
            raise JudgeDownError(name, str(failed[0]))
        for places, reply in zip(asked.values(), replies, strict=True):
            found = str(reply) if isinstance(reply, Exception) else verdict(kind, reply)
            for at in places:
                results[at] = found
        return results

    return score


def request(kind: Rubric, row: Row) -> str:
    """Return what the judge is asked about a completion.

    Raises `MissingFieldError` and `WrongTypeError`.
    """
    criteria = "\n".join(f"{at}. {each.text}" for at, each in enumerate(kind.criteria, 1))
    fields = {**row.fields, "criteria": criteria}
    if kind.instructions is not None:
        return render(kind.instructions, fields) + "\n" + _FORM
    task = str(fields.get("prompt") or "(none)")
    completion = str(fields["completion"])
    return _STOCK.format(task=task, completion=completion, criteria=criteria) + _FORM


def verdict(kind: Rubric, reply: str) -> Result:
    """Return the weighted mean of the scores in a judge's answer, 0 to 1, or what is wrong.

    The last JSON in the answer that has as many numbers as there are criteria counts.
    """
    for found in reversed(list(_json_in(reply))):
        scores = found.get("scores") if isinstance(found, dict) else found
        if not isinstance(scores, list) or len(scores) != len(kind.criteria):
            continue
        if all(isinstance(each, int | float) and not isinstance(each, bool) for each in scores):
            weights = [criterion.weight for criterion in kind.criteria]
            clipped = [min(max(float(each), 0.0), HIGHEST) for each in scores]
            total = sum(w * s for w, s in zip(weights, clipped, strict=True))
            return total / (HIGHEST * sum(weights))
    shown = " ".join(reply.split())
    return f"the judge gave no {len(kind.criteria)} scores: {shown[:80]}"


def _json_in(text: str) -> list[Any]:
    decoder = json.JSONDecoder()
    found = []
    at = 0
    while (start := re.search(r"[{\[]", text[at:])) is not None:
        at += start.start()
        try:
            value, end = decoder.raw_decode(text, at)
        except ValueError:
            at += 1
            continue
        found.append(value)
        at = end
    return found


class EndpointJudge:
    """A model behind an OpenAI-compatible chat API; as a callable, `Ask`."""

    def __init__(self, endpoint: Endpoint, cache: Path | None) -> None:
        """Raise `LoadError` where the key is not set or nothing answers."""
        self.endpoint = endpoint
        self._kept = _Kept(cache, endpoint)
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
        """A judge that is not there is known before the run, not after its first batch."""
        url = f"{self.endpoint.url.rstrip('/')}/models"
        try:
            status = self._client.get(url, timeout=min(10.0, self.endpoint.timeout)).status_code
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            self.close()
            why = f"the judge at {self.endpoint.url} does not answer: {_words(error)}"
            raise LoadError(("judge", self.endpoint.url), why) from None
        if status in (401, 403):
            self.close()
            why = f"the judge at {self.endpoint.url} refuses the key (HTTP {status})"
            raise LoadError(("judge", self.endpoint.url), why)

    def __call__(self, requests: Sequence[str]) -> Sequence[Reply]:
        """Ask; requests that were answered before are not sent."""
        return list(self._threads.map(self._ask, requests))

    def close(self) -> None:
        """End the threads and connections."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._client.close()

    def _ask(self, text: str) -> Reply:
        held = self._kept.get(text)
        if held is not None:
            return held
        wait = FIRST_WAIT
        for left in range(self.endpoint.retries, -1, -1):
            try:
                reply, pause = self._post(text)
            except _Refused as error:
                return error
            if isinstance(reply, str):
                self._kept.put(text, reply)
                return reply
            if left:
                time.sleep(min(LONGEST_WAIT, pause if pause is not None else wait))
                wait *= 2
        return reply

    def _post(self, text: str) -> tuple[Reply, float | None]:
        """Send a request once; returns the answer, or what is wrong and how long to wait."""
        body = {
            "model": self.endpoint.model,
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
        }
        url = f"{self.endpoint.url.rstrip('/')}/chat/completions"
        try:
            response = self._client.post(url, json=body)
        except httpx2.HTTPError as error:
            return RuntimeError(_words(error)), None
        if response.status_code == 429 or response.status_code >= 500:
            stated = response.headers.get("retry-after", "")
            pause = float(stated) if re.fullmatch(r"\d+(\.\d+)?", stated) else None
            return RuntimeError(f"the judge answers HTTP {response.status_code}"), pause
        if response.status_code >= 400:
            shown = " ".join(response.text.split())[:120]
            raise _Refused(f"the judge answers HTTP {response.status_code}: {shown}")
        try:
            content = response.json()["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError):
            raise _Refused("the judge's answer is no chat completion") from None
        return str(content or ""), None


def _words(error: Exception) -> str:
    if isinstance(error, httpx2.TimeoutException):
        return "no answer in time"
    return str(error) or type(error).__name__


class _Kept:
    """Answers by request: in memory, and in a file that outlives the run."""

    def __init__(self, cache: Path | None, endpoint: Endpoint) -> None:
        self._lock = threading.Lock()
        self._found: dict[str, str] = {}
        self._path: Path | None = None
        if cache is None:
            return
        who = hashlib.blake2b(f"{endpoint.url} {endpoint.model}".encode(), digest_size=8)
        self._path = cache / f"judge-{who.hexdigest()}.jsonl"
        try:
            lines = self._path.read_text("utf-8").splitlines()
        except OSError:
            return
        for line in lines:
            try:
                row = json.loads(line)
                self._found[row["request"]] = row["reply"]
            except (ValueError, LookupError, TypeError):  # cut off by a crash
                continue

    @staticmethod
    def _key(text: str) -> str:
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def get(self, text: str) -> str | None:
        """Return an answer that is known."""
        with self._lock:
            return self._found.get(self._key(text))

    def put(self, text: str, reply: str) -> None:
        """Keep an answer."""
        with self._lock:
            key = self._key(text)
            self._found[key] = reply
            if self._path is not None:
                line = json.dumps({"request": key, "reply": reply}, ensure_ascii=False)
                try:
                    self._path.parent.mkdir(parents=True, exist_ok=True)
                    with self._path.open("a", encoding="utf-8") as file:
                        file.write(line + "\n")
                except OSError:  # only costs the next run a request
                    self._path = None
