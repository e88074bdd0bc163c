"""What went wrong, as one sentence on stderr and an exit code, whichever command it happened in."""

from __future__ import annotations

import errno
from typing import Any

import typer
from typer.core import TyperGroup

from prunekit.errors import CannotGoOn, WrongInput
from prunekit.system.ending import tidy_ending

BROKEN, WRONG, INTERRUPTED = 1, 2, 130  # exit codes


class Sentences(TyperGroup):
    """A group of commands that report errors as one sentence."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        asked = list(args)  # the parser empties it
        try:
            return super().make_context(info_name, args, parent, **extra)
        except Exception as error:
            raise (_wrong_usage(error, None) if asked and hasattr(error, "format_message") else error) from error

    def invoke(self, ctx: Any) -> Any:
        try:
            with tidy_ending():
                return super().invoke(ctx)
        except (WrongInput, ImportError) as error:
            raise _ended(str(error), WRONG) from error
        except PermissionError as error:
            raise _ended(f"{error.filename}: permission denied; choose another place", WRONG) from error
        except SystemExit as error:  # no command of ours says so, but what it called has: 0 would mean that all is well
            raise _ended(
                f"something that was called would end the process (SystemExit: {error.code})", BROKEN
            ) from error
        except CannotGoOn as error:
            raise _ended(str(error), BROKEN) from error
        except KeyboardInterrupt as error:
            again = "; the same command continues from here" if ctx.invoked_subcommand in ("prune", "tune") else ""
            raise _ended(f"interrupted{again}", getattr(error, "code", INTERRUPTED)) from error
        except Exception as error:
            # safetensors says so in words alone
            if getattr(error, "errno", None) == errno.ENOSPC or f"(os error {errno.ENOSPC})" in str(error):
                raise _ended("the disk is full; make room, and the same command continues from here", BROKEN) from error
            if hasattr(error, "format_message"):  # a wrong flag: the parser's own errors are not public
                raise _wrong_usage(error, ctx.invoked_subcommand) from error
            raise


def _ended(sentence: str, code: int) -> typer.Exit:
    typer.echo(f"error: {sentence}" if code in (BROKEN, WRONG) else sentence, err=True)
    return typer.Exit(code)


def _wrong_usage(error: Any, command: str | None) -> typer.Exit:
    """What the parser says, and where all options are listed."""
    page = f"prunekit {command} --help" if command is not None else "prunekit --help"
    return _ended(f"{error.format_message().rstrip('.')}; see {page}", WRONG)
