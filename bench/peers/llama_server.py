"""llama.cpp's server, run by the Python of an environment that has xllamacpp.

    python llama_server.py MODEL.gguf SLOTS TOKENS_A_SLOT THREADS

Prints its address, and serves until standard input ends. No cache of prompts: each is read from its first token.
"""

from __future__ import annotations

import os
import sys


def main() -> None:
    import xllamacpp

    model, slots, context, threads = sys.argv[1], *map(int, sys.argv[2:])
    settings = xllamacpp.CommonParams()
    settings.model.path = model
    settings.n_parallel, settings.n_ctx = slots, slots * context
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
    settings.cache_prompt, settings.cache_ram_mib, settings.n_ctx_checkpoints = False, 0, 0
    settings.verbosity = 0
    server = xllamacpp.Server(settings)
    print(server.listening_address, flush=True)
    sys.stdin.read()
    os._exit(0)  # its threads do not end by themselves while connections are open


if __name__ == "__main__":
    main()
