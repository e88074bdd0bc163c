"""One stream of text, read and cut into windows of equal length: disjoint ones for each part of the data."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from itertools import groupby
from typing import Any, cast

import torch
from jaxtyping import Int64
from torch import Tensor

from prunekit.data.encoding import Encoder
from prunekit.data.sources import Source, slices
from prunekit.data.spec import DataSpec
from prunekit.errors import WrongInput
from prunekit.system.progress import Progress

DEFAULTS = {"calibration": 131_072, "search": 131_072, "recovery": 131_072, "evaluation": 65_536}  # tokens
JUDGED = 16_384  # tokens of search text that are enough to judge a result on, and for the searches of the presets
LEAST = 2_048  # tokens; with less than this in a part nobody asked for less, so we refuse
POOL = 16  # shuffled windows are drawn from up to this many times the text that is needed


def reach(windows: Mapping[str, int], data: DataSpec) -> int:
    """How many windows of a stream are looked at to take these."""
    if data.shuffle and windows.keys() != {"evaluation"}:
        return sum(windows.values()) * POOL
    return sum(windows.values()) + data.calibration_draw * windows.get("calibration", 0)


def cut(
    pool: Tensor, counts: Mapping[str, int], source: Source, data: DataSpec, seqlen: int, seed: int
) -> dict[str, Int64[Tensor, "windows seqlen"]]:
    """Disjoint windows of one stream for each part.

    Args:
        pool: its first windows, (windows, seqlen).
        counts: windows for each part.
        source: the stream, for messages.
        data: whether to shuffle, and which draw calibrates.
        seqlen: tokens of a window.
        seed: with `data.shuffle`, which windows.

    Raises:
        WrongInput: too little text for the draw.
    """
    pool = pool[: reach(counts, data)]  # where a run with these counts, which reads no further, ends too
    c, s, r, e = (counts.get(part, 0) for part in DEFAULTS)
    if data.shuffle and counts.keys() != {"evaluation"}:
        # evaluation is the end of the pool, so that which windows it holds does not hang on the seed
        evaluation, rest = pool[len(pool) - e :], pool[: len(pool) - e]
        rest = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))]
    else:
        evaluation, rest = pool[c + s : c + s + e], torch.cat([pool[: c + s], pool[c + s + e :]])
    # draws after the first lie behind all else, so that everything but calibration is the same for every draw
    begin = c + s + r + (data.calibration_draw - 1) * c if data.calibration_draw else 0
    if begin + c > len(rest):
        raise WrongInput(
            f"too little text: {source} has {pool.numel():,} tokens in whole windows of {seqlen}, not enough for "
            f"data.calibration_draw {data.calibration_draw}; give more text, or fewer data.calibration_tokens"
        )
    parts = {
        "calibration": rest[begin : begin + c],
        "search": rest[c : c + s],
        "recovery": rest[c + s : c + s + r],  # behind evaluation, which so is the same without it
        "evaluation": evaluation,
    }
    return {part: parts[part] for part in counts}


def read(
    tokenizer: Any, source: Source, windows: int, seqlen: int, progress: Progress, special_tokens: bool = False
) -> Int64[Tensor, "windows seqlen"]:
    """At most `windows` windows from the start of the stream, whose text may or may not spell special tokens."""
    limit, ids = windows * seqlen, array("q")
    encoder, met = Encoder(tokenizer, special_tokens), Counter[str]()
    with progress.stage(f"reading {source.label}", limit) as stage:
        for new in _encoded(encoder, source.pieces(encoder.chat, met)):
            stage.advance(min(len(new), limit - len(ids)))
            ids.extend(new)
            if len(ids) >= limit:
                break
    if met["empty"]:
        progress.say(f"note: {met['empty']:,} of {met['rows']:,} rows of {source} are empty or null; they are skipped")
    if met["conversations"] and not encoder.chats:
        progress.say(f"note: the tokenizer has no chat template; messages of {source} are joined by blank lines")
    whole = min(len(ids) // seqlen, windows)
    return torch.tensor(ids[: whole * seqlen], dtype=torch.int64).reshape(whole, seqlen)


def _encoded(encoder: Encoder, pieces: Iterable[str | list[int]]) -> Iterator[list[int]]:
    """Token ids of text, in slices that do not depend on how it comes in pieces, and those of conversations."""
    for is_text, run in groupby(pieces, lambda piece: isinstance(piece, str)):
        if is_text:
            yield from map(encoder, slices(cast(Iterator[str], run)))
        else:
            yield from cast(Iterator[list[int]], run)


def whole_windows(tokens: int, seqlen: int) -> int:
    """Windows of `seqlen` tokens that hold at most so many tokens, at least one."""
    return max(1, tokens // seqlen)


def shares(
    wanted: Mapping[str, int],
    free: Mapping[str, Fraction],
    pool: Tensor,
    seqlen: int,
    source: Source,
    progress: Progress,
) -> dict[str, int]:
    """Windows for each part: what was asked for in full, the `free` rest as near to what is wanted as the text allows.

    `free` holds the share that the source has in those parts.
    """
    counts = dict(wanted)
    if sum(counts.values()) <= len(pool):
        return counts
    left = len(pool) - sum(counts[part] for part in counts if part not in free)
    least = {part: min(counts[part], math.ceil(LEAST * share / seqlen)) for part, share in free.items()}
    share = (left - sum(least.values())) / max(1, sum(counts[part] - least[part] for part in free))
    if not free or share < 0:
        need = counts | least
        parts = ", ".join(f"{part} {n * seqlen:,}" for part, n in need.items())
        raise WrongInput(
            f"too little text: {source} has {pool.numel():,} tokens in whole windows of {seqlen}; "
            f"{sum(need.values()) * seqlen:,} are needed ({parts})"
        )
    counts |= {part: least[part] + int((counts[part] - least[part]) * share) for part in free}
    progress.say(
        f"note: {source} has {pool.numel():,} tokens; of these "
        + ", ".join(f"{counts[part] * seqlen:,} for {part}" for part in counts)
    )
    return counts
