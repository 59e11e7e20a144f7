"""What tests showed where: a pytest plugin that records it, and the table of docs/tensorrt.md made of the records.

    python -m pytest -m claim --what-ran=docs/what-ran-cpu.json
    python tests/what_ran.py

A test says what it shows by `@pytest.mark.claim("...")`. The first line runs every such test, but for those that need a
GPU or TensorRT where there is none, and records what became of it; the second makes the table of every
docs/what-ran-*.json, without running anything. What passed with the fixture `stand_in` did so without TensorRT,
wherever it ran.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "tensorrt.md"
BEGIN, END = "<!-- what ran: begin -->", "<!-- what ran: end -->"
PACKAGES = ("torch", "onnx", "onnxruntime", "onnxruntime-gpu", "triton", "nvidia-cuda-nvcc", "tensorrt")
PASSED, STOOD_IN, FAILED, NOT_RUN = "passed", "passed with a stand-in", "failed", "not run"


def pytest_addoption(parser: Any) -> None:
    """The option that asks for a record."""
    # A string, because pytest-xdist hands options to other processes.
    parser.addoption("--what-ran", metavar="FILE", help="write what tests with the marker `claim` showed, as JSON")


def pytest_configure(config: Any) -> None:
    """Record in the process that hears of all tests."""
    if config.getoption("--what-ran") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(Path(config.getoption("--what-ran"))))


def pytest_collection_modifyitems(config: Any, items: Sequence[Any]) -> None:
    """Have each test tell its claims, and leave out what cannot run here."""
    if not config.getoption("--what-ran"):
        return
    import pytest

    for item in items:
        passed = STOOD_IN if "stand_in" in item.fixturenames else PASSED
        item.user_properties += [(passed, mark.args[0]) for mark in item.iter_markers("claim")]
        lacking = _lacking({name for name in ("gpu", "tensorrt") if item.get_closest_marker(name)})
        if lacking:
            item.add_marker(pytest.mark.skip(reason=f"needs {' and '.join(lacking)}"))


class Recorder:
    """Counts, for each claim and each test of it, what became of its cases."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.claims: dict[str, dict[str, dict[str, dict[str, str]]]] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        """A case has failed if any of its phases has, and passed if its call has and nothing else failed."""
        for passed, claim in report.user_properties:
            if passed not in (PASSED, STOOD_IN):
                continue
            test, _, case = report.nodeid.partition("[")
            empty: dict[str, dict[str, str]] = {PASSED: {}, STOOD_IN: {}, FAILED: {}, NOT_RUN: {}}
            cases = self.claims.setdefault(claim, {}).setdefault(test, empty)
            if report.failed:
                cases[passed].pop(case, None)
                cases[FAILED][case] = report.when
            elif report.skipped:
                reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
                cases[NOT_RUN][case] = reason.removeprefix("Skipped: ")
            elif report.when == "call":
                cases[passed][case] = report.when

    def pytest_sessionfinish(self) -> None:
        """Write the record."""
        claims = {
            claim: {
                test: {
                    **{what: len(cases[what]) for what in (PASSED, STOOD_IN, FAILED)},
                    NOT_RUN: {reason: [*cases[NOT_RUN].values()].count(reason) for reason in cases[NOT_RUN].values()},
                }
                for test, cases in sorted(tests.items())
            }
            for claim, tests in sorted(self.claims.items())
        }
        record = {"machine": machine(), "claims": claims}
        self.path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def machine() -> dict[str, str]:
    """The GPU, and the versions of what is used."""
    found = {"gpu": "none", "driver": "none", "python": platform.python_version()}
    for name in PACKAGES:
        found[name] = "not installed"
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    if not _lacking({"gpu"}):
        from bakeout.export.tensorrt.library import gpu

        here = gpu("cuda")
        found |= {"gpu": here.name, "driver": here.driver}
    return found


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """The records as Markdown: a line for each claim of the first; what ran with a stand-in alone, or nowhere, last."""
    first = records[0]["claims"]
    columns = ["no GPU" if it["machine"]["gpu"] == "none" else it["machine"]["gpu"] for it in records]
    lines = [
        f"| what is claimed | {' | '.join(columns)} | shown by |",
        "|---" * (len(columns) + 2) + "|",
        f"| versions | {' | '.join(_versions(it['machine']) for it in records)} | |",
    ]

    def order(claim: str) -> tuple[list[bool], str]:
        counts = [each for it in records for each in it["claims"].get(claim, {}).values()]
        return [not any(each[what] for each in counts) for what in (PASSED, STOOD_IN)], min(first[claim])

    for claim in sorted(first, key=order):
        cells = [_cell(it["claims"].get(claim)) for it in records]
        files = dict.fromkeys(test.partition("::")[0] for test in first[claim])
        links = ", ".join(f"[{Path(file).name}](../{file})" for file in files)
        lines.append(f"| {claim} | {' | '.join(cells)} | {links} |")
    return "\n".join(lines)


def with_table(page: str, records: Sequence[Mapping[str, Any]]) -> str:
    """The page with the table between its marks. Raises ValueError if it has not each mark once."""
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"{PAGE} must have {BEGIN} and {END} once each")
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n{table(records)}\n{END}{rest.partition(END)[2]}"


def read_records(folder: Path = PAGE.parent) -> list[Any]:
    """Every record there, that of a machine without a GPU first."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("what-ran-*.json"))]
    return sorted(records, key=lambda it: it["machine"]["gpu"] != "none")


def _lacking(needs: set[str]) -> list[str]:
    """What a test with these markers needs and this machine does not have."""
    import torch

    lacking = ["an NVIDIA GPU"] if needs and not torch.cuda.is_available() else []
    return lacking + (["TensorRT"] if "tensorrt" in needs and find_spec("tensorrt") is None else [])


def _versions(found: Mapping[str, str]) -> str:
    there = {name: it for name, it in found.items() if name != "gpu" and it not in ("none", "not installed")}
    return ", ".join(f"{name} {it}" for name, it in there.items())


def _cell(tests: Mapping[str, Mapping[str, Any]] | None) -> str:
    if tests is None:
        return "not run: claimed later"
    sums = {what: sum(counts[what] for counts in tests.values()) for what in (FAILED, PASSED, STOOD_IN)}
    said = [f"**{what}** ({count})" if what == FAILED else f"{what} ({count})" for what, count in sums.items() if count]
    reasons = dict.fromkeys(reason for counts in tests.values() for reason in counts[NOT_RUN])
    said += [f"{NOT_RUN}: {reason}" for reason in reasons]
    return "; ".join(said).replace("|", "/")


def main() -> None:
    """Write the table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), read_records()), encoding="utf-8")


if __name__ == "__main__":
    main()
