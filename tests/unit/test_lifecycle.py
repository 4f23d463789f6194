"""One embedded store for the whole module, as in test_tracking; the candidates' runtime is `bigrams`."""

import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bigrams
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from test_tracking import aliases_of, log, make_run, model_folder, register_versions

from pennyweight import checkpoints, installed, probe, runtimes, tracking
from pennyweight.cli import main
from pennyweight.errors import PennyweightError, SourceError, StageError, TrackingError, UsageError
from pennyweight.evaluate.divergence import likelihoods
from pennyweight.records import Candidate, CandidateResult, RunRecord
from pennyweight.store import folder_digest
from pennyweight.tracking import checks, evidence, ledger, signing


@pytest.fixture(scope="module")
def store(store: Path) -> Iterator[Path]:
    """Nobody signs, and nobody waits for a change that is half done."""
    with pytest.MonkeyPatch.context() as patch:
        for name in (signing.SIGNING_KEY, signing.VERIFY_KEY):
            patch.delenv(name, raising=False)
        patch.setenv("PENNYWEIGHT_HOME", str(store / "home"))
        patch.setattr(ledger, "PATIENCE", 0.0)
        yield store


@pytest.fixture(autouse=True)
def runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    bigrams.install(monkeypatch)


def register(
    store: Path, name: str, count: int = 1, change: Callable[[RunRecord], RunRecord] = lambda record: record
) -> list[RunRecord]:
    """As `register_versions`, each with what its winner says."""

    def probed(record: RunRecord) -> RunRecord:
        return change(record.model_copy(update={"probe": bigrams.probe_of(record.candidates[1].candidate)}))

    return register_versions(store, name, count, probed)


def states(model: str) -> list[tuple[str, str, str | None, str]]:
    return [(e.change.action, e.change.version, e.change.replaced, e.state) for e in tracking.history(model).entries]


# --- there and back ---------------------------------------------------------------------------------------------------


def test_promoting_moves_champion_and_previous_and_says_what_was_checked(store: Path, client: Any) -> None:
    record, _ = register(store, "moved", 2)
    first = tracking.promote("moved", 1)
    assert (first.version, first.replaced, first.changed) == ("1", None, True)
    assert aliases_of(client, "moved") == {"challenger": "2", "champion": "1"}
    second = tracking.promote("moved", reason="cheaper")
    assert (second.version, second.replaced, second.number) == ("2", "1", 2)
    assert aliases_of(client, "moved") == {"challenger": "2", "champion": "2", "previous": "1"}
    assert second.describe().startswith(
        "moved version 2 (int8@onnxruntime) is the champion now: its files are those that passed the gate; "
        "version 1 is previous\nloaded: 0 of 0.001 nats per token on 510 tokens, in the engine that judged"
    )
    trial = second.checks.trial
    assert (trial.tokens, trial.answer_tokens, trial.same_engine) == (2 * 255, 16, True)
    assert trial.divergence < 1e-10
    again = tracking.promote("moved")
    assert again.changed is False
    assert "champion already" in again.describe()

    entries = tracking.history("moved").entries
    assert [(entry.number, entry.after, entry.state) for entry in entries] == [(1, 0, "done"), (2, 1, "done")]
    change = entries[1].change
    assert (change.version, change.replaced, change.candidate, change.why) == ("2", "1", "int8@onnxruntime", "cheaper")
    assert change.who == ledger.who()
    assert change.run_id == client.get_model_version("moved", "2").run_id
    assert entries[0].change.checks.files_digest == record.candidates[1].candidate.digest
    shown = tracking.format_history(tracking.history("moved"))
    assert shown.startswith("moved: challenger is version 2, champion is version 2, previous is version 1\n\n")
    assert "2026" in shown and "cheaper" in shown and "gate: pass; files" in shown


