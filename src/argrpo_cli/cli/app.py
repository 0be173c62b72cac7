"""The `argrpo` command: its sub-commands, and the one place where errors become a line and an exit code.

Every module below cli/ imports heavy libraries inside its functions, so that `argrpo --help` answers at once.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import Annotated

import typer

from argrpo_cli import __version__
from argrpo_cli.cli.entropy import entropy
from argrpo_cli.cli.evals import BENCHMARKS
from argrpo_cli.cli.list import list_command
from argrpo_cli.cli.push import push
from argrpo_cli.cli.sample import sample
from argrpo_cli.cli.score import score
from argrpo_cli.cli.train import train
from argrpo_cli.system.errors import UserError, one_line
from argrpo_cli.system.processes import LAST_WORDS

USER_ERROR, INTERRUPTED, TERMINATED = 2, 130, 143
_TERMINATED: list[int] = []  # the signal, once it came

# Typer has carried click as a dependency and as a copy of its own; this finds the class it really raises.
ClickException = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")

app = typer.Typer(
    name="argrpo",
    help="GRPO fine-tuning of autoregressive image models: draw, score, train, evaluate.",
    no_args_is_help=False,
    rich_markup_mode=None,  # plain help: quick to start and easy to pipe
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

benchmarks = typer.Typer(
    name="eval",
    help="Measure a policy, or finished pictures, by a benchmark.",
    no_args_is_help=False,
    rich_markup_mode=None,
    subcommand_metavar="BENCHMARK [ARGS]...",
)
for _name, _command in BENCHMARKS.items():
    benchmarks.command(_name)(_command)


@benchmarks.callback(invoke_without_command=True)
def _benchmark(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        raise UserError(f"eval needs a BENCHMARK: {', '.join(BENCHMARKS)}")


def _print_version(show: bool) -> None:
    if show:
        print(f"argrpo {__version__}")
        raise typer.Exit()


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


for _command in (sample, score, train, entropy, push):
    app.command()(_command)
app.command("list")(list_command(BENCHMARKS))
app.add_typer(benchmarks)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 for what the user can mend, 130 for Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    _TERMINATED.clear()
    try:
        code = app(args=arguments, prog_name="argrpo", standalone_mode=False)
        sys.stdout.flush()
    except UserError as error:
        return _complain(str(error))
    except ClickException as error:
        return _complain(_with_value(error, arguments))
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except BrokenPipeError:
        # The reader of our output (head, a pager) has gone; the interpreter must not flush to it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        return _complain(f"the system refused{where}: {error.strerror or error}")
    if code == INTERRUPTED:  # Typer turns KeyboardInterrupt into this code
        print(f"argrpo: {'terminated' if _TERMINATED else 'interrupted'}{_goes_on(arguments)}", file=sys.stderr)
        return TERMINATED if _TERMINATED else INTERRUPTED
    return code if isinstance(code, int) else 0


def _goes_on(arguments: Sequence[str]) -> str:
    """That the same command continues, of those that do."""
    command = next((one for one in arguments if not one.startswith("-")), "")
    kept = any(one.partition("=")[0] == "--out" for one in arguments) or arguments[:2] != ["eval", "nano"]
    if command not in ("sample", "score", "eval", "entropy") or arguments[:2] == ["eval", "report"] or not kept:
        return ""
    without = " without --overwrite" if "--overwrite" in arguments else ""
    return f"; the same command{without} goes on where it stopped"


def _terminate(number: int, frame: object) -> None:
    """SIGTERM is as Ctrl-C: what is begun is left in order."""
    _TERMINATED.append(number)
    raise KeyboardInterrupt


def main() -> None:
    """Entry point of the installed command."""
    sys.stdout.reconfigure(errors="backslashreplace")  # a name may hold what the terminal's encoding does not
    if "RANK" not in os.environ:  # of several processes a launcher ends the others, which have nothing to say
        signal.signal(signal.SIGTERM, _terminate)
    sys.exit(run())


def _complain(message: str) -> int:
    if "torch" not in sys.modules and os.environ.get("RANK", "0") != "0":
        time.sleep(LAST_WORDS)  # the first of several processes says the same
    else:
        print(f"argrpo: error: {one_line(message)}", file=sys.stderr)
    return USER_ERROR


def _with_value(error: Exception, arguments: Sequence[str]) -> str:
    """Typer's message, with the value given for the option it complains about, which it leaves out."""
    message = error.format_message().replace("Input should be", "must be").replace("Value error, ", "")
    for option in getattr(getattr(error, "param", None), "opts", ()):
        for position, argument in enumerate(arguments):
            name, equals, value = argument.partition("=")
            if name == option and (equals or position + 1 < len(arguments)):
                value = value if equals else arguments[position + 1]
                return f"{option} {value}: {message.partition(': ')[2] or message}"
    return message
