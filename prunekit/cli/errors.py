"""What went wrong, as one sentence on stderr and an exit code, whichever command it happened in."""

from __future__ import annotations

import errno
import sys
import traceback
from contextlib import ExitStack, redirect_stderr
from typing import Any

import typer
from typer.core import TyperGroup

from prunekit.errors import CannotGoOn, WrongInput, one_line
from prunekit.system.ending import tidy_ending
from prunekit.system.events import Events, Messages, open_events
from prunekit.system.progress import listening

BROKEN, WRONG, INTERRUPTED = 1, 2, 130  # exit codes
EVENTS = "prunekit.events"  # in the context: who is told what happens


class Ended(typer.Exit):
    """The end of a command, with what was said of it."""

    def __init__(self, sentence: str, code: int) -> None:
        super().__init__(code)
        self.sentence = sentence


def begin_events(ctx: typer.Context, place: str | None) -> str | None:
    """The callback of --json-lines: from here on programs are told what happens, until the command has ended."""
    if place is not None and not ctx.resilient_parsing:
        events = open_events(place)
        events.begin(str(ctx.info_name))
        told: ExitStack = ctx.find_root().with_resource(ExitStack())
        told.enter_context(listening(events))
        if events.owns_stderr:
            told.enter_context(redirect_stderr(Messages(events)))
        ctx.meta[EVENTS] = events
    return place


class Sentences(TyperGroup):
    """A group of commands that report errors as one sentence."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        asked = list(args)  # the parser empties it
        try:
            return super().make_context(info_name, args, parent, **extra)
        except Exception as error:
            raise (_wrong_usage(error, None) if asked and hasattr(error, "format_message") else error) from error

    def invoke(self, ctx: Any) -> Any:
        """Run a command, and tell programs how it ended; what it returns is its result."""
        try:
            result = self._invoke(ctx)
        except typer.Exit as ended:
            _tell_end(ctx, ended.exit_code, None, getattr(ended, "sentence", None))
            raise
        except BaseException as error:  # a fault of ours
            if (events := ctx.meta.get(EVENTS)) is not None and events.owns_stderr:
                traceback.print_exc(file=sys.stderr)  # as messages: nothing may follow the end
                _tell_end(ctx, BROKEN, None, f"{type(error).__name__}: {one_line(error)}")
                raise typer.Exit(BROKEN) from error
            _tell_end(ctx, BROKEN, None, f"{type(error).__name__}: {one_line(error)}")
            raise
        _tell_end(ctx, 0, result, None)
        return result

    def _invoke(self, ctx: Any) -> Any:
        try:
            with tidy_ending():
                return super().invoke(ctx)
        except (WrongInput, ImportError) as error:
            raise _ended(str(error), WRONG) from error
        except PermissionError as error:
            raise _ended(f"{error.filename}: permission denied; choose another place", WRONG) from error
        except SystemExit as error:  # no command of ours says so, but what it called has: 0 would mean that all is well
            if isinstance(error.__context__, BrokenPipeError):  # who reads has seen enough, as `head` does
                raise
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


def _tell_end(ctx: Any, code: int, result: object, error: str | None) -> None:
    if isinstance(events := ctx.meta.get(EVENTS), Events):
        if isinstance(sys.stderr, Messages):
            sys.stderr.finish()
        events.end(code, result, error)


def _ended(sentence: str, code: int) -> Ended:
    typer.echo(f"error: {sentence}" if code in (BROKEN, WRONG) else sentence, err=True)
    return Ended(sentence, code)


def _wrong_usage(error: Any, command: str | None) -> typer.Exit:
    """What the parser says, and where all options are listed."""
    page = f"prunekit {command} --help" if command is not None else "prunekit --help"
    return _ended(f"{error.format_message().rstrip('.')}; see {page}", WRONG)
