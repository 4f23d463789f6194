"""MLflow: where runs are logged, and the registry that winners enter. Nothing outside this package imports mlflow.

`connection` reaches a server, `runs` logs a run, `registry` registers, promotes and fetches models, `garbage` removes
what nothing reaches; `naming` says what a run's metrics, parameters and notes are called, and `evidence` what is
registered beside a model's files.
"""

from pennyweight.tracking.connection import check_reachable, redact, tracking_uri, ui_command
from pennyweight.tracking.garbage import ModelCollection, collect_models
from pennyweight.tracking.registry import Promotion, fetch_model, promote
from pennyweight.tracking.runs import attach_files, log_run, log_serving

__all__ = [
    "ModelCollection",
    "Promotion",
    "attach_files",
    "check_reachable",
    "collect_models",
    "fetch_model",
    "log_run",
    "log_serving",
    "promote",
    "redact",
    "tracking_uri",
    "ui_command",
]
