"""The `animesion` command line: loads commands from entry points and reports errors in one sentence.

Each command has a file of its own, which parses options and prints results. It imports the code that does the work
only when it runs, so that `--help` and shell completion stay fast.
"""

from __future__ import annotations

import errno
import io
import os
import re
import resource
import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint

import click

from animesion.errors import AnimesionError
from animesion.executors.base import ONE_THREAD
from animesion_scrapers import plugins

_ORDER = [
    "init",
    "build",
    "recipes",
    "sources",
    "detectors",
    "detect",
    "stats",
    "verify",
    "diff",
    "audit",
    "card",
    "report",
]
_ORDER += ["browse", "log", "remove", "publish", "train", "eval", "predict", "explain", "gallery", "identify"]
_ORDER += ["export", "demo", "study", "profile", "models", "teachers", "embedders", "train-detector", "doctor"]

#: Bytes of address space under which libraries crash, and under which they get one thread each.
_LEAST, _AMPLE = 3_000_000_000, 8_000_000_000
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}
_NO_MEMORY = "error: this process is short of memory: free some or raise its limit, and run the same command again"
#: What other exceptions say where memory is short: a library cannot be loaded, or a thread cannot be started.
_MEMORY_FAULTS = ("failed to map segment", "cannot allocate memory", "Cannot allocate memory", "can't start new thread")


class Commands(click.Group):
    """Commands of the entry-point group `animesion.commands`, loaded on first use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the usual order of use; those of other packages come last."""
        return sorted(_points(), key=lambda name: (_ORDER.index(name) if name in _ORDER else len(_ORDER), name))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that the arguments name; an unknown one is an error that suggests the nearest.

        Raises:
            click.UsageError: there is no command of that name.
        """
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            from animesion.config.settings import nearest

            ctx.fail(f"there is no command '{name}'{nearest(name, self.list_commands(ctx))}")
        return super().resolve_command(ctx, args)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Load a command; None if there is no command of that name."""
        point = _points().get(name)
        command = point.load() if point else None
        return command if isinstance(command, click.Command) else None


def _points() -> dict[str, EntryPoint]:
    return {point.name: point for point in plugins.points("animesion.commands")}


def _version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        from animesion.cli import environment

        click.echo(environment.version_info())
        ctx.exit()


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Start with: animesion build daf-re --sample",
)
@click.option("--version", is_flag=True, is_eager=True, callback=_version, help="Show the version and the environment.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.pass_context
def cli(ctx: click.Context, debug: bool, version: bool) -> None:
    """Build and check datasets for fine-grained recognition, and train on them."""
    _fit_into_memory()
    ctx.obj = {"debug": debug}


def _fit_into_memory() -> None:
    """Prepare for a low limit of address space (`ulimit -v`), before a command loads NumPy.

    OpenBLAS reserves memory for each of its threads when it is loaded. Where that fails it tries again for ever, or the
    process crashes.

    Raises:
        AnimesionError: the limit is too low for the libraries.
    """
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY or limit >= _AMPLE:
        return
    if limit < _LEAST:
        raise AnimesionError(
            f"this process may use {limit / 1e9:.1f} GB of address space and needs {_LEAST / 1e9:.1f} GB: "
            "raise the limit (ulimit -v)"
        )
    for name, value in ONE_THREAD.items():
        os.environ.setdefault(name, value)


def _one_style(error: click.ClickException) -> str:
    """A message of click as this package writes its own: no capital, no full stop, and where to find help."""
    message = error.format_message().rstrip(".")
    if isinstance(error, click.NoSuchOption):
        near = (error.possibilities or [""])[0]
        message = f"there is no option '{error.option_name}'" + (f"; did you mean '{near}'?" if near else "")
    context = getattr(error, "ctx", None)
    option = error.param if isinstance(error, click.BadParameter) else None
    kind = option.type if option else None
    if option and isinstance(kind, click.Choice) and (given := re.match(r"'([^']*)'", str(error.message))):
        from animesion.config.settings import nearest

        values = [str(value) for value in kind.choices]
        hint = option.get_error_hint(context) if context else "value"
        message = f"{hint}: there is no '{given[1]:.80}'{nearest(given[1], values)}; values are {', '.join(values)}"
    if message[1:2].islower():  # not an acronym
        message = message[0].lower() + message[1:]
    return f"{message}; see {context.command_path} --help" if context else message


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 on success, 1 if it finds a fault, 2 on a usage error.

    Args:
        arguments: the command line without the program's name; `sys.argv` if None.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    # accepted anywhere on the line: users append it to a command that has just failed
    given = (["--debug"] if debug else []) + [argument for argument in given if argument != "--debug"]
    for stream in (sys.stdout, sys.stderr):  # class names are in any script, the terminal's encoding may not cover it
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        status = cli.main(args=given, prog_name="animesion", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(error.exit_code)
    except click.ClickException as error:
        click.echo(f"error: {_one_style(error)}", err=True)
        sys.exit(error.exit_code)
    except AnimesionError as error:
        if debug:
            raise
        # messages quote files and sites, whose control characters would act on the terminal
        click.echo(f"error: {''.join(c if c.isprintable() or c == chr(10) else '?' for c in str(error))}", err=True)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        if debug:
            raise
        click.echo("stopped: finished work is kept, run the same command again to resume", err=True)
        sys.exit(130)
    except BrokenPipeError:  # the reader closed the pipe, as in `animesion stats ... | head`
        sys.stderr.close()
        sys.exit(1)
    except OSError as error:
        if debug or error.errno not in {*_FULL, *_DENIED, errno.ENOMEM}:
            raise
        if error.errno == errno.ENOMEM:
            sys.exit(_NO_MEMORY)
        place = "".join(c if c.isprintable() else "?" for c in str(error.filename or "the output"))
        if error.errno in _DENIED:
            sys.exit(f"error: {place} cannot be read or written: {os.strerror(error.errno or 0).lower()}")
        sys.exit(f"error: no space left to write {place}: free some space and run the same command again")
    except (MemoryError, ImportError, RuntimeError) as error:
        if debug or not (isinstance(error, MemoryError) or any(text in str(error) for text in _MEMORY_FAULTS)):
            raise
        sys.exit(_NO_MEMORY)
    sys.exit(status if isinstance(status, int) else 0)