def test_rolling_back_is_promoting_what_was(store: Path, client: Any) -> None:
    register(store, "back", 2)
    with pytest.raises(UsageError, match="back has no previous version to go back to"):
        tracking.rollback("back")
    tracking.promote("back", 1)
    with pytest.raises(UsageError, match="no previous"):
        tracking.rollback("back")
    tracking.promote("back", 2)
    done = tracking.rollback("back", reason="answers are odd")
    assert (done.action, done.version, done.replaced) == ("rollback", "1", "2")
    assert aliases_of(client, "back") == {"challenger": "2", "champion": "1", "previous": "2"}
    with pytest.raises(UsageError, match=r"version 2, was rolled back by .*: answers are odd") as caught:
        tracking.promote("back")
    assert "--version 2" in caught.value.hint
    tracking.promote("back", 2)
    assert aliases_of(client, "back") == {"challenger": "2", "champion": "2", "previous": "1"}
    assert states("back") == [
        ("promote", "1", None, "done"),
        ("promote", "2", "1", "done"),
        ("rollback", "1", "2", "done"),
        ("promote", "2", "1", "done"),
    ]


def test_a_candidate_is_loaded_in_its_own_runtime(
    store: Path, client: Any, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No stand-in: transformers, on a real checkpoint."""
    monkeypatch.undo()
    checkpoint = checkpoints.describe(tiny_model, "test")
    candidate = Candidate(
        id="int8@transformers", variant="int8", runtime="transformers", checkpoint=checkpoint, path=str(tiny_model),
        digest=checkpoint.digest, bytes=checkpoint.bytes, weight_bytes=checkpoint.weight_bytes, dtype="float32",
    )  # fmt: skip
    windows = np.random.default_rng(0).integers(0, 512, (4, 48))
    kind = runtimes.get("transformers")
    judged = likelihoods(kind.load(candidate, "cpu"), windows, 4)
    known = probe.take("text", windows, judged, runtimes.key("transformers", "cpu"), tolerance=0.02)
    record = make_run(store / "real", "real", model="real")
    result = record.candidates[1].model_copy(update={"candidate": candidate, "id": candidate.id})
    record = record.model_copy(
        update={"candidates": [record.candidates[0], result], "winner": candidate.id, "probe": known}
    )
    log(record)
    trial = tracking.promote("real").checks.trial
    assert trial.same_engine
    assert 0 <= trial.divergence < 1e-9
    assert 0 < trial.answer_tokens <= probe.ANSWER
    assert trial.answer_gap < 1e-3


# --- refusals ---------------------------------------------------------------------------------------------------------


def tamper_weights(folder: Path, client: Any) -> None:
    (folder / "model.onnx").write_bytes(b"evil")


def add_file(folder: Path, client: Any) -> None:
    (folder / "extra.py").write_text("print()")


def remove_evidence(folder: Path, client: Any) -> None:
    (folder / evidence.EVIDENCE).unlink()


def rewrite_evidence(folder: Path, client: Any) -> None:
    """Files, digests and evidence all agree, but not with what the registry holds."""
    (folder / "model.onnx").write_bytes(b"evil")
    attached = json.loads((folder / evidence.EVIDENCE).read_text())
    attached["files"]["model.onnx"] = evidence.file_digests(folder)["model.onnx"]
    attached["candidate"]["digest"] = evidence.digest_of_files(attached["files"])
    (folder / evidence.EVIDENCE).write_text(json.dumps(attached))


def rewrite_card(folder: Path, client: Any) -> None:
    (folder / evidence.CARD).write_text("# Perfect\n")


def fail_the_gate(folder: Path, client: Any) -> None:
    path = folder / evidence.EVIDENCE
    path.write_text(path.read_text().replace('"status": "pass"', '"status": "fail"'))
    client.set_model_version_tag("tampered", "2", "pennyweight.evidence_digest", evidence.file_digest(path))


@pytest.fixture(scope="module")
def tampered(store: Path, client: Any) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        bigrams.install(patch)
        register(store, "tampered", 2)
        tracking.promote("tampered", 1)
    return model_folder(client, "tampered", "2")


@pytest.mark.parametrize(
    ("tamper", "message", "by_force"),
    [
        (tamper_weights, "its files are not those that passed the gate: model.onnx was changed", False),
        (add_file, "extra.py is new", False),
        (remove_evidence, "has lost its evidence", False),
        (rewrite_evidence, "the evidence, pennyweight.json, was changed", False),
        (rewrite_card, "MODEL_CARD.md was changed", False),
        (fail_the_gate, "did not pass the gate: its verdict is fail", True),
    ],
)
def test_nothing_moves_when_files_or_evidence_changed(
    tampered: Path, client: Any, tmp_path: Path, tamper: Any, message: str, by_force: bool
) -> None:
    kept, tags = tmp_path / "kept", client.get_model_version("tampered", "2").tags
    shutil.copytree(tampered, kept)
    before = len(states("tampered"))
    try:
        tamper(tampered, client)
        with pytest.raises(TrackingError, match=message):
            tracking.promote("tampered")
        assert aliases_of(client, "tampered")["champion"] == "1"
        if by_force:
            forced = tracking.promote("tampered", force=True, reason="we know")
            assert forced.checks.overridden == [f"tampered version 2 {message}"]
        else:
            with pytest.raises(TrackingError, match=message):
                tracking.promote("tampered", force=True, reason="we know")
    finally:
        shutil.rmtree(tampered)
        shutil.copytree(kept, tampered)
        client.set_model_version_tag(
            "tampered", "2", "pennyweight.evidence_digest", tags["pennyweight.evidence_digest"]
        )
    assert len(states("tampered")) == before + by_force


def test_the_next_run_replaces_a_version_that_failed_verification(store: Path, client: Any) -> None:
    (record,) = register(store, "damaged")
    tamper_weights(model_folder(client, "damaged", "1"), client)
    with pytest.raises(TrackingError, match="files are not those"):
        tracking.promote("damaged")
    _, registered = log(record.model_copy(update={"started_at": "2026-11-25T00:00:00+00:00"}))
    assert registered.version == "2"
    assert tracking.promote("damaged").version == "2"
    assert aliases_of(client, "damaged") == {"challenger": "2", "champion": "2"}


def test_what_cannot_be_promoted(store: Path, client: Any) -> None:
    register(store, "bare")
    client.delete_registered_model_alias("bare", "challenger")
    with pytest.raises(UsageError, match="bare has no challenger"):
        tracking.promote("bare")
    with pytest.raises(UsageError, match="bare has no version 7") as caught:
        tracking.promote("bare", 7)
    assert caught.value.hint == "versions: 1"
    tracking.promote("bare", 1)
    with pytest.raises(UsageError, match="no registered model 'baer'") as caught:
        tracking.promote("baer")
    assert caught.value.hint == "did you mean 'bare'?"
    with pytest.raises(UsageError, match=r"no registered model 'bare\.histori'") as caught:
        tracking.rollback("bare.histori")
    assert "bare.history" not in caught.value.hint
    with pytest.raises(UsageError, match=r"bare\.history is the history of bare"):
        tracking.promote("bare.history", 1)
    with pytest.raises(UsageError, match="no registered model 'nobody'"):
        tracking.history("nobody")
    with pytest.raises(UsageError, match="--force needs a --reason"):
        tracking.promote("bare", 1, force=True, reason=" ")

    client.create_registered_model("foreign")
    client.create_model_version("foreign", source="s3://bucket/model")
    with pytest.raises(TrackingError, match="carries no evidence"):
        tracking.promote("foreign", 1, force=True, reason="ours")
    client.create_registered_model("squatted.history")
    register(store, "squatted")
    with pytest.raises(TrackingError, match=r"squatted\.history is a registered model"):
        tracking.promote("squatted")
    assert "champion" not in aliases_of(client, "squatted")


def test_what_loads_must_say_what_was_judged(store: Path, client: Any) -> None:
    """The files are right and so is the evidence; but the runtime makes something else of them."""

    def of_another(record: RunRecord) -> RunRecord:
        moved = np.array(record.probe.log_probs) + np.random.default_rng(0).normal(0, 0.3, (2, 255))
        return record.model_copy(update={"probe": record.probe.model_copy(update={"log_probs": moved.tolist()})})

    register(store, "other", change=of_another)
    for force in (False, True):
        with pytest.raises(StageError, match=r"does not say here what the gate judged: 0\.04") as caught:
            tracking.promote("other", force=force, reason="never")
        assert caught.value.exit_code == 4
    assert aliases_of(client, "other") == {"challenger": "1"}
    assert tracking.history("other").entries == []


@pytest.mark.parametrize(("noise", "moved"), [(0.1, True), (0.3, False)])
def test_another_engine_may_differ_by_the_parity_tolerance(store: Path, client: Any, noise: float, moved: bool) -> None:
    """Half the mean square: 0.005 nats per token at 0.1, 0.045 at 0.3; 0.02 are allowed elsewhere."""

    def judged_elsewhere(record: RunRecord) -> RunRecord:
        said = np.array(record.probe.log_probs) + np.random.default_rng(0).normal(0, noise, (2, 255))
        engine = {**record.probe.engine, "isa": ["another"]}
        probed = record.probe.model_copy(update={"log_probs": said.tolist(), "engine": engine})
        return record.model_copy(update={"probe": probed})

    name = f"elsewhere-{moved}".lower()
    register(store, name, change=judged_elsewhere)
    if not moved:
        with pytest.raises(StageError, match="does not say here"):
            tracking.promote(name)
        return
    trial = tracking.promote(name).checks.trial
    assert (trial.same_engine, trial.tolerance) == (False, 0.02)
    assert trial.divergence == pytest.approx(noise**2 / 2, rel=0.2)
    assert trial.delta_mean == pytest.approx(noise * np.sqrt(2 / np.pi), rel=0.1)
    assert "another engine or machine" in trial.describe()


class Stuttering(bigrams.Bigrams):
    """Its generating half chooses the worst token."""

    def columns(self, ids: np.ndarray, new_tokens: int, stop: bool) -> Iterator[np.ndarray]:
        yield self.table[ids[:, -1]].argmin(1)


class Broken(bigrams.Bigrams):
    def logits(self, ids: np.ndarray) -> torch.Tensor:
        raise RuntimeError("bad tensor\nand a stack of frames")


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (Stuttering, "answers a prompt with tokens that it would not choose"),
        (Broken, "cannot be served by onnxruntime: RuntimeError: bad tensor$"),
    ],
)
def test_what_loads_must_answer(
    store: Path, client: Any, monkeypatch: pytest.MonkeyPatch, load: Any, message: str
) -> None:
    name = load.__name__.lower()
    register(store, name)
    bigrams.install(monkeypatch, load)
    with pytest.raises(StageError, match=message):
        tracking.promote(name)
    assert "champion" not in aliases_of(client, name)


def test_a_missing_runtime_is_told_and_can_be_forced(store: Path, client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    register(store, "absent")
    monkeypatch.setattr(installed, "missing_packages", lambda runtime, device: ["onnxruntime-genai"])
    with pytest.raises(UsageError, match="onnxruntime is not installed, it needs onnxruntime-genai") as caught:
        tracking.promote("absent")
    assert caught.value.hint == "pip install 'pennyweight[cpu]'"
    assert aliases_of(client, "absent") == {"challenger": "1"}
    done = tracking.promote("absent", force=True, reason="the server has it")
    assert done.checks.trial is None
    (entry,) = tracking.history("absent").entries
    assert "is not installed" in entry.change.checks.overridden[0]
    assert "promote (forced)" in tracking.format_history(tracking.history("absent"))


def test_a_missing_probe_is_told_and_the_next_run_brings_one(store: Path, client: Any) -> None:
    (record,) = register(store, "unprobed", change=lambda record: record.model_copy(update={"probe": None}))
    with pytest.raises(TrackingError, match="was registered without a probe") as caught:
        tracking.promote("unprobed")
    assert "run the recipe again" in caught.value.hint
    probed = bigrams.probe_of(record.candidates[1].candidate)
    log(record.model_copy(update={"started_at": "2026-11-25T00:00:00+00:00", "probe": probed}))
    assert tracking.promote("unprobed").version == "2"


# --- crashes and rivals -----------------------------------------------------------------------------------------------


class DiedError(Exception):
    """Stands in for a process that is gone."""


def die_at(patch: pytest.MonkeyPatch, method: str, when: Callable[..., bool]) -> None:
    from mlflow import MlflowClient

    real = getattr(MlflowClient, method)

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        if when(*arguments):
            raise DiedError("connection reset")
        return real(self, *arguments, **options)

    patch.setattr(MlflowClient, method, call)


@pytest.mark.parametrize(
    ("method", "when"),
    [
        ("set_registered_model_alias", lambda model, alias, version: True),
        ("set_registered_model_alias", lambda model, alias, version: alias == "champion"),
        ("set_model_version_tag", lambda model, version, key, value: value == "done"),
    ],
    ids=["before the aliases", "between the aliases", "after the aliases"],
)
@pytest.mark.parametrize("mender", ["history", "promote", "rollback"])
def test_a_change_that_was_left_half_done_is_finished_by_the_next_command(
    store: Path, client: Any, request: pytest.FixtureRequest, method: str, when: Any, mender: str
) -> None:
    name = request.node.callspec.id.replace(" ", "-")
    register(store, name, 3 if mender == "promote" else 2)
    tracking.promote(name, 1)
    with pytest.MonkeyPatch.context() as patch:
        die_at(patch, method, when)
        with pytest.raises(TrackingError, match="failed in the middle of the promote: connection reset") as caught:
            tracking.promote(name, 2)
    assert "finishes it if it was" in caught.value.hint
    if mender == "history":
        found = tracking.history(name)
        assert found.aliases == {"challenger": "2", "champion": "2", "previous": "1"}
        assert found.entries[1].note.startswith(f"finished by {ledger.who()}")
        noticed = found.noticed
        assert tracking.history(name).noticed == []
    elif mender == "promote":
        noticed = tracking.promote(name).noticed
        assert aliases_of(client, name) == {"challenger": "3", "champion": "3", "previous": "2"}
    else:
        noticed = tracking.rollback(name).noticed
        assert aliases_of(client, name) == {"challenger": "2", "champion": "1", "previous": "2"}
    assert len(noticed) == 1
    assert f"change 2, a promote by {ledger.who()}, was left half done" in noticed[0]
    assert [state for *_, state in states(name)] == ["done"] * (2 if mender == "history" else 3)


def test_a_half_done_change_whose_version_is_gone_is_given_up(store: Path, client: Any) -> None:
    register(store, "vanished", 2)
    tracking.promote("vanished", 1)
    with pytest.MonkeyPatch.context() as patch:
        die_at(patch, "set_registered_model_alias", lambda model, alias, version: True)
        with pytest.raises(TrackingError):
            tracking.promote("vanished", 2)
    client.delete_model_version("vanished", "2")
    found = tracking.history("vanished")
    assert "was deleted before the aliases had moved" in found.noticed[0]
    assert found.aliases["champion"] == "1"
    assert states("vanished")[1] == ("promote", "2", "1", "failed")


def test_an_answer_that_was_lost_is_not_a_failure(store: Path, client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    register(store, "lossy")
    real = MlflowClient.create_model_version

    def lose(self: Any, *arguments: Any, **options: Any) -> None:
        real(self, *arguments, **options)
        raise DiedError("timed out")

    monkeypatch.setattr(MlflowClient, "create_model_version", lose)
    assert tracking.promote("lossy").changed
    assert states("lossy") == [("promote", "1", None, "done")]


def test_who_was_overtaken_moves_nothing(store: Path, client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """While version 2 is looked at, version 3 is promoted."""
    register(store, "overtaken", 3)
    tracking.promote("overtaken", 1)
    real = checks.examine

    def meanwhile(version: Any, *arguments: Any) -> Any:
        if str(version.version) == "2":
            tracking.promote("overtaken", 3, reason="first")
        return real(version, *arguments)

    monkeypatch.setattr(checks, "examine", meanwhile)
    with pytest.raises(TrackingError, match="made version 3 the champion meanwhile") as caught:
        tracking.promote("overtaken", 2)
    assert "pennyweight history overtaken" in caught.value.hint
    assert aliases_of(client, "overtaken") == {"challenger": "3", "champion": "3", "previous": "1"}
    assert [version for _, version, *_ in states("overtaken")] == ["1", "3"]


def test_of_two_that_saw_the_same_one_counts(store: Path, client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both looked before either wrote: the store's order decides, and the loser's entry is void for every reader."""
    register(store, "race", 3)
    tracking.promote("race", 1)
    seen = ledger.read(client, "race")
    real, calls = ledger.read, []

    def stale_once(*arguments: Any) -> Any:
        calls.append(arguments)
        return seen if len(calls) == 1 else real(*arguments)

    change = seen[0].change.model_copy(update={"version": "3", "replaced": "1", "key": "winner"})
    winner = ledger.append(client, "race", 1, change)
    assert winner.state == "begun"
    monkeypatch.setattr(ledger, "read", stale_once)
    with pytest.raises(TrackingError, match="made version 3 the champion meanwhile"):
        ledger.append(client, "race", 1, change.model_copy(update={"version": "2", "key": "loser"}))
    assert states("race")[1:] == [("promote", "3", "1", "done"), ("promote", "2", "1", "void")]
    assert aliases_of(client, "race")["champion"] == "3"
    tracking.promote("race", 2)
    assert [state for *_, state in states("race")] == ["done", "done", "void", "done"]


def test_who_wakes_late_ends_with_the_last_change(store: Path, client: Any) -> None:
    """A process recorded version 2 and slept; others finished that, and promoted version 3. Then it wakes."""
    register(store, "late", 3)
    tracking.promote("late", 1)
    tracking.promote("late", 2)
    asleep = ledger.read(client, "late")[-1]
    tracking.promote("late", 3)
    ledger.complete(client, "late", asleep)
    assert aliases_of(client, "late") == {"challenger": "3", "champion": "3", "previous": "2"}


def promote_in_a_process(folder: str, version: int, barrier: Any, results: Any) -> None:
    os.chdir(folder)
    os.environ["PENNYWEIGHT_HOME"] = f"{folder}/home"
    bigrams.install(pytest.MonkeyPatch())
    real = ledger.append

    def all_together(*arguments: Any) -> Any:
        barrier.wait(60)
        return real(*arguments)

    ledger.append = all_together
    try:
        results.put((version, tracking.promote("rivals", version).version))
    except PennyweightError as error:
        results.put((version, error.message))


def test_of_four_processes_one_wins(store: Path, client: Any) -> None:
    register(store, "rivals", 5)
    tracking.promote("rivals", 5)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mlflow", "test_lifecycle"])
    barrier, results = context.Barrier(4), context.Queue()
    processes = [
        context.Process(target=promote_in_a_process, args=(str(store), number, barrier, results))
        for number in range(1, 5)
    ]
    for process in processes:
        process.start()
    outcomes = dict(results.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(30)
    (winner,) = [version for version, outcome in outcomes.items() if outcome == str(version)]
    assert aliases_of(client, "rivals") == {"challenger": "5", "champion": str(winner), "previous": "5"}
    for version, outcome in outcomes.items():
        assert version == winner or f"made version {winner} the champion meanwhile" in outcome
    counted = [change for change in states("rivals") if change[3] != "void"]
    assert counted == [("promote", "5", None, "done"), ("promote", str(winner), "5", "done")]


# --- what others do to the registry -----------------------------------------------------------------------------------


def test_aliases_that_were_moved_by_hand_are_noticed_and_gone_on_from(store: Path, client: Any) -> None:
    register(store, "hand", 3)
    tracking.promote("hand", 1)
    client.set_registered_model_alias("hand", "champion", "2")
    (noticed,) = tracking.history("hand").noticed
    assert noticed.startswith("champion is version 2, and change 1 made it version 1: it was moved outside")
    done = tracking.promote("hand", 3)
    assert (done.replaced, done.noticed) == ("2", [noticed])
    assert aliases_of(client, "hand") == {"challenger": "3", "champion": "3", "previous": "2"}
    assert tracking.history("hand").entries[1].change.noticed == [noticed]


def test_versions_and_changes_that_were_deleted(store: Path, client: Any) -> None:
    register(store, "deleted", 3)
    tracking.promote("deleted", 1)
    tracking.promote("deleted", 2)
    client.delete_model_version("deleted", "2")
    (noticed,) = tracking.history("deleted").noticed
    assert "champion is no version, and change 2 made it version 2" in noticed
    with pytest.raises(UsageError, match="deleted has no version 2: it was never registered, or was deleted"):
        tracking.promote("deleted", 2)
    assert tracking.rollback("deleted").version == "1"
    tracking.promote("deleted", 3)
    assert aliases_of(client, "deleted") == {"challenger": "3", "champion": "3", "previous": "1"}
    client.delete_model_version("deleted.history", "3")
    assert "deleted from the history: change 3" in tracking.history("deleted").noticed
    tracking.rollback("deleted")
    assert [entry.number for entry in tracking.history("deleted").entries] == [1, 2, 4, 5]


def test_a_history_that_a_later_version_wrote_can_be_read(store: Path, client: Any) -> None:
    register(store, "newer")
    tracking.promote("newer")
    change = json.loads(client.get_model_version("newer.history", "1").tags[ledger.CHANGE])
    change["ticket"] = change["checks"]["weather"] = change["checks"]["trial"]["mood"] = "fine"
    client.set_model_version_tag("newer.history", "1", ledger.CHANGE, json.dumps(change))
    assert states("newer") == [("promote", "1", None, "done")]
    client.set_model_version_tag("newer.history", "1", ledger.CHANGE, "{}")
    with pytest.raises(TrackingError, match=r"version 1 of newer\.history is no entry of a history"):
        tracking.history("newer")


def test_the_history_explains_itself_in_the_registry(store: Path, client: Any) -> None:
    register(store, "shown")
    tracking.promote("shown", reason="a test")
    model = client.get_registered_model("shown.history")
    assert model.tags == {ledger.LEDGER: "shown"}
    assert "The history of the registered model `shown`" in model.description
    version = client.get_model_version("shown.history", "1")
    assert version.source == "models:/shown/1"
    assert not version.run_id  # else the run's page would show the history in the model's place
    assert client.get_model_version("shown", "1").run_id in version.description
    assert version.description.startswith("**promote**: shown version 1 (int8@onnxruntime) became champion.")
    assert "a test" in version.description and "loaded: " in version.description
    assert (version.tags["pennyweight.action"], version.tags["pennyweight.why"]) == ("promote", "a test")


# --- documents, formats and signatures --------------------------------------------------------------------------------


def test_formats_that_can_run_code_are_not_registered_and_not_fetched(store: Path, client: Any, tmp_path: Path) -> None:
    record = make_run(store / "pickled", "pickled", model="pickled")
    folder = Path(record.candidates[1].candidate.path)
    (folder / "weights.pt").write_bytes(b"")
    candidate = record.candidates[1].candidate.model_copy(update={"digest": folder_digest(folder)})
    result: CandidateResult = record.candidates[1].model_copy(update={"candidate": candidate})
    with pytest.raises(TrackingError, match=r"holds weights\.pt: only safetensors, ONNX, GGUF and text"):
        log(record.model_copy(update={"candidates": [record.candidates[0], result]}))
    register(store, "fetched")
    kept = model_folder(client, "fetched", "1")
    (kept / evidence.EVIDENCE).unlink()
    (kept / "code").mkdir()
    (kept / "code" / "loader.PY").write_text("")
    with pytest.raises(SourceError, match=r"holds code/loader\.PY"):
        tracking.fetch_model("models:/fetched/1", tmp_path)


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    for name in ("ours", "theirs"):
        key = ec.generate_private_key(ec.SECP256R1())
        private = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        (tmp_path / f"{name}.pem").write_bytes(key.private_bytes(serialization.Encoding.PEM, *private))
        public = serialization.PublicFormat.SubjectPublicKeyInfo
        (tmp_path / f"{name}.pub").write_bytes(key.public_key().public_bytes(serialization.Encoding.PEM, public))
    (tmp_path / "no.pub").write_text("no key")
    return tmp_path


def test_signed_versions(store: Path, client: Any, keys: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("model_signing")
    (record,) = register(store, "signed")
    with pytest.raises(TrackingError, match="signed version 1 is not signed"):
        tracking.promote("signed", verify_key=keys / "ours.pub")
    monkeypatch.setenv(signing.SIGNING_KEY, str(keys / "ours.pem"))
    _, registered = log(record.model_copy(update={"started_at": "2026-11-25T00:00:00+00:00"}))
    assert registered.version == "2"
    _, again = log(record.model_copy(update={"started_at": "2026-11-26T00:00:00+00:00"}))
    assert again.version == "2"
    with pytest.raises(TrackingError, match="its signature is not that of"):
        tracking.promote("signed", verify_key=keys / "theirs.pub", force=True, reason="no")
    with pytest.raises(UsageError, match="is no public key that can be read"):
        tracking.promote("signed", verify_key=keys / "no.pub")
    assert "champion" not in aliases_of(client, "signed")
    monkeypatch.setenv(signing.VERIFY_KEY, str(keys / "ours.pub"))
    done = tracking.promote("signed")
    assert done.checks.signed_by == signing.fingerprint_of(keys / "ours.pem")

    fetched = tracking.fetch_model("models:/signed@champion", tmp_path / "fetched")
    assert signing.check(fetched, keys / "ours.pub", "it") == done.checks.signed_by
    (fetched / "model.onnx").write_bytes(b"evil")
    with pytest.raises(TrackingError, match="signature"):
        signing.check(fetched, keys / "ours.pub", "it")


def test_signatures_without_the_library_name_the_extra(
    store: Path, client: Any, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(store, "unsigned")
    monkeypatch.setattr(signing, "installed_version", lambda package: None)
    with pytest.raises(UsageError, match="signatures need model-signing") as caught:
        tracking.promote("unsigned", verify_key=keys / "ours.pub")
    assert caught.value.hint == "pip install 'pennyweight[signing]'"
    monkeypatch.setenv(signing.VERIFY_KEY, str(keys / "gone.pub"))
    with pytest.raises(UsageError, match=r"PENNYWEIGHT_VERIFY_KEY names .*gone\.pub, and there is no such file"):
        tracking.promote("unsigned")


# --- the commands -----------------------------------------------------------------------------------------------------


def call(*arguments: str) -> Any:
    return CliRunner().invoke(main, arguments)


def test_the_commands(store: Path, client: Any) -> None:
    register(store, "called", 2)
    assert call("promote", "called", "--version", "1").exit_code == 0
    done = call("promote", "called", "--reason", "because", "--json")
    assert (done.exit_code, json.loads(done.stdout)["replaced"]) == (0, "1")
    assert "loading called version 2" in done.stderr
    back = call("rollback", "called")
    assert "called version 1 (int8@onnxruntime) is the champion now" in back.stdout
    shown = json.loads(call("history", "called", "--json").stdout)
    assert [entry["change"]["action"] for entry in shown["entries"]] == ["promote", "promote", "rollback"]
    assert shown["entries"][1]["change"]["why"] == "because"
    assert "because" in call("history", "called").stdout
    unknown = call("promote", "caled")
    assert (unknown.exit_code, "did you mean 'called'?" in unknown.stderr) == (2, True)
    assert call("promote", "called", "--force").exit_code == 2
    assert call("history", "nobody").exit_code == 2
    tamper_weights(model_folder(client, "called", "2"), client)
    assert call("promote", "called", "--version", "2").exit_code == 4
