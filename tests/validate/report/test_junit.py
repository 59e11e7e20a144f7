"""`junit.xml` says to a CI system what the report says."""

from __future__ import annotations

from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bakeout.validate.report.junit import to_junit
from bakeout.validate.report.schema import Check


def parsed(report):
    return ET.fromstring(to_junit(report))  # noqa: S314  (written a moment ago, by the code that is tested)


@pytest.mark.parametrize("name", ["pass", "fail", "unjudged"])
def test_every_check_is_a_case_of_its_target_s_suite(samples, name):
    report, _ = samples(name)
    root = parsed(report)
    cases = {
        (suite.get("name"), case.get("name")): [child.tag for child in case]
        for suite in root.iter("testsuite")
        for case in suite.iter("testcase")
    }
    tags = {"pass": "system-out", "fail": "failure", "unjudged": "error"}
    assert cases == {(check.target or "artifact", check.name): [tags[check.verdict]] for check in report.checks}
    assert {case.get("classname") for case in root.iter("testcase")} == {
        f"starless.{check.target or 'artifact'}" for check in report.checks
    }


@pytest.mark.parametrize("name", ["pass", "fail", "unjudged"])
def test_the_counts_add_up(samples, name):
    report, _ = samples(name)
    root = parsed(report)
    counted = {"tests": "testcase", "failures": "failure", "errors": "error", "skipped": "skipped"}
    for element in (root, *root.iter("testsuite")):
        assert {key: element.get(key) for key in counted} == {
            key: str(len(list(element.iter(tag)))) for key, tag in counted.items()
        }
    assert root.get("failures") == str(sum(check.verdict == "fail" for check in report.checks))
    assert root.get("errors") == str(sum(check.verdict == "unjudged" for check in report.checks))
    assert (name == "pass") == (root.get("failures") == root.get("errors") == "0")


def test_a_failure_says_what_was_found(samples, remake):
    report, _ = samples("pass")
    check = Check(name="weights", target=None, verdict="fail", summary='a <b> & "c"', measured=0.5, limit=1e-6)
    (failure,) = parsed(remake(report, verdict="fail", checks=(check,))).iter("failure")
    assert failure.get("message") == 'a <b> & "c"'
    assert failure.text == 'a <b> & "c"\nmeasured: 0.5\nlimit: at most 1e-06'


def test_each_suite_says_what_was_validated(samples):
    report, _ = samples("fail")
    suites = list(parsed(report).iter("testsuite"))
    assert len(suites) == 3
    for suite in suites:
        assert suite[0].tag == "properties"
        found = {it.get("name"): it.get("value") for it in suite[0]}
        assert (found["base"], found["edit"], found["manifest"]) == (report.base, report.edit, report.manifest)
        assert found["verdict"] == "fail"
        assert found["erased"] == report.erased[0]
        assert found["version of torch"] == report.tools["torch"]


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_any_text_gives_xml(samples, remake, text):
    check = Check(name=text, target=text, verdict="fail", summary=text)
    report = remake(samples("pass")[0], verdict="fail", checks=(check,), artifact=text, base=text, erased=(text,))
    (failure,) = parsed(report).iter("failure")
    allowed = "".join(
        letter
        if letter in "\t\n" or " " <= letter <= "\ud7ff" or "\ue000" <= letter <= "\ufffd" or letter > "\uffff"
        else "\ufffd"
        for letter in text.replace("\r", "\n")
    )
    assert failure.get("message").replace("\r", "\n") == allowed
