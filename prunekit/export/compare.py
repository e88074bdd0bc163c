"""What an engine answers beside what the judged network answered, as rows of a table."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from prunekit.export.record import Record
from prunekit.plugins.exporter import Response


@dataclass(frozen=True)
class Row:
    """One thing that was compared."""

    what: str
    judged: str
    found: str
    agrees: bool | None = None  # None: it is only said


def compare(record: Record, response: Response, allowed: float) -> list[Row]:
    """Compare an engine's answers with those of the judged network.

    Args:
        record: of the network that was judged.
        response: of the engine, to the record's inquiry.
        allowed: largest difference of a log-probability, in nats. Where the judged network's two likeliest tokens are
            nearer to each other than twice that, either may be the engine's likeliest.

    Returns:
        One row for each of parameters, log-probabilities, likeliest tokens and continuation, as far as they were told.
    """
    rows = list[Row]()
    if response.parameters is not None:
        same = response.parameters == record.parameters
        rows.append(Row("parameters", f"{record.parameters:,}", f"{response.parameters:,}", same))
    if response.tensors is not None:
        rows.append(Row("tensors in the files", "all used", f"{response.tensors:,}, all used", True))
    off, told = (response.logprobs.double() - record.logprobs.double()).abs(), ~response.logprobs.isnan()
    if bool(told.any()):
        largest, mean = float(off[told].max()), float(off[told].mean())
        said = f"within {largest:.2g}, {mean:.2g} on average, of {int(told.sum()):,}"
        rows.append(Row("log-probabilities", f"within {allowed:.2g} nats", said, largest <= allowed))
    close = record.gaps <= 2 * allowed
    same, positions = response.likeliest == record.inquiry.tokens[..., 1], record.inquiry.ids.numel()
    ties = int((close & ~same).sum())
    said = f"{int(same.sum()):,} of {positions:,}" + (f", {ties:,} near-ties" if ties else "")
    rows.append(Row("likeliest tokens", f"{positions:,} positions", said, bool((same | close).all())))
    if record.inquiry.new_tokens:
        rows.append(_continuation(record, response, allowed))
    return rows


def _continuation(record: Record, response: Response, allowed: float) -> Row:
    """Greedy tokens, as far as no near-tie has led elsewhere."""
    wanted = record.continuation
    if response.continuation.shape != wanted.shape:
        return Row("greedy tokens", f"{len(wanted)}", f"{len(response.continuation)} tokens", False)
    differ = torch.nonzero(response.continuation != wanted).flatten().tolist()
    if not differ:
        return Row("greedy tokens", f"{len(wanted)}", f"{len(wanted)} of {len(wanted)}", True)
    first = differ[0]
    tie = bool(record.margins[first] <= 2 * allowed)
    said = f"the first {first} of {len(wanted)}" + (", then a near-tie" if tie else "")
    return Row("greedy tokens", f"{len(wanted)}", said, tie)
