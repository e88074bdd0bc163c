"""Times, as people write them."""

from __future__ import annotations

import re

from prunekit.errors import WrongInput

PART = re.compile(r"(\d+(?:\.\d+)?)\s*(h|min|m|s|)", re.IGNORECASE)
SECONDS = {"h": 3600, "m": 60, "min": 60, "s": 1, "": 1}


def as_seconds(text: str | float | None) -> float | None:
    """Parse a time.

    Args:
        text: seconds, or numbers with their units as in 45m, 1.5h or 1h30m; None stays None.

    Returns:
        Seconds.

    Raises:
        WrongInput: it is no time.
    """
    if text is None:
        return None
    left, seconds = str(text).strip(), 0.0
    while found := PART.match(left):
        number, unit = found.groups()
        seconds, left = seconds + float(number) * SECONDS[unit.lower()], left[found.end() :].strip()
        if not unit:  # nothing stands behind a bare number
            break
    if left or not 0 < seconds < float("inf"):
        raise WrongInput(f"no time {str(text)!r}; give it as 45m, 1h30m or 90s")
    return seconds
