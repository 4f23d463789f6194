"""Tokens a second of `pennyweight serve` beside those of the bare runtime, in alternating turns of one run.

    python bench/serving.py TARGET [--concurrency 32] [--workload 128:64] [--rounds 2] [--runtime openvino]

The bare runtime is `pennyweight bench`'s engine in this process; the server is a process of its own, and the same load
generator asks it over HTTP from here. They share the machine, so that what the load generator takes, the server lacks:
its share of all cores is told beside each turn, and a second ratio leaves it out. The bar is 0.9.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "peers"))

from turns import order, ratio, show

from pennyweight import machine
from pennyweight.load import bench
from pennyweight.load.command import Options, prepare
from pennyweight.load.http import Endpoint
from pennyweight.load.requests import Asked
from pennyweight.store import Store

BAR = 0.9


@dataclass(frozen=True)
class Tokens(Endpoint):
    """A server that is asked in tokens: a text made of them, and read again, can have others."""

    def body(self, asked: Asked) -> dict[str, Any]:
        return super().body(asked) | {"prompt": list(asked.ids)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--workload", default="128:64")
    parser.add_argument("--requests", type=int, help="of each turn; by default eight for each user")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--runtime")
    parser.add_argument("--text", type=Path, help="that prompts are cut from; the shipped one by default")
    parser.add_argument("--port", type=int, default=8123)
    args = parser.parse_args()
    options = Options(
        args.target, runtime=args.runtime, workload=args.workload, concurrency=(args.concurrency,),
        requests=args.requests, text=args.text,
    )  # fmt: skip
    with ExitStack() as stack:
        bare = prepare(options, Store(), stack, print)
        runtime = ["--runtime", bare.place.runtime]
        url = stack.enter_context(served([args.target, "--name", "served", *runtime], args.port))
        http = replace(bare, place=Tokens(url, "served"))
        turns = {"bare": bare, "server": http}
        for settings in turns.values():  # whatever is done once, is done
            bench.run(replace(settings, requests=2 * args.concurrency), lambda _: None)
        speeds: dict[str, list[float]] = {name: [] for name in turns}
        clients: list[float] = []
        for number, name in order(list(turns), args.rounds):
            report = bench.run(turns[name], lambda _: None).report
            (load,) = report.loads
            share = report.client_cpu_share / machine.usable_cores()
            speeds[name].append(load.output_tokens_per_second.value)
            if name == "server":
                clients.append(share)
            print(
                f"round {number} {name:7} {load.output_tokens_per_second.value:7.1f} tokens/s  "
                f"ttft p95 {load.ttft_ms.p95:6.0f} ms  load generator {share:.1%} of the cores  "
                f"failed {sum(load.failed.values())}",
                flush=True,
            )
    found = ratio(speeds["server"], speeds["bare"])
    alone = [speed / (1 - share) for speed, share in zip(speeds["server"], clients)]
    print(f"server/bare at {args.concurrency}: {show(found)}; bar {BAR}")
    print(f"without what the load generator takes of the cores: {show(ratio(alone, speeds['bare']))}")


@contextmanager
def served(arguments: list[str], port: int) -> Iterator[str]:
    """The address of a server in a process of its own, once it is ready."""
    command = [sys.executable, "-m", "pennyweight", "serve", *arguments, "--port", str(port)]
    process = subprocess.Popen(command, env=os.environ)
    url = f"http://127.0.0.1:{port}"
    try:
        while process.poll() is None:
            with suppress(OSError):
                urllib.request.urlopen(f"{url}/ready").close()
                break
            time.sleep(0.2)
        else:
            raise SystemExit("the server did not start")
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


if __name__ == "__main__":
    main()
