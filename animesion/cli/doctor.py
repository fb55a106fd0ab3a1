"""`animesion doctor`: what is installed, what works here, and what to do about the rest."""

from __future__ import annotations

import click


@click.command(epilog="Example: animesion doctor")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def doctor(as_json: bool) -> None:
    """Look at the installation and this machine; name what is missing and the one command that adds it.

    Exit status 1 when something is broken that every build needs; what is missing and optional is no fault.
    """
    from dataclasses import asdict

    from animesion.cli import environment

    found = environment.examine()
    broken = any(each.state == "broken" for each in found)
    if as_json:
        import json

        document = {"environment": environment.described().splitlines(), "ok": not broken}
        click.echo(json.dumps({**document, "findings": [asdict(each) for each in found]}, indent=1))
    else:
        click.echo(environment.described() + "\n")
        width = max(len(each.what) for each in found)
        for each in found:
            click.echo(f"{each.state:<8} {each.what:<{width}}  {each.told}{f'  ->  {each.mend}' * bool(each.mend)}")
    if broken:
        raise SystemExit(1)
