"""Sizes in bytes, as people write and read them."""

from __future__ import annotations

import re

from pydantic import ByteSize, TypeAdapter, ValidationError

from prunekit.errors import WrongInput

SIZE = re.compile(r"\d+(\.\d+)?\s*([kmgt]?i?b)?", re.IGNORECASE)  # ByteSize reads as far as it can: 1,5GB as 1 byte


def parse_size(text: str | int) -> int | None:
    """Parse an amount of memory.

    Args:
        text: bytes, a number with its unit as in 8GiB, or auto.

    Returns:
        Bytes; None for auto.

    Raises:
        WrongInput: it is no amount of memory.
    """
    text = str(text).strip()
    if text == "auto":
        return None
    try:
        size = TypeAdapter(ByteSize).validate_python(text) if SIZE.fullmatch(text) else 0
    except ValidationError:
        size = 0
    if size < 1:
        raise WrongInput(f"no amount of memory {text!r}; give auto, or as 8GiB, 500MB")
    return int(size)


def amount(number: float) -> str:
    """Format bytes: 1.50 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(number) < 1024 or unit == "GiB":
            break
        number /= 1024
    return f"{number:,.0f} B" if unit == "B" else f"{number:,.2f} {unit}"
