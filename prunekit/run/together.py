"""What runs over one model measure together: one calibration pass, read by all whose candidates are the same."""

from __future__ import annotations

import json
from dataclasses import dataclass

from prunekit.plugins.signal import Signal
from prunekit.recipe.resolve import Parts
from prunekit.space.ladders import Space


@dataclass(frozen=True)
class Measures:
    """What a calibration pass measures beside the errors of its candidates, which do not depend on it."""

    signals: tuple[Signal, ...] = ()
    scores: bool = False  # what the pruner says each group is worth
    nats: bool = False  # what rungs cost in nats

    @classmethod
    def of(cls, parts: Parts, depth: int) -> Measures:
        """What the plug-ins of a recipe read, on a model of so many blocks."""
        return cls(parts.signals, "scores" in parts.allocator.needs, parts.prices_nats(depth))

    def joined(self, other: Measures) -> Measures:
        """What both read, each once, in an order that does not depend on theirs."""
        signals = {repr(signal): signal for signal in (*self.signals, *other.signals)}
        every = tuple(signals[name] for name in sorted(signals))
        return Measures(every, self.scores or other.scores, self.nats or other.nats)


def same_pass(parts: Parts, space: Space, depth: int) -> str:
    """A name that two recipes share whose first calibration passes make the same candidates.

    Args:
        parts: of a recipe with an allocator.
        space: the ladders of its first search.
        depth: blocks of the model.
    """
    recipe = parts.recipe
    return json.dumps(
        {
            "ladders": [list(ladder) for ladder in space.ladders],
            "data": recipe.data.model_dump(mode="json"),
            "alone": parts.prices_alone(depth),
            **{name: getattr(recipe, name) for name in ("structure", "pruner", "carry", "damping", "width", "seed")},
        },
        sort_keys=True,
        default=repr,
    )


def same_candidates(pass_: str, measures: Measures) -> str:
    """A name that runs share which read the same candidates: also those of several seeds, where nothing is drawn.

    Args:
        pass_: as of `same_pass`.
        measures: what it measures, for all who share it.
    """
    said = json.loads(pass_)
    if measures.nats or said["width"] is not None or said["data"]["shuffle"]:
        return pass_
    return json.dumps(said | {"seed": None}, sort_keys=True)
