"""Verdicts and comparisons as JUnit XML, which continuous integration shows as tests."""

from __future__ import annotations

from xml.etree import ElementTree

from pennyweight.compare import Comparison
from pennyweight.gate.words import number
from pennyweight.records import CandidateResult, RunRecord


def of_run(record: RunRecord) -> str:
    """A test suite a variant's candidate, a test a condition. Inconclusive is a failure: nothing was proven."""
    suites = [_suite(result) for result in record.candidates if result.verdict.status != "base"]
    return _document(record.name, suites)


def of_comparison(found: Comparison) -> str:
    """A test a metric; it fails where ours is surely worse."""
    suite = ElementTree.Element("testsuite", name=f"{found.ours} against {found.theirs}")
    for metric in found.metrics:
        case = ElementTree.SubElement(suite, "testcase", classname="compare", name=metric.name)
        if metric.surely_worse:
            interval = f"{number(metric.difference.low, True)} to {number(metric.difference.high, True)}"
            message = f"{metric.name} {number(metric.difference.value, True)}, 95% interval {interval}"
            ElementTree.SubElement(case, "failure", message=message, type="worse")
    return _document("pennyweight compare", [suite])


def _suite(result: CandidateResult) -> ElementTree.Element:
    suite = ElementTree.Element("testsuite", name=result.id)
    if result.verdict.status == "error":
        case = ElementTree.SubElement(suite, "testcase", classname=result.id, name="made and measured")
        ElementTree.SubElement(case, "error", message="; ".join(result.verdict.reasons), type="error")
        return suite
    for condition, reason in zip(_names(result), result.verdict.reasons):
        status, _, words = reason.partition(": ")
        case = ElementTree.SubElement(suite, "testcase", classname=result.id, name=condition)
        if status == "info":
            ElementTree.SubElement(case, "skipped", message=words)
        elif status != "pass":
            ElementTree.SubElement(case, "failure", message=words, type=status)
    return suite


def _names(result: CandidateResult) -> list[str]:
    names = [condition.name for condition in result.verdict.conditions]
    return names + ["cost"] * (len(result.verdict.reasons) - len(names))


def _document(name: str, suites: list[ElementTree.Element]) -> str:
    root = ElementTree.Element("testsuites", name=name)
    for suite in suites:
        cases = suite.findall("testcase")
        suite.set("tests", str(len(cases)))
        suite.set("failures", str(sum(case.find("failure") is not None for case in cases)))
        suite.set("errors", str(sum(case.find("error") is not None for case in cases)))
        root.append(suite)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"
