"""``atedm doctor``: is everything installed, which code runs each op, and does it compute the right result?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atedm.cli.checks import check_json, failing_clearly

if TYPE_CHECKING:
    import torch


def doctor(
    json: Annotated[Path | None, typer.Option(help="Also write the findings to this file.")] = None,
) -> None:
    """Show versions, devices, and the backend of each op and why; test every op. Exit status 1 if a test fails."""
    import torch
    from rich.console import Console

    from atedm.app import report
    from atedm.app.selftest import native_library

    check_json(json)
    cases = [(torch.device("cpu"), dtype) for dtype in (torch.float32, torch.bfloat16)]
    for i in range(torch.cuda.device_count()):
        cases += [(torch.device("cuda", i), dtype) for dtype in (torch.float16, torch.bfloat16)]
    native, problems = native_library(), []
    rows = [row for device, dtype in cases for row in _rows(device, dtype, problems)]
    if json is not None:
        with failing_clearly():
            report.write_json(report.report(report.command_line(), cases[-1][0], {"native": native}, rows), json)
    console = Console()
    report.print_table(
        [{"name": name, "version": version or "not installed"} for name, version in report.versions().items()],
        {"name": "package", "version": "version"},
        "Versions",
        console,
    )
    if not torch.cuda.is_available():
        console.print("No CUDA or ROCm device is visible to torch: the Triton kernels are not in use.")
    console.print(f"Native CPU library: {native['library']}", markup=False)
    for isa, reason in native["isas"].items():
        console.print(f"  {isa}: {reason or 'runs here'}", markup=False)
    for problem in problems:
        console.print(problem, style="red", markup=False)
    columns = {
        "name": "op",
        "dtype": "dtype",
        "backend": "backend",
        "reason": "why",
        "error": "error",
        "limit": "limit",
        "result": "result",
    }
    for device in dict.fromkeys(row["device"] for row in rows):
        report.print_table([row for row in rows if row["device"] == device], columns, device, console)
    if json is not None:
        console.print(f"written: {json}", markup=False)
    failed = [row for row in rows if row["result"] != "ok"]
    if failed:
        console.print(f"[red]{len(failed)} of {len(rows)} checks failed.[/red]")
        raise typer.Exit(1)
    console.print(f"All {len(rows)} checks passed.")


def _rows(device: torch.device, dtype: torch.dtype, problems: list[str]) -> Iterator[dict[str, Any]]:
    """The result of the self-test for each op. If the test stops early, the reason is added to ``problems``."""
    from atedm.app import report
    from atedm.app.selftest import check_ops
    from atedm_kernels.registry import OPS

    outcomes = {}
    try:
        for check in check_ops(device, dtype):
            outcomes[check.op] = check
    except Exception as error:  # a crash is a finding: report it with what was found before
        problems.append(f"The self-test on {device} in {dtype} stopped: {type(error).__name__}: {error}")
    for op in OPS:
        backend, reason = _serving(op, device, dtype)
        check = outcomes.get(op)
        yield {
            "name": op,
            "device": f"{device} ({report.device_name(device)})",
            "dtype": str(dtype).removeprefix("torch."),
            "backend": backend,
            "reason": reason,
            "error": None if check is None else check.error,
            "limit": None if check is None else check.limit,
            "result": "ok" if check is not None and check.passed else "WRONG" if check else "did not run",
        }


def _serving(op: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    from atedm_kernels.registry import OPS

    try:
        return OPS[op].backend_for(device, dtype)
    except ValueError as error:
        return "none", str(error)
