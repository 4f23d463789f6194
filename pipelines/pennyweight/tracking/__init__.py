"""MLflow: where runs are logged, and the registry that winners enter. Nothing outside this package imports mlflow.

`connection` reaches a server, `runs` logs a run, `live` a training as it goes, `registry` registers and fetches models,
`lifecycle` promotes them and rolls them back, after `checks`; each change is kept in a `ledger`, which `audit` reads.
`naming` says what a run's metrics, parameters and notes are called; `evidence`, `card`, `bom` and `signing` make what
lies beside a model's files. `garbage` removes what nothing reaches.
"""

from pennyweight.tracking.audit import History, format_history, history
from pennyweight.tracking.connection import check_reachable, redact, tracking_uri, ui_command
from pennyweight.tracking.garbage import ModelCollection, collect_models
from pennyweight.tracking.lifecycle import Promotion, promote, rollback
from pennyweight.tracking.live import training_curves
from pennyweight.tracking.registry import fetch_model, version_at
from pennyweight.tracking.runs import attach_files, log_run, log_serving

__all__ = [
    "History",
    "ModelCollection",
    "Promotion",
    "attach_files",
    "check_reachable",
    "collect_models",
    "fetch_model",
    "format_history",
    "history",
    "log_run",
    "log_serving",
    "promote",
    "redact",
    "rollback",
    "tracking_uri",
    "training_curves",
    "ui_command",
    "version_at",
]
