"""The `openvino` runtime: OpenVINO GenAI reads the checkpoint's integers from a GGUF file, and batches continuously.

What is judged is what serves: the same precisions and the same dynamic quantization of activations in both halves.
"""

from __future__ import annotations

import itertools
import secrets
import shutil
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pennyweight import machine
from pennyweight.errors import StageError
from pennyweight.formats import gguf
from pennyweight.formats.gguf.header import read_header
from pennyweight.records import Candidate, Checkpoint
from pennyweight.runtimes import (
    GREEDY,
    MOST_AT_ONCE,
    Batching,
    Generation,
    Limits,
    Occupancy,
    Progress,
    RuntimeKind,
    Sampling,
    Scored,
)

if TYPE_CHECKING:
    import numpy as np
    import torch

    from pennyweight.plan.sizes import ModelShape

MODEL = "model.gguf"
#: Tokens of prompts that are read in one step of the scheduler.
BATCHED_TOKENS = 2048
#: The same where prompts are to be read in small parts.
SMALL_STEP_TOKENS = 256
#: Tokens that are proposed and checked at once, and those of the longest sequence that is looked up in the prompt.
PROPOSED_TOKENS, LOOKED_UP_TOKENS = 4, 3
#: Kernels that are kept for shapes that were seen, in place of 5,000: steps of a server have ever new shapes, and its
#: memory would grow with each.
KEPT_KERNELS = 64


#: Name of a dtype as KV_CACHE_PRECISION.
CACHE_NAMES = {"bfloat16": "bf16", "float32": "f32"}


def computed_dtype() -> str:
    """OpenVINO's own choice on a CPU: bfloat16 where the machine multiplies it."""
    return "bfloat16" if machine.has_native_bf16() else "float32"


def compute_dtype(checkpoint: Checkpoint, device: str) -> str:
    return computed_dtype()


def export(checkpoint: Checkpoint, device: str, files: Path) -> None:
    """Write the GGUF file. Raises StageError where GGUF cannot hold the checkpoint, or OpenVINO would misread it."""
    written = gguf.write(Path(checkpoint.path), files / MODEL)
    if reason := written.unfit.get("OpenVINO GenAI"):
        raise StageError(f"OpenVINO GenAI would misread this checkpoint: {reason}", "take another runtime")


def sizes(files: Path) -> tuple[int, int]:
    """Bytes of the file, and of the tensors in it."""
    file = _file(files)
    return file.stat().st_size, sum(tensor.bytes for tensor in read_header(file).tensors)


def quantized_tensors(files: Path) -> int:
    return sum(tensor.type.startswith("Q") for tensor in read_header(files / MODEL).tensors)


def streamed_bytes(candidate: Candidate, shape: ModelShape) -> int:
    """All tensors but an embedding that is not the head too; what is wider than activations is narrowed when loaded."""
    from pennyweight.plan.sizes import ITEMSIZE

    tensors = {tensor.name: tensor for tensor in read_header(_file(Path(candidate.path))).tensors}
    if "output.weight" in tensors:
        del tensors["token_embd.weight"]
    itemsize = ITEMSIZE[candidate.dtype]
    return sum(min(tensor.bytes, tensor.elements * itemsize) for tensor in tensors.values())


@dataclass(frozen=True)
class Settings:
    """What of the engine may be turned."""

    batched_tokens: int = BATCHED_TOKENS
    prefix_caching: bool = False
    small_cache: bool = False
    prompt_lookup: bool = False
    draft: Candidate | None = None

    @property
    def speculates(self) -> bool:
        return self.prompt_lookup or self.draft is not None


def limits(candidate: Candidate) -> Limits:
    from pennyweight.plan.sizes import ITEMSIZE

    fields = read_header(_file(Path(candidate.path))).fields

    def number(name: str) -> int | None:
        return fields.get(f"{fields['general.architecture']}.{name}")

    heads = number("attention.head_count") or 1
    head_size = number("attention.key_length") or (number("embedding_length") or 0) // heads
    cached_heads = (number("block_count") or 0) * (number("attention.head_count_kv") or heads)
    return Limits(
        context=number("context_length"),
        vocabulary=fields["tokenizer.ggml.tokens"],
        token_bytes=2 * cached_heads * head_size * ITEMSIZE[computed_dtype()],
    )


def _file(path: Path) -> Path:
    """The GGUF file in a candidate's folder, or the file that a candidate is."""
    return path / MODEL if path.is_dir() else path


@dataclass
class _Flying:
    """A request in flight."""

    handle: Any
    sampling: Sampling

    def read(self) -> tuple[list[int], list[Scored] | None]:
        """The tokens that are new, and what the model thought of them."""
        tokens: list[int] = []
        logprobs: list[float] = []
        while self.handle.can_read():
            for output in self.handle.read().values():
                tokens += output.generated_ids
                if self.sampling.logprobs is not None:
                    logprobs += output.generated_log_probs
        if self.sampling.logprobs is None:
            return tokens, None
        alone = self.sampling.logprobs == 0
        return tokens, [Scored(top[1], () if alone else (top,)) for top in zip(tokens, logprobs)]


