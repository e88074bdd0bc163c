"""From a data set's name to windows of token ids that no two parts of the data share.

Text is one stream, tokenised in slices of 100,000 characters without special tokens and cut into windows of equal
length. Stretches of that stream follow each other: calibration, search, evaluation, and recovery where somebody trains;
where a data set has a held-out split, evaluation comes from there. Several data sets are cut each for itself and
interleaved. Windows that calibrate, are searched on or trained on begin as the model sees text when it is served: with
BOS where the tokenizer puts it. Those that judge are cut as everybody cuts them, so that perplexities compare.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from torch import Tensor

from prunekit.data.blends import Blend, blends_of, in_shares, interleaved, position, resolved
from prunekit.data.encoding import Encoder
from prunekit.data.fields import has
from prunekit.data.questions import drawn
from prunekit.data.sources import Source, named, source_of
from prunekit.data.spec import DataSpec
from prunekit.data.tokens import TokenBatch, overlap
from prunekit.data.windows import DEFAULTS, cut, reach, read, shares, whole_windows
from prunekit.errors import WrongInput
from prunekit.system.progress import Progress

LONGEST_WINDOW = 2_048  # tokens, unless asked for


@dataclass(frozen=True)
class Draws:
    """The tokens of a run."""

    calibration: TokenBatch
    search: TokenBatch
    evaluation: TokenBatch
    source: str  # resolved data set, split, field
    spec: DataSpec  # with every choice made and the digests filled in: draws the same tokens again
    recovery: TokenBatch | None = None  # to train on, where that was asked for
    contrast: TokenBatch | None = None  # as many tokens as for calibration, of the second data set if one is named


def draw(
    tokenizer: Any,
    data: DataSpec,
    progress: Progress | None = None,
    *,
    seed: int = 0,
    max_seqlen: int | None = None,
    vocab_size: int | None = None,
    recovery: bool = False,
    most: Mapping[str, int] = DEFAULTS,
) -> Draws:
    """Disjoint tokens for calibration, search and evaluation.

    Args:
        recovery: whether there are tokens to train on, too.
        most: tokens of parts whose amount `data` leaves open, where there is as much text.
        seed: with `data.shuffle`, which windows.
        max_seqlen: the longest window the model was made for.
        vocab_size: ids the model knows.

    Raises:
        WrongInput: no such data, too little of it, or not the tokens whose digests `data` holds.
    """
    progress = progress or Progress()
    blends = blends_of(data, progress, recovery=recovery)
    start = Encoder(tokenizer, data.special_tokens).start(data.window_start)
    bare = _gathered(tokenizer, blends, data, window_of(data, max_seqlen), seed, progress, most, start)
    if data.contrast_dataset is not None:
        second = source_of(named(data.contrast_dataset, progress), None, None, data.field)
        count, seqlen = bare["calibration"].ids.shape
        windows = read(tokenizer, second, count, seqlen, progress, data.special_tokens)
        shares({"contrast": count}, {}, windows, seqlen, second, progress)
        bare["contrast"], blends["contrast"] = TokenBatch(windows, second.label), {second: Fraction(1)}
    batches = {
        part: batch if part == "evaluation" or batch.answers is not None else batch.begun_with(start)
        for part, batch in bare.items()
    }
    for batch in batches.values():
        _check_vocabulary(batch, vocab_size)
    digests = {part: batch.digest for part, batch in batches.items()}
    for part, batch in batches.items():
        if batch.origins:
            digests |= {f"{part}/{label}": windows.digest for label, windows in batch.parts.items()}
    for part, digest in (data.digests or {}).items():
        if part in digests and digest != digests[part]:
            source = ", ".join(map(str, blends[part.split("/")[0]]))
            raise WrongInput(
                f"the recipe was made with other {part} tokens than {source} and this tokenizer give now "
                f"(sha256 {digests[part][:12]}…, not {digest[:12]}…); "
                "bring back the old text, or remove data.digests from the recipe"
            )
    _check_apart(bare, blends, progress)  # a start would hide that two windows hold one text
    spec = data.model_copy(
        update=resolved(data, blends)
        | {"seqlen": batches["calibration"].seqlen, "window_start": "bos" if start else "none", "digests": digests}
        | {f"{part}_tokens": batches[part].n_tokens for part in DEFAULTS if part in batches}
    )
    batches["search"] = replace(batches["search"], lessons=batches.get("recovery"))
    return Draws(**batches, source=", ".join(map(str, blends["calibration"])), spec=spec)


def draw_evaluation(
    tokenizer: Any,
    data: DataSpec,
    progress: Progress | None = None,
    *,
    max_seqlen: int | None = None,
    vocab_size: int | None = None,
) -> TokenBatch:
    """The first tokens of the held-out split, or of the whole text where there is none.

    Raises:
        WrongInput: no such data, or too little of it.
    """
    progress = progress or Progress()
    blends = {"evaluation": blends_of(data, progress)["evaluation"]}
    batch = _gathered(tokenizer, blends, data, window_of(data, max_seqlen), 0, progress)["evaluation"]
    _check_vocabulary(batch, vocab_size)
    return batch


def _gathered(
    tokenizer: Any,
    blends: Mapping[str, Blend],
    data: DataSpec,
    seqlen: int,
    seed: int,
    progress: Progress,
    most: Mapping[str, int] = DEFAULTS,
    start: Sequence[int] = (),
) -> dict[str, TokenBatch]:
    """The windows of every part, before they are given a start; no two parts share a window. Questions have theirs."""
    asked = {part: getattr(data, f"{part}_tokens") for part in blends}
    found: dict[str, TokenBatch] = {}
    for part in blends.keys() - {"search"}:
        if tasks := [source for source in blends[part] if source.is_task and not has(source.first_row, "text")]:
            raise WrongInput(f"{tasks[0]} holds questions, which only judge; give it as data.search_dataset")
    if any(source.is_task for source in blends.get("search", ())):
        tokens = asked["search"] or most["search"]
        order = seed if data.shuffle else None
        encoder = Encoder(tokenizer, data.special_tokens)
        found["search"] = drawn(encoder, blends["search"], tokens, seqlen, order, start)
    texts = {part: blend for part, blend in blends.items() if part not in found}
    orders = {part: in_shares(blend, whole_windows(asked[part] or most[part], seqlen)) for part, blend in texts.items()}
    pools: dict[Source, Tensor] = {}
    there: dict[Source, dict[str, int]] = {}  # windows for each part
    for source in dict.fromkeys(source for blend in texts.values() for source in blend):
        wanted = {part: orders[part].count(source) for part, blend in texts.items() if source in blend}
        pools[source] = read(tokenizer, source, reach(wanted, data), seqlen, progress, data.special_tokens)
        free = {part: texts[part][source] for part in wanted if asked[part] is None}
        there[source] = shares(wanted, free, pools[source], seqlen, source, progress)
    for part, order in orders.items():  # no further than the first source that has no more
        ends = [position(order, source, there[source][part]) for source in texts[part]]
        orders[part] = order[: min(ends)]
    stretches: dict[str, dict[Source, Tensor]] = {part: {} for part in texts}
    for source, pool in pools.items():
        counts = {part: orders[part].count(source) for part in there[source]}
        for part, windows in cut(pool, counts, source, data, seqlen, seed).items():
            stretches[part][source] = windows
    return found | {part: interleaved(orders[part], stretches[part]) for part in texts}


def amounts(data: DataSpec, seqlen: int, most: Mapping[str, int] = DEFAULTS) -> dict[str, int]:
    """Tokens of every part, in whole windows, where the text has as many; `most` where nobody has said how many."""
    asked = {part: getattr(data, f"{part}_tokens") or count for part, count in most.items()}
    return {part: whole_windows(tokens, seqlen) * seqlen for part, tokens in asked.items()}


def window_of(data: DataSpec, most: int | None) -> int:
    """Tokens of a window.

    Args:
        data: what was asked for.
        most: the longest window the model was made for; None: any.

    Raises:
        WrongInput: the model takes fewer.
    """
    if data.seqlen is None:
        return min(LONGEST_WINDOW, most or LONGEST_WINDOW)
    if most is not None and data.seqlen > most:
        raise WrongInput(f"seqlen {data.seqlen} is longer than the model's {most} positions")
    return data.seqlen


PAIRS = (
    ("search", "calibration"),
    ("evaluation", "calibration"),
    ("evaluation", "search"),
    ("evaluation", "recovery"),
    ("search", "recovery"),
    ("recovery", "calibration"),
    ("contrast", "calibration"),
    ("evaluation", "contrast"),
)


def _check_apart(batches: Mapping[str, TokenBatch], blends: Mapping[str, Blend], progress: Progress) -> None:
    """No part may be the text of another under a second name: it would judge by what was learnt by heart."""
    for part, other in PAIRS:
        if not {part, other} <= batches.keys() or not (share := overlap(batches[part], batches[other])):
            continue
        names = " and ".join(str(source) for each in (part, other) for source in blends[each])
        sets = ({source.dataset for source in blends[each]} for each in (part, other))
        if share == 1 and set.isdisjoint(*sets):  # a text that repeats itself, or its splits do, is only warned of
            raise WrongInput(
                f"{part} and {other} read the same text under two names, {names}; "
                f"give another text as data.{part}_dataset, or none"
            )
        progress.say(
            f"warning: {share:.1%} of the {part} windows are {other} windows too ({names}); they judge too kindly"
        )


def _check_vocabulary(batch: TokenBatch, vocab_size: int | None) -> None:
    if vocab_size is not None and int(batch.ids.max()) >= vocab_size:
        raise WrongInput(
            f"the tokenizer gives token id {int(batch.ids.max())}, the model knows {vocab_size}; "
            "give the tokenizer that belongs to the model"
        )
