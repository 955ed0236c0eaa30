"""A plug-in of pytest that shows each failure as it happens: on a machine lent for minutes, a run may be cut short."""

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        print(f"\nFAILED {report.nodeid}\n{report.longreprtext[-3000:]}", flush=True)