class OpenVinoSession:
    """Scores through the graph that OpenVINO GenAI makes of the file, generates through its continuous batching; each
    is loaded when first used."""

    batching: Batching = "continuous"

    def __init__(self, candidate: Candidate, device: str, settings: Settings = Settings()):
        self._file = _file(Path(candidate.path))
        self._settings = settings
        self._scorer: Any = None
        self._generator: Any = None
        self._numbers = itertools.count()
        self._flying: dict[int, _Flying] = {}
        self.context: int | None = limits(candidate).context
        self.at_once = MOST_AT_ONCE

    def logits(self, ids: np.ndarray) -> torch.Tensor:
        import numpy as np
        import torch

        request = self._load_scorer()
        request.reset_state()
        places = np.arange(ids.shape[1], dtype=np.int64)[None].repeat(len(ids), 0)
        done = request.infer(
            {
                "input_ids": np.ascontiguousarray(ids, np.int64),
                "attention_mask": np.ones(ids.shape, np.int64),
                "position_ids": places,
                "beam_idx": np.arange(len(ids), dtype=np.int32),
            },
            share_outputs=True,
        )
        return torch.from_numpy(done["logits"])

    def generate(self, ids: np.ndarray, new_tokens: int, stop: bool = False) -> Generation:
        import numpy as np

        self._load_generator()
        start = time.perf_counter()
        answers: dict[int, list[int]] = {self.submit(prompt, new_tokens, stop): [] for prompt in ids}
        reached: list[float] = []  # when every request has so many tokens; with `stop`, the first to end ends it
        while self._flying:
            for progress in self.step():
                answers[progress.request] += progress.tokens
            now = time.perf_counter()
            reached += [now] * (min(map(len, answers.values())) - len(reached))
        rows = list(answers.values())
        end, longest = _end(rows), max(map(len, rows))
        tokens = np.array([row + [end] * (longest - len(row)) for row in rows], np.int64)
        reached = reached or [time.perf_counter()]
        return Generation(reached[0] - start, np.diff(reached).tolist(), tokens)

    def objection(self, sampling: Sampling) -> str | None:
        """OpenVINO GenAI tells the log-probability of the token that it took, and of no other."""
        most = 1 if sampling.temperature == 0 else 0  # the likeliest is the one that is taken
        if (sampling.logprobs or 0) > most:
            return "openvino gives the log-probability of the token that is chosen, and of no alternatives"
        return None

    def submit(self, ids: np.ndarray, new_tokens: int, stop: bool = False, sampling: Sampling = GREEDY) -> int:
        import numpy as np
        import openvino
        import openvino_genai

        pipeline, number = self._load_generator(), next(self._numbers)
        settings = openvino_genai.GenerationConfig()
        settings.max_new_tokens, settings.ignore_eos = new_tokens, not stop
        settings.do_sample = sampling.temperature > 0
        if settings.do_sample:
            settings.temperature, settings.top_p = sampling.temperature, sampling.top_p
            settings.rng_seed = secrets.randbits(32) if sampling.seed is None else sampling.seed % 2**32
        settings.logprobs = int(sampling.logprobs is not None)
        if stop:
            settings.eos_token_id = pipeline.get_tokenizer().get_eos_token_id()
            settings.stop_token_ids = {settings.eos_token_id}
        if self._settings.speculates:
            settings.num_assistant_tokens = PROPOSED_TOKENS
        if self._settings.prompt_lookup:
            settings.max_ngram_size = LOOKED_UP_TOKENS
        prompt = openvino.Tensor(np.ascontiguousarray(ids[None], np.int64))
        self._flying[number] = _Flying(pipeline.add_request(number, prompt, settings), sampling)
        return number

    def step(self) -> list[Progress]:
        import openvino_genai

        self._generator.step()
        now = time.perf_counter()
        over = not self._generator.has_non_finished_requests()
        found = []
        for number, flying in list(self._flying.items()):
            tokens, scored = flying.read()
            finished = over or flying.handle.get_status() != openvino_genai.GenerationStatus.RUNNING
            if finished:
                del self._flying[number]
            if tokens or finished:
                found.append(Progress(number, tokens, now, finished, scored))
        return found

    def abort(self, request: int) -> None:
        """Its blocks of the cache are free after the next step."""
        flying = self._flying.pop(request, None)
        if flying is not None:
            flying.handle.cancel()
        if not self._flying:
            self._empty()

    def occupancy(self) -> Occupancy:
        if not self._flying:
            return Occupancy(0, 0.0)
        metrics = self._generator.get_metrics()
        return Occupancy(min(metrics.scheduled_requests, len(self._flying)), metrics.cache_usage / 100)

    def ends(self) -> list[int]:
        return [self._load_generator().get_tokenizer().get_eos_token_id()]

    def cancel(self) -> None:
        for flying in self._flying.values():
            flying.handle.cancel()
        self._flying.clear()
        self._empty()

    def _empty(self) -> None:
        """Let the engine put away what was cancelled."""
        while self._generator is not None and self._generator.has_non_finished_requests():
            self._generator.step()

    def forget_scorer(self) -> None:
        import gc

        self._scorer = None
        gc.collect()

    def close(self) -> None:
        import gc

        self._scorer = self._generator = None
        gc.collect()

    def _load_scorer(self) -> Any:
        if self._scorer is None:
            import openvino

            with tempfile.TemporaryDirectory(prefix="openvino-") as scratch:
                graph = _as_graph(self._file, Path(scratch))
                core = openvino.Core()
                # Read whole: the files behind a mapped model would be gone with their folder.
                core.set_property({"ENABLE_MMAP": False})
                properties: dict[str, Any] = _threads()
                if self._generator is not None:
                    # Kernels that are kept go with the process alone. Beside a generator a scorer only checks it, and a
                    # server would grow with each model that it checks.
                    properties["CPU_RUNTIME_CACHE_CAPACITY"] = 0
                self._scorer = core.compile_model(graph, "CPU", properties).create_infer_request()
        return self._scorer

    def _load_generator(self) -> Any:
        if self._generator is None:
            import openvino_genai

            scheduler = openvino_genai.SchedulerConfig()
            scheduler.max_num_batched_tokens = self._settings.batched_tokens
            scheduler.enable_prefix_caching = self._settings.prefix_caching
            scheduler.max_num_seqs = self.at_once
            with tempfile.TemporaryDirectory(prefix="openvino-") as scratch:
                properties = self._properties(Path(scratch))
                self._generator = openvino_genai.ContinuousBatchingPipeline(
                    str(self._file), scheduler, "CPU", properties
                )
        return self._generator

    def _properties(self, scratch: Path) -> dict[str, Any]:
        import openvino_genai

        found: dict[str, Any] = {**_threads(), "CPU_RUNTIME_CACHE_CAPACITY": KEPT_KERNELS}
        # OpenVINO's own choice, 8 bits, is not what the gate judged: the graph that scores keeps nothing.
        found["KV_CACHE_PRECISION"] = "u8" if self._settings.small_cache else CACHE_NAMES[computed_dtype()]
        if self._settings.prompt_lookup:
            found["prompt_lookup"] = True
        if self._settings.draft is not None:
            graph = _as_graph(_file(Path(self._settings.draft.path)), scratch)
            found["draft_model"] = openvino_genai.draft_model(str(graph.parent), "CPU", **_threads())
        return found


