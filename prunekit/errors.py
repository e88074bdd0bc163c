"""What went wrong, in one sentence: what was asked, what there is, what to do."""

import difflib
import re
from collections.abc import Iterable

MOST_LETTERS = 600  # of what another library said


class WrongInput(ValueError):
    """The user asked for something that cannot be done. The command line shows the sentence and exits with 2."""


class CannotGoOn(RuntimeError):
    """A run met something it must not pass over. The command line shows the sentence and exits with 1."""


class NotVerified(RuntimeError):
    """What an exporter has written is not the model that was promised; says what differs."""


class PluginError(CannotGoOn):
    """A plug-in broke its contract; names the plug-in and the promise."""


def first_line(error: BaseException) -> str:
    """What another library said, in one line to go into a sentence of ours."""
    return (str(error).strip().split("\n")[0] or type(error).__name__).rstrip(".")


def one_line(error: BaseException) -> str:
    """All that another library said, advice that follows on later lines included, on one line."""
    return (" ".join(str(error).split())[:MOST_LETTERS] or type(error).__name__).rstrip(".")


def without_secrets(url: str) -> str:
    """An address without the user, the password and the query in it, which may be secrets."""
    return re.sub(r"[?#].*", "", re.sub(r"(?<=://)[^/]*@", "", url)) if "://" in url else url


def unknown(what: str, name: str, known: Iterable[object]) -> str:
    """One sentence for a name that is not there: the nearest, and all there are."""
    names = sorted(str(k) for k in known)
    near = difflib.get_close_matches(name, names, n=1)
    guess = f"did you mean {near[0]!r}? " if near else ""
    return f"no {what} {name!r}; {guess}there are {', '.join(names) or 'none'}"
