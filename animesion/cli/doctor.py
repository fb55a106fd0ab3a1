"""`animesion doctor`: check the installation and print a fix for each problem."""

from __future__ import annotations

import click


@click.command(epilog="Example: animesion doctor")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def doctor(as_json: bool) -> None:
    """Check the installation, and print a fix for each problem.

    Exit status: 1 if something that every build needs is broken; missing optional parts are not an error.
    """
    from dataclasses import asdict

    from animesion.cli import environment

    found = environment.examine()
    broken = any(each.state == "broken" for each in found)
    if as_json:
        import json

        document = {"environment": environment.version_info().splitlines(), "ok": not broken}
        click.echo(json.dumps({**document, "findings": [asdict(each) for each in found]}, indent=1))
    else:
        click.echo(environment.version_info() + "\n")
        width = max(len(each.what) for each in found)
        for each in found:
            click.echo(f"{each.state:<8} {each.what:<{width}}  {each.detail}{f'  ->  {each.mend}' * bool(each.mend)}")
    if broken:
        raise SystemExit(1)
