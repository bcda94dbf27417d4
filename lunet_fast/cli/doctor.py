"""``lunet-fast doctor``: what is installed here, and whether it works."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import typer
from rich.table import Table
from rich.text import Text

from lunet_fast.cli.output import FigureOutput, wide_console
from lunet_fast.cli.signatures import grouped

if TYPE_CHECKING:
    from lunet_fast.doctor import Finding

_STYLES = {"ok": "green", "absent": "yellow", "broken": "bold red"}


@grouped
def doctor_command(*, output: FigureOutput) -> None:
    """Say what is installed and whether it works.

    Versions, extras, devices and the backend that computes on each; a small LU-Net that must invert, and
    whose log-determinant must be the Jacobian's; where MovieLens lies, and whether the cache can be written.
    Nothing is fetched or changed. Leaves with exit code 1 where something is broken; what is merely not
    installed or not there is named with the command that brings it.

    Examples:

        lunet-fast doctor

        lunet-fast doctor --json > report.json
    """
    from lunet_fast.doctor import examine

    findings = examine()
    broken = [finding for finding in findings if finding.state == "broken"]
    report = {"ok": not broken, "findings": [asdict(finding) for finding in findings]}
    output.figures(report, lambda: _show(broken if output.quiet else findings, broken))
    raise typer.Exit(1 if broken else 0)


def _show(findings: list[Finding], broken: list[Finding]) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    for column in ("section", "name", "state"):
        table.add_column(column, no_wrap=True)
    table.add_column("text", overflow="fold")
    section = ""
    for finding in findings:
        text = Text(finding.text)
        if finding.fix:
            text.append(f"\n→ {finding.fix}", style="bold")
        heading = finding.section if finding.section != section else ""
        table.add_row(heading, finding.name, Text(finding.state, style=_STYLES[finding.state]), text)
        section = finding.section
    wide_console().print(table)
    typer.echo(f"{len(broken)} broken: {', '.join(f.name for f in broken)}" if broken else "All right.")
