"""What a notebook shows of a result or a family: a table, and a picture where there is one."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prunekit.report.markup import paragraph
from prunekit.report.page.family import listed_members
from prunekit.report.page.result import facts
from prunekit.report.picture import draw


def show_result(report: Mapping[str, Any], directory: Path | None) -> str:
    """Make HTML of a result.

    Args:
        report: the content of report.json.
        directory: where it lies, if it was saved.
    """
    drawn = base64.b64encode(draw(report["sites"]).encode()).decode()  # as an image, whose style stays its own
    picture = f'<img alt="Share removed of every block" src="data:image/svg+xml;base64,{drawn}">'
    place = "" if directory is None else paragraph(f"In {directory}; prunekit report makes a page of it.")
    return facts(report) + picture + place


def show_family(document: Mapping[str, Any], directory: Path | None) -> str:
    """Make HTML of a family.

    Args:
        document: the content of pareto.json.
        directory: where it lies, if it was saved.
    """
    place = "" if directory is None else paragraph(f"In {directory}; prunekit report makes a page of it.")
    return listed_members(document) + place
