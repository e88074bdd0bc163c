"""Which cells of a comparison a time goes to: all on a part of the text, the better on more, none beyond the end.

Successive halving (Jamieson and Talwalkar, 2016, arXiv 1502.07943) over shares of the calibration text, with an end
that is kept: nothing is begun that, by what was measured so far, would not be done in time. Derived: what a cell takes
on more text is

    seconds(share) = passes(share) + rest(share)          (1)

where passes, which read the text, are as many times longer as those of cells measured at both shares were, and as the
text where none was; and the rest, such as the search and judging, is longer by what theirs was, and by the evaluation
text where none was. Between two shares passes are taken as linear, which is exact for a fixed part and one per token.

Several workers make rows side by side. What one of them begins must be done in time by itself, passes that only others
have included; what many rows take is bounded as in list scheduling (Graham, 1966), whatever their order:

    seconds(all) <= sum / workers + (1 - 1 / workers) longest          (2)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from prunekit.report.comparison import COMPLETE, DENSE, Row
from prunekit.system.progress import span

SHARES = QUARTER, HALF, WHOLE = (0.25, 0.5, 1.0)  # of the calibration text, one step after the other
TEXT = ("prune", "width", "learn")  # stages that read the calibration text
MARGIN = 1.1  # of what is foreseen: machines are not steady
TRIES = 2 / 3  # of the time, after which no further cell is tried
SPENT = "the time was spent before its turn"

Place = tuple[str, float]
"""A cell at a sparsity."""


@dataclass
class _Grown:
    """How seconds of the same cells grew from the smallest share to another."""

    before: float = 0.0  # of what reads the text, on the smallest
    after: float = 0.0
    more: float = 0.0  # of the rest
    cells: int = 0

    def add(self, before: _Cost, after: _Cost) -> None:
        """Count a cell that was measured on both."""
        self.before += before.text
        self.after += after.text
        self.more += after.rest - before.rest
        self.cells += 1


@dataclass(frozen=True)
class _Cost:
    """What a row took."""

    recipe: str
    passes: Mapping[str, float]  # calibration passes it read, as when they were made
    beside: float  # seconds of the stages of the text beside these
    rest: float  # all other seconds

    @property
    def text(self) -> float:
        return self.beside + sum(self.passes.values())


class Costs:
    """What the rows of a model took, and what cells will take on more text."""

    def __init__(self, evaluation: float = 0.0) -> None:
        """
        Args:
            evaluation: seconds that judging on the evaluation text takes, at most.
        """
        self.evaluation = evaluation
        self._of_recipe = dict[str, _Cost]()  # of who made it; another cell with the same recipe takes nothing
        self._tried = dict[Place, str]()  # recipe on the smallest share
        self._seen = dict[int, set[str]]()  # by who has made rows: passes that it has
        self._walls = dict[str, dict[float, float]]()  # by cell and sparsity: seconds that a try took
        self._mean, self._tries = 0.0, 0  # of these
        self._done = dict[tuple[float, int], set[str]]()  # (share, seed) -> recipes, as on the smallest share
        self._made = dict[tuple[float, int], set[str]]()  # -> passes, by their names on the smallest share
        self._grown = {share: _Grown() for share in SHARES[1:]}
        self._own = dict[Place, dict[float, float]]()  # share -> how many times as long passes took

    def add(self, row: Row, by: int = 0) -> None:
        """Learn from a row; one without a result says nothing.

        Args:
            row: that is there.
            by: number of the worker that has made it.
        """
        if row.state != COMPLETE or row.cell == DENSE:
            return
        seen = self._seen.setdefault(by, set())
        new = sum(spent for name, spent in row.passes.items() if name not in seen)
        seen |= set(row.passes)
        beside = max(0.0, sum(row.stages.get(stage, 0.0) for stage in TEXT) - sum(row.passes.values()))
        cost = _Cost(row.recipe, row.passes, beside, max(0.0, row.wall - new - beside))
        made = row.recipe not in self._of_recipe
        cost = self._of_recipe.setdefault(row.recipe, cost)
        place = (row.cell, row.sparsity)
        if row.share == QUARTER:
            if place not in self._tried:
                self._tries += 1
                self._mean += (row.wall - self._mean) / self._tries
            self._tried[place] = row.recipe
            self._walls.setdefault(row.cell, {})[row.sparsity] = row.wall
        base = self._base(place)
        if base is None:
            return
        self._done.setdefault((row.share, row.seed), set()).add(base.recipe)
        self._made.setdefault((row.share, row.seed), set()).update(base.passes)
        if row.share != QUARTER and made:
            self._grown[row.share].add(base, cost)
            if base.text:
                self._own.setdefault(place, {})[row.share] = cost.text / base.text

    def tried(self, place: Place) -> bool:
        """Whether something is known of a cell at a sparsity."""
        return place in self._tried

    def first(self, place: Place) -> float:
        """Seconds to try a cell on the smallest share: what it took at another sparsity, or what others take."""
        known = self._walls.get(place[0])
        return MARGIN * (max(known.values()) if known else self._mean)

    def together(
        self, places: Iterable[Place], share: float, seeds: Iterable[int] = (0,), *, anew: bool = False
    ) -> float:
        """Seconds of cells that were tried on the smallest share, on a larger one; what they share is counted once.

        Args:
            places: the cells.
            share: of the text.
            seeds: of each.
            anew: whether passes are made again that are there.
        """
        total, several = 0.0, list(places)
        for seed in seeds:
            done, made = set(self._done.get((share, seed), ())), set[str]()
            if not anew:
                made |= self._made.get((share, seed), set())
            for place in several:
                base = self._base(place)
                if base is None or base.recipe in done:
                    continue
                text = base.beside + sum(spent for name, spent in base.passes.items() if name not in made)
                total += MARGIN * (self._times(place, share) * text + self._rest(base, share))
                done.add(base.recipe)
                made.update(base.passes)
        return total

    def _base(self, place: Place) -> _Cost | None:
        recipe = self._tried.get(place)
        return None if recipe is None else self._of_recipe[recipe]

    def _times(self, place: Place, share: float) -> float:
        """How many times as long passes take on a share; of a cell measured on another one, by itself (1)."""
        pooled = {at: grown.after / grown.before for at, grown in self._grown.items() if grown.before}
        known = self._own.get(place) or pooled
        if not known:
            return share / QUARTER
        at = share if share in known else max(known)
        return max(1.0, 1 + (known[at] - 1) * (share - QUARTER) / (at - QUARTER))

    def _rest(self, base: _Cost, share: float) -> float:
        grown = self._grown[share]
        more = grown.more / grown.cells if grown.cells else self.evaluation if share == WHOLE else 0.0
        return max(0.0, base.rest + more)


class Makers(Protocol):
    """Those who make rows, or bring those that are on file."""

    @property
    def size(self) -> int:
        """How many may be made at once."""
        ...

    def begin(self, cell: str, sparsity: float, seed: int, share: float) -> None:
        """Begin a row; one of them is free."""
        ...

    def finished(self, *, every: bool = False) -> list[tuple[Row, int]]:
        """Wait until one of them is free.

        Args:
            every: whether all that was begun is waited for.

        Returns:
            Rows that were finished since this was asked last, each with the number of who has made it.
        """
        ...


@dataclass
class Alone:
    """Makes a row when it is asked to."""

    make: Callable[[str, float, int, float], Row]
    size: int = 1
    _made: list[tuple[Row, int]] = field(default_factory=list)

    def begin(self, cell: str, sparsity: float, seed: int, share: float) -> None:
        """Make it."""
        self._made.append((self.make(cell, sparsity, seed, share), 0))

    def finished(self, *, every: bool = False) -> list[tuple[Row, int]]:
        """What was made since."""
        made, self._made = self._made, []
        return made


@dataclass
class Halving:
    """One model's cells under an end."""

    cells: Sequence[str]
    sparsities: Sequence[float]
    seeds: int
    reference: str  # the cell that all are compared with: it comes first
    end: float  # what the clock says when all has to be done
    costs: Costs
    makers: Makers
    known: Callable[[str, float, int, float], bool]  # whether it is on file
    leave_out: Callable[[str, float, int, float, str], None]  # (cell, sparsity, seed, share, reason)
    expect: Callable[[int, float], None]  # how many rows may still come, and the seconds they take
    say: Callable[[str], None]
    after: Callable[[], float] = lambda: 0.0  # seconds of what is done behind the last row
    clock: Callable[[], float] = time.perf_counter
    _open: set[tuple[Place, int, float]] = field(default_factory=set)  # rows that may still come
    _rows: dict[tuple[Place, float], Row] = field(default_factory=dict)  # of seed 0

    def run(self) -> None:
        """Make the rows that there is time for; what is left out is said."""
        places = [(cell, sparsity) for cell in self.cells for sparsity in self.sparsities]
        self._open = {(place, 0, QUARTER) for place in places}
        self._open |= {(place, seed, WHOLE) for place in places for seed in range(self.seeds)}
        self._begin_with_reference()
        began, left = self.clock(), self._spare
        self._try_others(self._affordable(), began + TRIES * left)
        tried = {sparsity: self._order(sparsity) for sparsity in self.sparsities}
        everything = self.costs.together(self._places(tried), WHOLE, range(self.seeds)) / self.makers.size
        longest = max((self._cost(place, WHOLE) for place in self._places(tried)), default=0.0)
        everything += (1 - 1 / self.makers.size) * longest  # (2)
        # that all are tried is worth more than a step between
        if not self._fits(everything) and self.clock() - began <= left / len(SHARES):
            tried = self._halve(tried)
        self._finish(tried)
        self._tell()
        self._warn()

    # -- steps -----------------------------------------------------------------------------------------

    def _begin_with_reference(self) -> None:
        """It is needed on all of the text whatever comes, and says how seconds grow with the text."""
        for i, sparsity in enumerate(self.sparsities):
            place = (self.reference, sparsity)
            if i and not self.known(*place, 0, QUARTER) and not self._fits(self.costs.first(place)):
                self._leave_out(place, QUARTER, SPENT)
                continue
            if self._make(place, 0, QUARTER).state != COMPLETE:
                continue
            if not i and not self._fits(self._cost(place, WHOLE)) and self._fits(self._cost(place, HALF)):
                self._make(place, 0, HALF)  # before that, what is foreseen of all of it may be far too much
            if self._fits(self._cost(place, WHOLE)):
                self._make(place, 0, WHOLE)

    def _affordable(self) -> list[float]:
        """The sparsities that have time for one more cell on all of the text, as far as the reference can tell."""
        found, total = list[float](), 0.0
        for sparsity in self.sparsities:
            place = (self.reference, sparsity)
            row, final = self._rows.get((place, QUARTER)), self._rows.get((place, WHOLE))
            takes = self.costs.first(place) + (self._cost(place, WHOLE) if final is None else MARGIN * final.wall)
            if row is not None and self._fits(total + takes):
                found.append(sparsity)
                total += takes / self.makers.size
        return found

    def _try_others(self, sparsities: Sequence[float], until: float) -> None:
        """At one sparsity after the other, so that none is left without."""
        for cell in self.cells:
            for sparsity in self.sparsities:
                place = (cell, sparsity)
                if cell == self.reference:
                    continue
                self._collect()
                there = self.known(cell, sparsity, 0, QUARTER)
                takes = self.costs.first(place) + self._reserve(sparsities)
                if there or (sparsity in sparsities and self.clock() <= until and self._fits(takes)):
                    self._begin(place, 0, QUARTER)
                else:
                    self._leave_out(place, QUARTER, SPENT)
        self._collect(every=True)

    def _halve(self, tried: Mapping[float, Sequence[str]]) -> dict[float, list[str]]:
        """The better ones on half of the text, for half of the time that is left."""
        until, unproven = self.clock() + self._spare / 2, dict[float, str]()
        several = {sparsity: [c for c in cells if c != self.reference] for sparsity, cells in tried.items()}
        halves = {sparsity: cells for sparsity, cells in several.items() if len(cells) > 1}
        self._open |= {(place, 0, HALF) for place in self._places(halves)}
        for cell, sparsity in self._places(several):
            self._collect()
            place, takes = (cell, sparsity), self._cost((cell, sparsity), HALF)
            if (
                sparsity in halves
                and self.clock() + takes <= until
                and self._fits(takes + self._reserve(self.sparsities))
            ):
                self._begin(place, 0, HALF)
                continue
            self._collect(every=True)
            if sparsity not in unproven and not self._halved(several, sparsity):  # the best needs no further proof
                self._open.discard((place, 0, HALF))
                unproven[sparsity] = cell
            else:
                self._leave_out(place, WHOLE, f"others were better on {QUARTER:.0%} of the text")
        self._collect(every=True)
        found = dict[float, list[str]]()
        for sparsity in tried:
            cells = sorted(self._halved(several, sparsity), key=lambda c: self._perplexity((c, sparsity), HALF))
            first = [cell for cell in tried[sparsity] if cell == self.reference]
            found[sparsity] = [*first, *([unproven[sparsity]] if sparsity in unproven else []), *cells]
        return found

    def _halved(self, several: Mapping[float, Sequence[str]], sparsity: float) -> list[str]:
        """The cells that have a result on half of the text."""
        rows = {cell: self._rows.get(((cell, sparsity), HALF)) for cell in several[sparsity]}
        return [cell for cell, row in rows.items() if row is not None and row.state == COMPLETE]

    def _finish(self, chosen: Mapping[float, Sequence[str]]) -> None:
        """The best ones on all of the text, as many as there is time for; of the first two as many seeds."""
        for place in self._places(chosen):
            self._collect()
            every = [seed for seed in range(self.seeds) if (place, seed, WHOLE) in self._open]
            if place[0] not in chosen[place[1]][:2] and not self._fits(self._cost(place, WHOLE, every)):
                self._leave_out(place, WHOLE, self._reason(place))
                continue
            for seed in every:
                self._collect()
                if not self.known(*place, seed, WHOLE) and not self._fits(self._cost(place, WHOLE, [seed])):
                    self._leave_out(place, WHOLE, self._reason(place), seed)
                    break
                self._begin(place, seed, WHOLE)
        self._collect(every=True)

    def _warn(self) -> None:
        """Name the sparsities that have no cell on all of the text."""
        for sparsity in self.sparsities:
            if any(
                row.state == COMPLETE and at == (row.cell, sparsity)
                for (at, share), row in self._rows.items()
                if share == WHOLE
            ):
                continue
            tried = [place for place, share in self._rows if share == QUARTER and self.costs.tried(place)]
            least = min((self._cost(place, WHOLE) for place in tried), default=0.0)
            more = f": it takes about {span(least)} more" if least else ""
            self.say(
                f"warning: at {sparsity:.0%} there was no time for a cell on all of the text{more}; give the same "
                "command with a longer --time"
            )

    # -- what they have in common ----------------------------------------------------------------------

    @property
    def _spare(self) -> float:
        """Seconds that are left."""
        return self.end - self.clock() - self.after()

    def _fits(self, seconds: float) -> bool:
        return seconds <= self._spare

    def _cost(self, place: Place, share: float, seeds: Iterable[int] = (0,)) -> float:
        """Of one cell: whoever of several makes it may not have the passes that others have made."""
        alone = [self.costs.together([place], share, [seed], anew=self.makers.size > 1) for seed in seeds]
        return self._bound(alone) if self.makers.size > 1 else self.costs.together([place], share, seeds)

    def _bound(self, alone: Sequence[float]) -> float:
        """Seconds of several rows, of what each takes."""
        return sum(alone) / self.makers.size + (1 - 1 / self.makers.size) * max(alone, default=0.0)  # (2)

    def _make(self, place: Place, seed: int, share: float) -> Row:
        self._begin(place, seed, share)
        self._collect(every=True)
        return self._rows[place, share]

    def _begin(self, place: Place, seed: int, share: float) -> None:
        self._tell()
        self.makers.begin(*place, seed, share)

    def _collect(self, *, every: bool = False) -> None:
        """Wait until somebody is free, or everybody, and learn from the rows that are there since."""
        for row, by in self.makers.finished(every=every):
            place = (row.cell, row.sparsity)
            self._open.discard((place, row.seed, row.share))
            self.costs.add(row, by)
            if row.seed == 0:
                self._rows[place, row.share] = row
            if row.share < WHOLE and row.state != COMPLETE:
                self._close(place, 0)

    def _leave_out(self, place: Place, share: float, reason: str, seed: int = 0) -> None:
        """Say that a cell comes no further."""
        self._close(place, seed)
        self.leave_out(*place, seed, share, reason)
        self._tell()

    def _close(self, place: Place, seed: int) -> None:
        self._open = {key for key in self._open if key[0] != place or key[1] < seed}

    def _tell(self) -> None:
        """How many rows may come, and when the last of them is done, at the latest at the end."""
        tries = [place for place, _, share in self._open if share == QUARTER]
        tried = [place for place, share in self._rows if share == QUARTER and self.costs.tried(place)]
        foreseen = sum(map(self.costs.first, tries)) if tried else math.inf
        for share in (HALF, WHOLE):
            for seed in range(self.seeds):
                coming = [place for place in tried if (place, seed, share) in self._open]
                foreseen += self.costs.together(coming, share, [seed])
        if tries and tried:  # of what is not tried yet, as of others
            foreseen += len(tries) / len(tried) * self.costs.together(tried, WHOLE, range(self.seeds))
        self.expect(len(self._open), max(0.0, min(self._spare, foreseen / self.makers.size)))

    def _reason(self, place: Place) -> str:
        if place[0] == self.reference:
            return SPENT
        share = HALF if (place, HALF) in self._rows else QUARTER
        return f"others were better on {share:.0%} of the text, and the time was spent"

    def _reserve(self, sparsities: Sequence[float]) -> float:
        """Seconds to be kept for the best so far on all of the text, at these sparsities; first as of the reference."""
        kept = list[float]()
        for sparsity in sparsities:
            best = next((cell for cell in self._order(sparsity) if cell != self.reference), None)
            final = self._rows.get(((self.reference, sparsity), WHOLE))
            if best is not None:
                kept.append(self._cost((best, sparsity), WHOLE))
            elif final is not None:
                kept.append(MARGIN * final.wall)
        return self._bound(kept)

    def _order(self, sparsity: float) -> list[str]:
        """Cells that have a result on the smallest share, the reference and then the best first."""
        found = [
            cell
            for ((cell, at), share), row in self._rows.items()
            if (at, share, row.state) == (sparsity, QUARTER, COMPLETE)
        ]
        return sorted(found, key=lambda c: (c != self.reference, self._perplexity((c, sparsity), QUARTER)))

    def _perplexity(self, place: Place, share: float) -> float:
        """Of a row; of none that was made that of a best, as only the best is let on without."""
        row = self._rows.get((place, share))
        if row is None:
            return -math.inf
        return math.inf if row.perplexity is None else row.perplexity

    def _places(self, cells: Mapping[float, Sequence[str]]) -> list[Place]:
        """The first cell of every sparsity, then the second of every one."""
        most = max((len(some) for some in cells.values()), default=0)
        return [(some[k], sparsity) for k in range(most) for sparsity, some in cells.items() if k < len(some)]
