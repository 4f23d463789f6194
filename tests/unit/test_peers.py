"""The arithmetic behind bench/peers, and how other load generators' reports are read. Nothing is measured here."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

import pytest

# At the end: the folder's other names must not hide those of the tests.
sys.path.append(str(Path(__file__).parents[2] / "bench/peers"))
import clients
import load_generators
import turns


def test_everyone_takes_a_turn_forwards_and_back_in_every_round() -> None:
    expected = [(1, "a"), (1, "b"), (1, "b"), (1, "a"), (2, "a"), (2, "b"), (2, "b"), (2, "a")]
    assert list(turns.order(["a", "b"], 2)) == expected


def test_ratio_of_contenders_is_not_moved_by_a_machine_that_slows_down() -> None:
    speeds: dict[str, list[float]] = {"a": [], "b": []}
    for moment, (_, name) in enumerate(turns.order(["a", "b"], 3)):
        speeds[name].append((2.0 if name == "a" else 1.0) * math.exp(-0.03 * moment))
    found = turns.ratio(speeds["a"], speeds["b"])
    assert found.value == pytest.approx(2.0, rel=1e-12)
    assert found.low < 2.0 < found.high


def test_ratio_has_students_interval_on_logarithms() -> None:
    """ln 1, ln 2, ln 4: mean ln 2, standard error ln 2 / √3; the 97.5% quantile of t at 2 degrees is 4.302653."""
    found = turns.ratio([3.0, 4.0, 20.0], [3.0, 2.0, 5.0])
    half = 4.302653 * math.log(2) / math.sqrt(3)
    assert found.value == pytest.approx(2.0)
    assert (found.low, found.high) == pytest.approx((2 / math.exp(half), 2 * math.exp(half)), rel=1e-6)


def test_mean_has_students_interval() -> None:
    """The 97.5% quantile of t at 3 degrees is 3.182446."""
    found = turns.mean([1.0, 2.0, 3.0, 4.0])
    half = 3.182446 * math.sqrt(5 / 3 / 4)
    assert (found.value, found.low, found.high) == pytest.approx((2.5, 2.5 - half, 2.5 + half), rel=1e-6)


def test_numbers_are_shown_to_the_digits_of_their_value() -> None:
    assert turns.show(turns.mean([204.0, 206.0])) == "205 (192 to 218)"
    assert turns.show(turns.ratio([1.0, 1.0], [1.0, 1.0])) == "1.00 (1.00 to 1.00)"


#: Reports cut down to what is read of them.
GUIDELLM = {
    "metadata": {"version": 2, "guidellm_version": "0.8.1"},
    "benchmarks": [
        {
            "metrics": {
                "request_totals": {"successful": 40, "incomplete": 0, "errored": 1, "total": 41},
                "time_to_first_token_ms": {"successful": {"mean": 215.0, "median": 210.0}, "total": {"median": 1.0}},
                "inter_token_latency_ms": {"successful": {"mean": 21.0, "median": 20.5}, "total": {"median": 1.0}},
                "time_per_output_token_ms": {"successful": {"mean": 27.0, "median": 26.5}},
                "output_tokens_per_second": {"successful": {"mean": 305.0, "median": 290.0}, "total": {"mean": 1.0}},
            }
        }
    ],
}
OURS = {
    "loads": [
        {
            "requests": 35,
            "failed": {"dropped": 1},
            "steady": {"warm_up_requests": 5},
            "ttft_ms": {"mean": 215.0, "p50": 210.0},
            "tpot_ms": {"mean": 21.0, "p50": 20.5},
            "output_tokens_per_second": {"value": 305.0, "low": 300.0, "high": 310.0},
        }
    ]
}
VLLM = {
    "completed": 40,
    "failed": 1,
    "median_ttft_ms": 210.0,
    "median_tpot_ms": 20.5,
    "output_throughput": 305.0,
    "mean_ttft_ms": 215.0,
}


@pytest.mark.parametrize(
    ("read", "report"),
    [(clients.read_guidellm, GUIDELLM), (clients.read_pennyweight, OURS), (clients.read_vllm, VLLM)],
)
def test_reports_say_the_same_in_their_own_words(read: object, report: dict) -> None:
    assert read(report) == clients.Stated(210.0, 20.5, 305.0, requests=40, failed=1)


def test_what_a_server_saw_of_a_turn() -> None:
    """Two requests: tokens after 0.2 s and then every 20 ms; after 0.3 s and then every 40 ms."""
    seen = [(10.0, 10.2, 10.3, 6), (10.1, 10.4, 10.8, 11)]
    truth = load_generators.Truth.of(seen)
    assert truth.ttft_ms == pytest.approx(250.0)
    assert truth.tpot_ms == pytest.approx(30.0)
    assert truth.output_tokens_per_second == pytest.approx(17 / 0.8)


def outcome(ttft: float, cpu: float, seen: float) -> load_generators.Outcome:
    """A turn of 40 requests; half of its CPU time while it was served."""
    turn = clients.Turn(clients.Stated(ttft, 20.0, 300.0, 40, 0), cpu, cpu / 2, 1.0)
    return load_generators.Outcome(turn, load_generators.Truth(seen, 20.0, 300.0))


def test_load_generators_report_says_which_bars_are_met() -> None:
    outcomes = {
        "ours": [outcome(202.0, 0.4, 200.0), outcome(203.0, 0.4, 201.0)],
        "alike, dearer": [outcome(206.0, 0.8, 200.0), outcome(207.0, 0.8, 201.0)],
        "apart, cheaper": [outcome(280.0, 0.1, 200.0), outcome(281.0, 0.1, 201.0)],
    }
    stated, ratios, truth = "\n".join(load_generators.report(outcomes, could=320.0)).split("\n\n")
    assert "10.0 (10.0 to 10.0)  5.00 (5.00 to 5.00)" in stated.splitlines()[1]  # ms of CPU: in all, while served
    assert ratios.splitlines()[1].split()[-2:] == ["yes", "yes"]
    assert "0.500 (0.500 to 0.500)  0.500 (0.500 to 0.500)" in ratios.splitlines()[1]
    assert ratios.splitlines()[2].split()[-2:] == ["NO", "NO"]
    assert "+2.00 (+1.0%)" in truth.splitlines()[1] and truth.splitlines()[1].endswith("93.8%")
    assert "+80.00 (+39.9%)" in truth.splitlines()[3]


def test_cpu_time_of_a_turn_counts_what_the_client_started(tmp_path: Path) -> None:
    """A client whose child burns half a second of CPU: counted from start to end, and nothing of it once served."""
    burn = "import time\nwhile time.process_time() < 0.5: pass"
    os.mkfifo(tmp_path / "events")
    events = os.open(tmp_path / "events", os.O_RDWR)
    script = f"""
import os, subprocess, sys, time
subprocess.run([sys.executable, "-c", {burn!r}])
tell = os.open({str(tmp_path / "events")!r}, os.O_WRONLY)
os.write(tell, b"a")
time.sleep(0.1)
os.write(tell, b"d")
time.sleep(0.1)
print("{{}}")
"""
    stated = clients.Stated(1.0, 1.0, 1.0, requests=1, failed=0)
    client = clients.Client(lambda load, report: [sys.executable, "-c", script], lambda _: stated, {}, prints=True)
    load = clients.Load("", "", tmp_path, tmp_path, tmp_path, 1, 2, 1, requests=1)
    turn = clients.take_turn(client, load, os.sched_getaffinity(0), events)
    os.close(events)
    assert turn.cpu_seconds >= 0.5
    assert turn.serving_cpu_seconds < 0.25
