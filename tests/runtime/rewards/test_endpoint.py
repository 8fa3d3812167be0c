"""Judges, against a local stand-in for an OpenAI-compatible endpoint."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tunelang.dsl.vocabulary.rewards import Criterion, Endpoint, Rubric
from tunelang.runtime.rewards import endpoint as endpoint_module
from tunelang.runtime.rewards.endpoint import EndpointJudge
from tunelang.runtime.rewards.reward_parts import CompletionRow
from tunelang.runtime.rewards.rubric import JudgeDownError, rubric_scorer
from tunelang.runtime.workers.worker_pool import LoadError


class StandIn:
    """Answers each chat with what `reply` makes of its text; failures by their HTTP status."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.reply: Any = lambda text: '{"scores": [10, 5]}'
        self.failures: list[tuple[int, dict[str, str]]] = []
        self.at_once = self.most = 0
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer(200, {"data": []})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with outer.lock:
                    outer.requests.append(body)
                    outer.keys.add(self.headers["authorization"])
                    outer.at_once += 1
                    outer.most = max(outer.most, outer.at_once)
                    failure = outer.failures.pop(0) if outer.failures else None
                time.sleep(0.02)
                with outer.lock:
                    outer.at_once -= 1
                if failure is not None:
                    self.answer(failure[0], {"error": "no"}, failure[1])
                    return
                content = outer.reply(body["messages"][0]["content"])
                self.answer(200, {"choices": [{"message": {"content": content}}]})

            def answer(self, status: int, value: Any, headers: Any = ()) -> None:
                data = json.dumps(value).encode()
                self.send_response(status)
                for name, text in dict(headers).items():
                    self.send_header(name, text)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    monkeypatch.setattr(endpoint_module, "FIRST_WAIT", 0.01)
    server = StandIn()
    yield server
    server.server.shutdown()
    server.server.server_close()


CRITERIA = (Criterion(text="Short", weight=3.0), Criterion(text="Kind"))


def make(stand_in: StandIn, cache: Path | None = None, **settings: Any) -> tuple[Any, Any]:
    endpoint = Endpoint(url=stand_in.url, model="judge", **settings)
    kind = Rubric.model_construct(
        judge=endpoint, criteria=CRITERIA, instructions=None, on_error=0.25
    )
    judge = EndpointJudge(endpoint, cache)
    return rubric_scorer(kind, judge, "taste"), judge


def row(completion: str, **fields: Any) -> CompletionRow:
    return CompletionRow({"completion": completion, **fields}, "data", len(completion))


def test_score_is_the_weighted_mean_of_the_criteria(stand_in: StandIn) -> None:
    score, judge = make(stand_in)
    assert score([row("hello", prompt="Greet")]) == [(3 * 10 + 5) / 40]
    (request,) = stand_in.requests
    text = request["messages"][0]["content"]
    assert request["model"] == "judge"
    assert request["temperature"] == 0
    for part in ("Greet", "hello", "1. Short", "2. Kind"):
        assert part in text
    judge.close()


def test_identical_requests_are_sent_once(stand_in: StandIn, tmp_path: Path) -> None:
    score, judge = make(stand_in, tmp_path)
    assert len(set(score([row("a"), row("b"), row("a")]))) == 1
    score([row("b")])
    assert len(stand_in.requests) == 2
    judge.close()
    # Another run, after a crash in the middle of a line.
    with next(tmp_path.glob("judge-*.jsonl")).open("a") as file:
        file.write('{"request": "cut o')
    score, judge = make(stand_in, tmp_path)
    score([row("a"), row("b")])
    assert len(stand_in.requests) == 2
    score([row("c")])
    assert len(stand_in.requests) == 3
    judge.close()


def test_concurrency_limits_requests_at_once(stand_in: StandIn) -> None:
    score, judge = make(stand_in, concurrency=4)
    score([row(f"text {n}") for n in range(24)])
    assert 2 <= stand_in.most <= 4
    judge.close()


def test_failures_are_retried_after_the_stated_pause(stand_in: StandIn) -> None:
    stand_in.failures = [(500, {}), (429, {"retry-after": "0.05"})]
    score, judge = make(stand_in)
    assert score([row("a")]) == [(3 * 10 + 5) / 40]
    assert len(stand_in.requests) == 3
    judge.close()


def test_answer_without_scores_gives_the_reason(stand_in: StandIn) -> None:
    stand_in.reply = lambda text: "I like it" if "odd" in text else "```json\n[1, 2]\n```"
    score, judge = make(stand_in, retries=0)
    results = score([row("fine"), row("odd")])
    assert sum(isinstance(result, float) for result in results) == 1
    assert all("the judge" in result for result in results if isinstance(result, str))
    judge.close()


def test_unreachable_judge_is_an_error(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    score, judge = make(stand_in, retries=1)
    stand_in.failures = [(503, {})] * 9
    with pytest.raises(JudgeDownError, match="503"):
        score([row("a"), row("b")])
    judge.close()
    with pytest.raises(LoadError, match="does not answer"):
        EndpointJudge(Endpoint(url="http://127.0.0.1:9/v1", model="x"), None)
    with pytest.raises(LoadError, match="NO_SUCH_KEY is not set"):
        EndpointJudge(Endpoint(url=stand_in.url, model="x", key="NO_SUCH_KEY"), None)
    monkeypatch.setenv("SOME_KEY", "secret")
    score, judge = make(stand_in, key="SOME_KEY")
    stand_in.failures = []
    score([row("z")])
    assert "Bearer secret" in stand_in.keys
    judge.close()


def test_slow_answer_times_out(stand_in: StandIn) -> None:
    score, judge = make(stand_in, timeout=0.3, retries=0)
    stand_in.reply = lambda text: time.sleep(1.0 if "slow" in text else 0) or "[4, 4]"
    scores = score([row("fast"), row("slow")])
    assert scores == [0.4, "no answer in time"]
    judge.close()
