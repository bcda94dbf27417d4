"""``lunet-fast doctor``: what is installed here, and whether it works."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from lunet_fast.cli.output import wide_console

_STYLES = {"ok": "green", "absent": "yellow", "broken": "bold red"}


def doctor_command(
    as_json: Annotated[
        bool, typer.Option("--json", help="For programs: an object with every finding.")
    ] = False,
) -> None:
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
    if as_json:
        report = {"ok": not broken, "findings": [asdict(finding) for finding in findings]}
        typer.echo(json.dumps(report, indent=2, ensure_ascii=False))
        raise typer.Exit(1 if broken else 0)
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
    raise typer.Exit(1 if broken else 0)
