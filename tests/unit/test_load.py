"""The load generator against a server of known behaviour, and its arithmetic against hand-made courses."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from fake_server import serve

from pennyweight.cli import main
from pennyweight.errors import StageError, UsageError
from pennyweight.load import bench, driver
from pennyweight.load.command import Options, prepare
from pennyweight.load.driver import Course, Until, closed_loop, open_loop
from pennyweight.load.http import Endpoint, connect
from pennyweight.load.knee import find_knee
from pennyweight.load.peers import vllm_bench
from pennyweight.load.report import LoadReport, summarize, wilson
from pennyweight.load.requests import Asked, Served
from pennyweight.load.steady import drift, warm_up
from pennyweight.load.workload import Arrival, Lengths, Prompts, parse_shape, poisson, read_trace
from pennyweight.recipe import Slo
from pennyweight.records import Price
from pennyweight.store import Store


def asked(at: float | None = None, tokens: int = 4) -> Asked:
    return Asked("a b c", 3, tokens, at)


def ask(url: str, stall: float = 5.0, tokens: int = 4, **settings: object) -> Served:
    """One request."""

    async def one() -> Served:
        async with connect(Endpoint(url, "fake", stall_seconds=stall, **settings)) as target:
            return await target.serve(asked(tokens=tokens), time.perf_counter())

    return asyncio.run(one())


# --- one request ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_times_and_counts_of_a_streamed_answer(api: str) -> None:
    with serve(first=0.05, each=0.02) as fake:
        served = ask(fake.url, api=api, key="secret")
    assert served.good, served.message
    assert served.ttft >= 0.05
    assert served.tpot > 0.01
    assert served.latency >= 0.05 + 3 * 0.02
    assert (served.input_tokens, served.output_tokens, len(served.arrivals)) == (3, 4, 4)
    (body,) = fake.bodies
    assert (body["max_tokens"], body["ignore_eos"], body["stream"]) == (4, True, True)
    assert fake.headers[0]["Authorization"] == "Bearer secret"


@pytest.mark.parametrize(
    ("behaviour", "fault", "says"),
    [
        ("status:429", "status", "HTTP 429"),
        ("status:500", "status", "too much"),
        ("stall", "stalled", "nothing came for 0.2 s"),
        ("drop", "dropped", ""),
        ("garbage", "garbage", "{not json"),
        ("error", "garbage", "out of memory"),
        ("empty", "empty", "no text"),
    ],
)
def test_a_fault_is_told_by_its_kind(behaviour: str, fault: str, says: str) -> None:
    with serve(fault=behaviour) as fake:
        served = ask(fake.url, stall=0.2)
    assert served.fault == fault
    assert says in served.message


def test_a_connection_that_the_server_closed_in_between_is_made_anew() -> None:
    async def several(url: str) -> list[Served]:
        async with connect(Endpoint(url, "fake")) as target:
            return [await target.serve(asked(), time.perf_counter()) for _ in range(6)]

    with serve(fault="hangup") as fake:
        assert [served.fault for served in asyncio.run(several(fake.url))] == [None] * 6


def test_a_server_that_closed_all_kept_connections_is_asked_over_a_new_one() -> None:
    async def four_then_one(url: str) -> Served:
        async with connect(Endpoint(url, "fake")) as target:
            await asyncio.gather(*(target.serve(asked(), time.perf_counter()) for _ in range(4)))
            return await target.serve(asked(), time.perf_counter())

    with serve(fault="once", first=0.05) as fake:
        assert asyncio.run(four_then_one(fake.url)).fault is None


def test_nobody_listens() -> None:
    with serve() as fake:
        url = fake.url
    assert ask(url).fault == "refused"


# --- many requests ----------------------------------------------------------------------------------------------------


class Steady:
    """Serves in so many seconds; `slots` at once."""

    def __init__(self, seconds: float, slots: int = 1000) -> None:
        self._seconds, self._slots = seconds, asyncio.Semaphore(slots)
        self.at_once = self.most = 0

    async def serve(self, request: Asked, due: float) -> Served:
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        async with self._slots:
            await asyncio.sleep(self._seconds)
        self.at_once -= 1
        now = time.perf_counter()
        return Served(due, due, now, request.input_tokens, request.output_tokens, [now])


def nothing(_: Course) -> None:
    pass


def test_a_closed_loop_keeps_its_users_busy_and_ends_on_time() -> None:
    target = Steady(0.01)
    course = asyncio.run(closed_loop(target, itertools.repeat(asked()), 4, Until(requests=22), nothing))
    assert len(course.served) == 22
    assert target.most == 4
    course = asyncio.run(closed_loop(Steady(0.01), itertools.repeat(asked()), 2, Until(seconds=0.2), nothing))
    assert course.stopped_sending - course.begun >= 0.2
    assert course.served


def test_an_open_loop_sends_when_it_is_due_and_a_late_client_counts_as_waiting() -> None:
    moments = [0.0, 0.02, 0.02, 0.05]
    course = asyncio.run(open_loop(Steady(0.01), (asked(at) for at in moments), Until(), nothing))
    assert sorted(item.due - course.begun for item in course.served) == pytest.approx(moments)
    assert all(item.sent >= item.due for item in course.served)
    assert not course.saturated


def test_an_open_loop_that_is_over_saturated_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "LOOK_SECONDS", 0.02)
    arrivals = (asked(at) for at in itertools.count(0, 0.002))
    course = asyncio.run(open_loop(Steady(0.02, slots=1), arrivals, Until(seconds=30), nothing))
    assert course.saturated
    level = (asked(at) for at in itertools.count(0, 0.004))
    course = asyncio.run(open_loop(Steady(0.02), level, Until(seconds=1.0), nothing))
    assert not course.saturated


def test_a_target_that_serves_nothing_is_given_up() -> None:
    with serve(fault="status:500") as fake:

        async def load() -> Course:
            async with connect(Endpoint(fake.url, "fake")) as target:
                return await closed_loop(target, itertools.repeat(asked()), 2, Until(requests=1000), nothing)

        course = asyncio.run(load())
    assert course.given_up
    assert len(course.served) < 20


# --- arithmetic -------------------------------------------------------------------------------------------------------


def course_of(
    requests: int = 100, ttft: float = 0.1, tpot: float = 0.01, tokens: int = 11, every: float = 0.2
) -> Course:
    """One user whose requests follow one another."""
    course = Course(begun=100.0)
    for number in range(requests):
        due = 100.0 + number * every
        arrivals = [due + ttft + tpot * index for index in range(tokens)]
        course.served.append(Served(due, due, arrivals[-1], 50, tokens, arrivals))
    course.stopped_sending = 100.0 + requests * every
    return course


def priced(usd_per_hour: float, **parts: float) -> Price:
    return Price(name="m", purchase="custom", usd_per_hour=usd_per_hour, source="test", date="", **parts)


def test_metrics_of_a_course_that_is_known() -> None:
    report = summarize(course_of(), "1 user", Slo(ttft_p95_ms=150), price=priced(3.6), concurrency=1)
    assert report is not None
    assert (report.requests, report.input_tokens, report.output_tokens) == (100, 5000, 1100)
    assert report.seconds == pytest.approx(20)
    assert report.output_tokens_per_second.value == pytest.approx(55)
    assert report.total_tokens_per_second.value == pytest.approx(305)
    assert report.requests_per_second == pytest.approx(5)
    assert report.tokens_per_second_per_user == pytest.approx(100)
    assert (report.ttft_ms.p50, report.ttft_ms.p99) == pytest.approx((100, 100))
    assert report.tpot_ms.mean == pytest.approx(10)
    assert report.itl_ms.p95 == pytest.approx(10)
    assert report.latency_ms.p95 == pytest.approx(200)
    assert report.goodput == pytest.approx(5)
    # $3.60 an hour is a thousandth of a dollar a second, which buys 305 tokens.
    assert report.usd_per_1m_tokens.value == pytest.approx(1000 / 305)
    assert report.usd_per_1m_tokens.low <= report.usd_per_1m_tokens.value <= report.usd_per_1m_tokens.high
    assert report.steady.steady


def test_a_price_of_a_busy_hour_and_egress_reach_the_tokens() -> None:
    # $3.60 an hour that is busy half the time: two thousandths of a dollar a second; and $0.40 for a million answered.
    price = priced(3.6, utilization=0.5, usd_per_busy_hour=7.2, egress_usd_per_1m_output=0.4)
    report = summarize(course_of(), "1 user", price=price, concurrency=1)
    assert report is not None
    assert report.usd_per_1m_output_tokens.value == pytest.approx(2000 / 55 + 0.4)
    assert report.usd_per_1m_tokens.value == pytest.approx(2000 / 305 + 0.4 * 55 / 305)


def test_requests_that_fail_or_come_late_miss_the_service_level() -> None:
    course = course_of()
    for item in course.served[::10]:
        item.fault, item.message = "status", "HTTP 429"
    for item in course.served[1::10]:
        item.arrivals = [moment + 1 for moment in item.arrivals]
    report = summarize(course, "1 user", Slo(ttft_p95_ms=150))
    assert report.failed == {"status": 10}
    assert report.slo_share.value == pytest.approx(0.8, abs=0.01)
    assert report.slo_share.low < 0.8 < report.slo_share.high


def test_the_warm_up_is_left_out() -> None:
    course = course_of(200)
    for number, item in enumerate(course.served[:30]):
        item.ended += 3.0 - number * 0.1
    report = summarize(course, "1 user")
    assert 25 <= report.steady.warm_up_requests <= 35
    assert report.latency_ms.p99 < 1000


def test_nothing_served_is_no_report() -> None:
    assert summarize(Course(begun=0.0), "1 user") is None


def test_wilson_against_the_textbook() -> None:
    # Newcombe (1998), table I: 81 of 263 and 0 of 20.
    assert (wilson(81, 263).low, wilson(81, 263).high) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert (wilson(0, 20).low, wilson(0, 20).high) == pytest.approx((0.0, 0.1611), abs=1e-4)


def test_the_interval_of_a_noisy_throughput_covers_the_truth() -> None:
    """Requests of random length one after the other: the long-run rate is known."""
    inside = 0
    for seed in range(200):
        generator = np.random.default_rng(seed)
        course, now = Course(begun=0.0), 0.0
        for _ in range(400):
            due, now = now, now + generator.exponential(0.1)
            course.served.append(Served(due, due, now, 10, 10, [now]))
        course.stopped_sending = now
        report = summarize(course, "x")
        inside += report.output_tokens_per_second.low <= 100 <= report.output_tokens_per_second.high
    assert inside >= 0.9 * 200


# --- steady state -----------------------------------------------------------------------------------------------------


def test_an_injected_drift_is_caught_and_a_level_series_is_left_alone() -> None:
    caught = false_alarms = 0
    for seed in range(300):
        noise = np.random.default_rng(seed).normal(0, 3, 20)
        caught += not drift(100 + noise + np.linspace(0, -20, 20)).steady
        false_alarms += not drift(100 + noise).steady
    assert caught >= 0.98 * 300
    assert false_alarms <= 0.03 * 300


def test_a_drift_too_small_to_matter_is_steady_however_certain() -> None:
    found = drift(np.linspace(100, 102, 20))
    assert found.p_value < 1e-6
    assert found.change == pytest.approx(0.02, abs=1e-3)
    assert found.steady


@pytest.mark.parametrize("values", [np.zeros(20), np.ones(3), np.array([])])
def test_series_that_tell_nothing_are_steady(values: np.ndarray) -> None:
    assert drift(values).steady


def test_no_warm_up_is_found_where_there_is_none() -> None:
    cuts = [warm_up(np.random.default_rng(seed).normal(1, 0.1, 200)) for seed in range(50)]
    assert np.median(cuts) <= 20
    assert max(cuts) <= 100
    assert warm_up(np.ones(7)) == 0


# --- the knee ---------------------------------------------------------------------------------------------------------


def simulated(users: int, capacity: int, requests: int, generator: np.random.Generator) -> LoadReport:
    """A server whose requests meet the level as long as no more than `capacity` come at once, mostly."""
    course, share = Course(begun=0.0), 0.995 if users <= capacity else 0.6
    for number in range(requests):
        late = generator.random() > share
        due = number / min(users, capacity + 2)
        course.served.append(Served(due, due, due + 1, 10, 10, [due + (0.5 if late else 0.05), due + 0.9]))
    course.stopped_sending = course.served[-1].due + 0.1
    return summarize(course, f"{users} users", Slo(ttft_p95_ms=100), priced(1.0), concurrency=users)


@pytest.mark.parametrize("capacity", [1, 3, 5, 8, 13])
def test_the_knee_is_the_largest_load_that_holds(capacity: int) -> None:
    generator = np.random.default_rng(capacity)
    knee = find_knee(lambda users, times: simulated(users, capacity, 150 * times, generator), 64)
    assert knee.concurrency == capacity
    assert not knee.at_the_limit
    assert len(knee.reports) <= 9


def test_no_load_holds_or_all_do() -> None:
    generator = np.random.default_rng(0)
    none = find_knee(lambda users, times: simulated(users, 0, 150 * times, generator), 64)
    assert none.concurrency is None
    assert len(none.reports) == 1
    every = find_knee(lambda users, times: simulated(users, 99, 150 * times, generator), 12)
    assert (every.concurrency, every.at_the_limit) == (12, True)


# --- workloads --------------------------------------------------------------------------------------------------------


def test_shapes_by_name_and_by_number() -> None:
    assert parse_shape("chat").input == Lengths(256)
    shape = parse_shape("512~0.5:128")
    assert (shape.input, shape.output) == (Lengths(512, 0.5), Lengths(128))
    sizes = np.array(list(itertools.islice(shape.sizes(0), 4000)))
    assert sizes[:, 0].mean() == pytest.approx(512, rel=0.03)
    assert sizes[:, 0].std() / sizes[:, 0].mean() == pytest.approx(0.5, rel=0.1)
    assert set(sizes[:, 1]) == {128}
    for wrong in ("caht", "0:4", "-1:4", "5:"):
        with pytest.raises(UsageError):
            parse_shape(wrong)


def test_poisson_arrivals_have_their_rate_and_repeat() -> None:
    moments = list(itertools.islice(poisson(5.0, seed=1), 5000))
    gaps = np.diff(moments)
    assert gaps.mean() == pytest.approx(0.2, rel=0.05)
    assert gaps.std() == pytest.approx(0.2, rel=0.07)
    assert moments == list(itertools.islice(poisson(5.0, seed=1), 5000))


def test_traces_of_three_kinds_say_the_same(tmp_path: Path) -> None:
    ours = tmp_path / "ours.jsonl"
    ours.write_text(
        '{"arrival": 3.5, "input_tokens": 100, "output_tokens": 20}\n\n'
        '{"arrival": 1.5, "input_tokens": 7, "output_tokens": 1}\n'
    )
    azure = tmp_path / "azure.csv"
    azure.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.5000000,7,1\n2023-11-16 18:15:48.5000000,100,20\n"
    )
    mooncake = tmp_path / "mooncake.jsonl"
    mooncake.write_text(
        '{"timestamp": 1500, "input_length": 7, "output_length": 1, "hash_ids": [1]}\n'
        '{"timestamp": 3500, "input_length": 100, "output_length": 20}\n'
    )
    expected = [Arrival(0.0, 7, 1), Arrival(2.0, 100, 20)]
    assert [read_trace(path) for path in (ours, azure, mooncake)] == [expected] * 3
    assert read_trace(ours, speed=4, length=0.5) == [Arrival(0.0, 4, 1), Arrival(0.5, 50, 10)]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"arrival": -1, "input_tokens": 5, "output_tokens": 5}', ":1: a request cannot arrive at -1 s"),
        ('{"arrival": 1, "input_tokens": 0, "output_tokens": 5}', ":1: input_tokens is 0"),
        ('{"arrival": 1, "input_tokens": 1.5, "output_tokens": 5}', ":1: input_tokens is 1.5"),
        ('{"arrival": "soon", "input_tokens": 1, "output_tokens": 5}', ":1: arrival is 'soon', not a number"),
        ('{"arrival": NaN, "input_tokens": 1, "output_tokens": 5}', ":1: arrival is nan"),
        ('{"input_tokens": 1, "output_tokens": 5}', ":1 has no arrival"),
        ('{"arrival": 1', ":1 is not JSON"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,1\n", ":2: TIMESTAMP is 'yesterday'"),
        ("", "has no requests"),
    ],
)
def test_a_bad_trace_says_which_line(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "trace").write_text(text)
    with pytest.raises(UsageError) as caught:
        read_trace(tmp_path / "trace")
    assert says in caught.value.message


def test_prompts_have_the_length_asked_for_and_never_repeat() -> None:
    prompts = Prompts(["one two three four five six", "seven eight nine"])
    first, second = prompts.ask(4, 1).prompt, prompts.ask(4, 1).prompt
    assert (first, second) == ("one two three", "four five six")
    seen = [prompts.ask(4, 1).prompt for _ in range(6)]
    assert len(set(seen)) == len(seen)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def words(tmp_path: Path) -> Path:
    path = tmp_path / "words.txt"
    path.write_text(" ".join(f"word{number}" for number in range(5000)) + "\n\nAnd more.")
    return path


def test_the_command_measures_loads_and_finds_the_knee(
    words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "very-secret")
    with serve(first=0.001, slots=2) as fake:
        done = CliRunner().invoke(
            main,
            [
                *("bench", fake.url + "/v1", "--text", str(words), "--workload", "8:4", "--requests", "40"),
                *("--concurrency", "1", "--concurrency", "4", "--rate", "200", "--price", "1.5"),
                *("--slo", "ttft_p95_ms=5000", "--knee", "4", "--json"),
                *("--csv", str(tmp_path / "r.csv"), "--vllm-json", str(tmp_path / "v.json")),
            ],
        )
    assert done.exit_code == 0, done.output
    report = bench.BenchReport.model_validate_json(done.stdout)
    assert [load.load for load in report.loads] == ["1 user", "4 users", "200 requests/s, Poisson"]
    assert all(load.requests + load.steady.warm_up_requests == 40 for load in report.loads)
    assert (report.model, report.knee.at_the_limit) == ("fake", True)
    assert report.knee.concurrency in (2, 4)  # two slots are full with either
    assert report.loads[0].usd_per_1m_tokens.value > 0
    table = (tmp_path / "r.csv").read_text().splitlines()
    assert table[0].startswith("load,due,sent,first_token")
    assert len(table) > 120
    assert len(json.loads((tmp_path / "v.json").read_text())) >= len(report.loads) + len(report.knee.reports)
    assert "very-secret" not in done.output + (tmp_path / "r.csv").read_text()


def test_the_table_reads_well_and_warns(words: Path) -> None:
    with serve(slots=2) as fake:
        command = ["bench", fake.url, "--text", str(words), "--workload", "8:4", "--requests", "30"]
        done = CliRunner().invoke(main, [*command, "--concurrency", "2"])
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[0] == f"fake at {fake.url}, custom (8 in, 4 out)"
    assert "2 users" in done.stdout
    assert "out tok/s" in done.stdout


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--workload", "caht"], 2, "unknown workload 'caht'"),
        (["--slo", "ttft=5"], 2, "unknown limit 'ttft'"),
        (["--slo", "ttft_p95_ms=fast"], 2, "not milliseconds"),
        (["--knee", "8"], 2, "--knee needs an SLO"),
        (["--price", "aws/c7i.lrage"], 2, "unknown price"),
        (["--concurrency", "0"], 2, "asks for nothing"),
        (["--trace", "missing.jsonl"], 2, "missing.jsonl cannot be read"),
    ],
)
def test_wrong_calls(words: Path, options: list[str], code: int, says: str) -> None:
    done = CliRunner().invoke(main, ["bench", "http://127.0.0.1:1", "--text", str(words), *options])
    assert (done.exit_code, says in done.stderr) == (code, True), done.stderr
    assert "Traceback" not in done.output


def test_servers_that_cannot_be_measured(words: Path) -> None:
    def run(*options: str) -> tuple[int, str]:
        done = CliRunner().invoke(main, ["bench", *options, "--text", str(words), "--workload", "4:2"])
        assert "Traceback" not in done.output
        return done.exit_code, done.stderr

    assert run("localhost:1")[0] == 2
    code, says = run("http://127.0.0.1:1")
    assert (code, "does not answer" in says) == (4, True), says
    with serve(models=("a", "b")) as fake:
        code, says = run(fake.url)
        assert (code, "serves 2 models: a, b" in says) == (2, True), says
        assert run(fake.url, "--model", "a")[0] == 0
    with serve(fault="status:429") as fake:
        code, says = run(fake.url)
        assert (code, "served none of" in says, "HTTP 429" in says) == (4, True, True), says


def test_ctrl_c_keeps_what_was_measured(words: Path, tmp_path: Path) -> None:
    with serve(first=0.01) as fake:
        command = [sys.executable, "-m", "pennyweight", "bench", fake.url, "--text", str(words), "--workload", "4:2"]
        process = subprocess.Popen(
            [*command, "--seconds", "300", "--json"], env={**os.environ, "PENNYWEIGHT_HOME": str(tmp_path)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
        )  # fmt: skip
        deadline = time.monotonic() + 120
        while len(fake.bodies) < 30 and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    report = bench.BenchReport.model_validate_json(out)
    assert report.interrupted
    assert report.loads[0].requests >= 10
    assert "cancelled" not in report.loads[0].failed


def test_the_shape_that_vllm_writes(words: Path, tmp_path: Path) -> None:
    from datetime import UTC, datetime

    course = course_of(10)
    report = summarize(course, "1 user", concurrency=1)
    shaped = vllm_bench(report, course.served, "m", None, datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC))
    assert (shaped["date"], shaped["max_concurrency"], shaped["completed"]) == ("20260102-030405", 1, 10)
    assert shaped["mean_ttft_ms"] == pytest.approx(100)
    assert shaped["p99_tpot_ms"] == pytest.approx(10)
    assert [len(gaps) for gaps in shaped["itls"]] == [10] * 10
    assert shaped["output_throughput"] == pytest.approx(report.output_tokens_per_second.value)
    json.dumps(shaped)


def test_a_workload_is_prepared_without_a_request_where_the_model_is_named(words: Path, tmp_path: Path) -> None:
    def prepared(*target: str, **options: object) -> bench.Settings:
        return prepare(Options(*target, text=words, **options), Store(tmp_path), ExitStack(), lambda _: None)

    settings = prepared("https://example.test/v1/", model="m", concurrency=(2,))
    assert settings.place.path == "https://example.test/v1/completions"
    with pytest.raises(UsageError, match=r"there is no model at 'example\.test'"):
        prepared("example.test")
    with pytest.raises(StageError, match="does not answer"):
        prepared("http://127.0.0.1:1")
