"""What the winner said of a little text, kept so that its files can be asked again before they are served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pennyweight import probe as probing
from pennyweight import runtimes
from pennyweight.errors import StageError
from pennyweight.evaluate.divergence import likelihoods
from pennyweight.evaluate.evidence import Evidence
from pennyweight.records import Candidate, Probe
from pennyweight.stages.judging import load
from pennyweight.stages.making import PARITY_TOLERANCE
from pennyweight.stages.run import Run
from pennyweight.stages.texts import Texts


def probe(run: Run, winner: Candidate, windows: dict[str, np.ndarray], judged: Evidence, texts: Texts) -> Probe:
    """What the winner said of the first text that it was judged on, `windows` by name, int64 (windows, length).

    A suite that has no text is helped out with the text of the parity check, which the winner scores for it. Raises
    StageError where there is no text at all.
    """
    engine = runtimes.key(winner.runtime, run.device)
    for name, scored in judged.texts.items():
        return probing.take(name, windows[name], scored.nll, engine, PARITY_TOLERANCE)
    parity = texts.load("parity")
    if parity is None:
        raise StageError("there is no text to ask the winner about", "give the suite or the recipe a text")
    kept = parity[: probing.WINDOWS, : probing.LENGTH]

    def build(_: Path) -> dict[str, Any]:
        with stage.library():
            session = load(run, winner)
            found = likelihoods(session, kept, len(kept))
            session.close()
        return probing.take("parity", kept, found, engine, PARITY_TOLERANCE).model_dump(mode="json")

    inputs = {"candidate": winner.digest, "dtype": winner.dtype, "text": texts.digests["parity"], **engine}
    with run.stage("probe", winner.id) as stage:
        entry = run.store.get_or_build("probe", inputs, build)
        stage.reused = entry.reused
    return Probe.model_validate(entry.record)