def _threads() -> dict[str, Any]:
    return {"INFERENCE_NUM_THREADS": machine.threads()}


def _as_graph(file: Path, scratch: Path) -> Path:
    """The graph that OpenVINO GenAI makes of a GGUF file, which it saves beside the file."""
    import openvino_genai

    copy = Path(shutil.copy(file, scratch / file.name))
    openvino_genai.LLMPipeline(
        str(copy), "CPU", scheduler_config=openvino_genai.SchedulerConfig(), enable_save_ov_model=True
    )
    return scratch / "openvino_model.xml"


def _end(answers: list[list[int]]) -> int:
    """What a shorter answer is filled up with: its own last token, the end of the sequence."""
    shortest = min(answers, key=len)
    return shortest[-1] if shortest else 0


LEVERS = {
    "prefix_caching": Settings(prefix_caching=True),
    "prompt_lookup": Settings(prompt_lookup=True),
    "small_cache": Settings(small_cache=True),
    "small_steps": Settings(batched_tokens=SMALL_STEP_TOKENS),
    "draft": Settings(),
}


def _load_with(lever: str, candidate: Candidate, device: str, draft: Candidate | None) -> OpenVinoSession:
    """A session with one lever on. `draft` is needed by the lever of that name alone."""
    settings = replace(LEVERS[lever], draft=draft) if lever == "draft" else LEVERS[lever]
    return OpenVinoSession(candidate, device, settings)


RUNTIME = RuntimeKind(
    version=2,
    libraries=("openvino-genai", "openvino", "gguf"),
    export=export,
    load=OpenVinoSession,
    compute_dtype=compute_dtype,
    limits=limits,
    sizes=sizes,
    quantized_tensors=quantized_tensors,
    levers={lever: partial(_load_with, lever) for lever in LEVERS},
    exact=False,  # it computes in bfloat16 where the machine has it, whatever the checkpoint is stored in
    streamed_bytes=streamed_bytes,
)
