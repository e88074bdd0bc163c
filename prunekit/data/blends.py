"""Which sources each part of the data is of, in which shares; whose turn it is, window by window."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from prunekit.data.sources import Source, named, same_data, source_of, spread_out
from prunekit.data.spec import DataSpec, TextSpec
from prunekit.data.tokens import TokenBatch
from prunekit.errors import WrongInput
from prunekit.system.progress import Progress

Blend = Mapping[Source, Fraction]
"""The sources of one part with their shares, which add up to 1."""


def blends_of(data: DataSpec, progress: Progress, *, recovery: bool = False) -> dict[str, Blend]:
    """Part -> its sources; a part without a data set of its own has that of calibration, held out where it can be.

    Args:
        data: which text.
        progress: what the user is told.
        recovery: whether there is a part to train on.
    """
    known: list[Source] = []  # one stream has one name, so that no two parts take the same stretch of it

    def found(text: TextSpec, held_out: bool) -> Source:
        name = named(text.dataset, progress)
        same = next((source for source in known if same_data(source.dataset, name)), None)
        if same is None:
            return source_of(name, text.config, text.split, text.field or data.field, "train" if held_out else None)
        split = text.split or (None if held_out else same.split)
        return source_of(
            same.dataset, text.config or same.config, split, text.field or same.field, same.split if held_out else None
        )

    def blend(texts: Iterable[TextSpec], held_out: bool = False) -> Blend:
        weights: dict[Source, Fraction] = {}
        for text in spread_out(texts):
            source = found(text, held_out)
            if source in weights:
                raise WrongInput(f"{source} is given twice; give it once, with a weight")
            weights[source] = Fraction(str(text.weight))
        known.extend(source for source in weights if source not in known)
        return {source: weight / sum(weights.values()) for source, weight in weights.items()}

    calibration = blend(data.texts("dataset"))
    search = blend(data.texts("search_dataset")) or calibration
    learnt = {"recovery": blend(data.texts("recovery_dataset")) or calibration} if recovery else {}
    evaluation = data.texts("evaluation_dataset") or [
        text.model_copy(update={"dataset": source.dataset, "config": source.config, "split": data.evaluation_split})
        for text, source in zip(spread_out(data.texts("dataset")), calibration, strict=True)
    ]
    return {"calibration": calibration, "search": search, **learnt, "evaluation": blend(evaluation, held_out=True)}


def resolved(data: DataSpec, blends: Mapping[str, Blend]) -> dict[str, Any]:
    """The fields of `data` that say which text, with every choice made."""
    any_text = data.texts("dataset")[0]

    def written(part: str) -> tuple[TextSpec, ...]:
        whole = math.lcm(*(share.denominator for share in blends[part].values()))  # so that weights are exact
        values = [
            {
                "dataset": s.dataset,
                "config": s.config,
                "split": s.split,
                "field": s.field,
                "weight": float(share * whole),
            }
            for s, share in blends[part].items()
        ]
        return tuple(any_text.model_copy(update=value) for value in values)

    own = {part: getattr(data, f"{part}_dataset") is not None for part in ("search", "recovery") if part in blends}
    found: dict[str, Any] = {f"{part}_dataset": written(part) if named else None for part, named in own.items()}
    fields = {source.field for part in ("calibration", "evaluation") for source in blends[part]} - {None}
    if max(map(len, blends.values())) > 1 or fields - {data.field}:
        several = {"dataset": written("calibration"), "evaluation_dataset": written("evaluation")}
        return found | several | {"config": None, "split": None, "evaluation_split": None}
    (source,), (held_out,) = blends["calibration"], blends["evaluation"]
    found |= {"dataset": source.dataset, "config": source.config, "split": source.split}
    return found | {"evaluation_dataset": held_out.dataset, "evaluation_split": held_out.split}


def in_shares(blend: Blend, n: int) -> list[Source]:
    """Whose turn it is, n times: after every turn each source has had its share as nearly as whole turns allow.

    The next is the one with the largest share / (2 turns + 1), Webster's rule.

    Raises:
        WrongInput: n turns are too few for the smallest share.
    """
    turns, order = dict.fromkeys(blend, 0), list[Source]()
    for _ in range(n):
        order.append(max(blend, key=lambda source: blend[source] / (2 * turns[source] + 1)))
        turns[order[-1]] += 1
    if none := [str(source) for source, count in turns.items() if not count]:
        raise WrongInput(f"{n} windows leave none for {none[0]}; give more tokens, shorter windows or another weight")
    return order


def position(order: Sequence[Source], source: Source, n: int) -> int:
    """Where a source has its turn for the n-th time, counted from 0; the end where it has not."""
    return next(islice((i for i, turn in enumerate(order) if turn == source), n, None), len(order))


def interleaved(order: Sequence[Source], stretches: Mapping[Source, Tensor]) -> TokenBatch:
    """The windows of all sources, (windows, length) each, in the order of their turns."""
    labels: dict[Source, str] = {}
    for source in stretches:
        alike = sum(source.label == other.label for other in labels)
        labels[source] = f"{source.label}-{alike + 1}" if alike else source.label
    left = {source: iter(windows) for source, windows in stretches.items()}
    ids = torch.stack([next(left[source]) for source in order])
    origins = tuple(labels[source] for source in order) if len(labels) > 1 else ()
    return TokenBatch(ids, "+".join(labels.values()), origins)
