"""The stages: each takes small records, looks in the store, does its work where it must, and returns a record."""

from pennyweight.stages.judging import Part, Reference, evaluate, make_reference, part_of_suite
from pennyweight.stages.making import (
    PARITY_TOLERANCE,
    REFERENCE_RUNTIME,
    export,
    export_alone,
    fetch_base,
    fetch_bases,
    make_variant,
)
from pennyweight.stages.measuring import benchmark, levers
from pennyweight.stages.probing import probe
from pennyweight.stages.run import Run
from pennyweight.stages.texts import Texts, check_overlap, fetch_data, make_windows, totals

__all__ = [
    "PARITY_TOLERANCE", "REFERENCE_RUNTIME", "Part", "Reference", "Run", "Texts", "benchmark", "check_overlap",
    "evaluate", "export", "export_alone", "fetch_base", "fetch_bases", "fetch_data", "levers", "make_reference",
    "make_variant", "make_windows", "part_of_suite", "probe", "totals",
]  # fmt: skip
