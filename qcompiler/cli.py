"""`qcompile`: the command line.

`qcompile MODEL ...` compiles; `qcompile run|eval|bench|diagnose OUT ...` work on what came out. Standard output
carries results only (with --json one object, as the last line), standard error progress and messages.

Exit codes: 0 done; 1 a bug of ours; 2 bad input, one line says what, where, what to do; 130 interrupted;
143 terminated.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import typer
from typer.core import TyperGroup

from qcompiler.errors import QcompilerError

OTHER_COMMANDS = (
    "On a compiled folder: qcompile run, qcompile eval, qcompile bench, qcompile diagnose (each has --help)."
)
_INTERRUPTED = 130
_interrupts: list[int] = []  # that came


class _CompileByDefault(TyperGroup):
    """A group in which everything that is not the name of a command belongs to `compile`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or args[0] not in self.commands:
            args = ["compile", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(cls=_CompileByDefault, add_completion=False, pretty_exceptions_enable=False)


def _register() -> None:
    from qcompiler.commands import bench, compile, diagnose, evaluate, run  # noqa: A004

    app.command("compile", epilog=OTHER_COMMANDS)(compile.command)
    app.command("run")(run.command)
    app.command("eval")(evaluate.command)
    app.command("bench")(bench.command)
    app.command("diagnose")(diagnose.command)


_register()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave the process with its exit code.

    A request to terminate unwinds as an error does, so that it leaves nothing half-written behind.
    """
    if not sys.warnoptions:  # what libraries have to say of their own code is no message to the user
        warnings.simplefilter("ignore")
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    sys.exit(run_command(sys.argv[1:] if arguments is None else arguments))


def run_command(arguments: Sequence[str]) -> int:
    """Run one command line; every failure becomes one line on stderr and an exit code."""
    try:
        code = int(app(list(arguments), prog_name="qcompile", standalone_mode=False) or 0)
        return _interrupted() if code == _INTERRUPTED else code  # newer versions of typer catch the interrupt
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted()
    except QcompilerError as error:
        return _fail(str(error), 2)
    except MemoryError:
        return _fail("not enough memory; give fewer calibration samples, or a machine with more", 2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG):
            place = error.filename or "output"
            return _fail(f"{place}: {os.strerror(error.errno)}; free some room or choose another folder", 2)
        return _bug(error)
    except Exception as error:
        if _interrupts:  # libraries in C++ that call Python make another error of it
            return _interrupted()
        if hasattr(error, "format_message"):  # a usage error of typer, or of click in older versions of typer
            return _fail(_usage(error), 2)
        return _bug(error)


def _interrupt(number: int, frame: FrameType | None) -> None:
    _interrupts.append(number)
    signal.default_int_handler(number, frame)


def _interrupted() -> int:
    return _fail("interrupted; measurements so far are kept in the cache (not with --no-resume)", _INTERRUPTED)


def _fail(message: str, code: int) -> int:
    print(f"qcompile: {' '.join(message.split())}", file=sys.stderr)
    return code


def _usage(error: Any) -> str:
    text = str(error.format_message())
    return f"{text.strip().rstrip('.')}; see qcompile --help"


def _bug(error: Exception) -> int:
    with tempfile.NamedTemporaryFile("w", prefix="qcompile-", suffix=".log", delete=False) as file:
        file.write("".join(traceback.format_exception(error)))
    first = str(error).strip().splitlines()
    summary = f"{type(error).__name__}: {first[0][:200] if first else 'no message'}"
    return _fail(f"{summary}; this is a bug of qcompiler: please report it with {Path(file.name)}", 1)


if __name__ == "__main__":
    main()
