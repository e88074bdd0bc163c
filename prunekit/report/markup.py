"""Words and numbers as HTML: whatever they say, no word becomes markup."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any


def table(
    caption: str, heads: Sequence[str], rows: Iterable[Sequence[Any]], *, sortable: bool = False,
    filtered: bool = False, text: bool = False, first: int | None = None,
) -> str:  # fmt: skip
    """A table with a caption; its first cell in a row is a heading where it says something.

    Where a page can, it shows the `first` rows until all are asked for.
    """
    kind = " ".join(word for word, wanted in (("sortable", sortable), ("filtered", filtered), ("text", text)) if wanted)
    head = "".join(f'<th scope="col">{html.escape(each) or "<span class=hidden>place</span>"}</th>' for each in heads)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    capped = "" if first is None else f' data-first="{first}"'
    return (
        f'<div class="wide" tabindex="0" role="group" aria-label="{html.escape(caption)}">'
        f'<table class="{kind}"{capped}>'
        f"<caption>{html.escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def folded(summary: str, content: str) -> str:
    return f"<details><summary>{html.escape(summary)}</summary>{content}</details>"


def paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"
