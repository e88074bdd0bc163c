"""Evolution whose operators a language model performs; what it cannot do its classical twin does."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeVar

from prunekit import Allocation, Allocator, Problem, Query, Search, Space, WrongInput, check_choices
from prunekit_strategies.chat import Chat, Endpoint, LocalModel, Unanswered, check_address

TRIES = 16  # for a child that is new
TOURNAMENT = 3  # individuals that compete to be a parent
MOST_ENTRIES = 128  # of a vector shown to a language model; sites beyond are shown as means over their block
FEW = 10  # vectors shown at once where they are means
GIVE_UP = 3  # operators in a row to which a language model contributed nothing
Pair = tuple[Allocation, Allocation]
S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True)
class SelfPruner(Allocator):
    """Ask a language model for a population of pruning rates, for parents, for crossovers and for mutations.

        P_0      the start, the lowest on the error table, and proposals: `population` in all     (1)
        parents  `offspring` pairs of P_t                                                         (2)
        C_t      one crossover per pair, one mutant of the better of each pair                    (3)
        P_t+1    the `population` lowest of P_t and C_t                                           (4)

    so population + 2 offspring iterations allocations are judged, 430 by default. A model sees vectors of removed
    shares, one per site, with their losses, and answers in JSON. Each vector is held to its length and range, and
    decoded by the nearest allocation that spends the budget; those met before are refused. What is missing is asked
    for again, `retries` times, with the reason; then the classical twin of the operator steps in: random rates,
    tournaments of 3, uniform crossover, exchanges between two sites. `classical` is the twin alone, on the same
    evaluations. Prompts and replies go into the journal, so that a resumed run asks nothing twice.

    Source: Huang et al., Self-Pruner, arXiv:2502.14413, whose prompts, repair and temperature we did not find: these
    are ours. We differ: attention and MLP have rates of their own, the start and (with `warm_start`) the lowest
    allocation on the error table are in the first population, and a model that contributed nothing to three
    operators in a row is not asked again.
    """

    backend: Literal["classical", "openai", "transformers"] = "classical"  # openai: any server with that protocol
    model: str | None = None  # name at the endpoint; folder or hub id
    base_url: str = "https://api.openai.com/v1"  # of openai
    key_variable: str | None = "OPENAI_API_KEY"  # environment variable with the key of openai; None: none is needed
    temperature: float = 1.0  # 0: greedy
    timeout: float = 120.0  # seconds, of openai
    retries: int = 2  # of a request that failed, and of an operator whose reply was of no use
    reply_tokens: int = 8_192  # at most, of transformers
    about: str = "a decoder-only transformer"  # what the language model is told it prunes: the name, if it may know it
    population: int = 30
    iterations: int = 20
    offspring: int = 10  # crossovers, and as many mutants, per iteration
    tokens: int | None = None  # to judge an allocation on; None: all there are
    reach: float = 0.4  # of proposed rates around their mean
    warm_start: bool = True  # let the lowest allocation on the error table be in the first population

    def __post_init__(self) -> None:
        check_choices(self)
        if min(self.population, self.offspring, self.reply_tokens) < 1 or min(self.iterations, self.retries) < 0:
            raise ValueError("population, offspring and reply_tokens are at least 1, iterations and retries at least 0")
        if self.tokens is not None and self.tokens < 1:
            raise ValueError(f"tokens are at least 1, not {self.tokens}")
        if not (0 <= self.temperature < math.inf and 0 < self.timeout < math.inf and 0 < self.reach <= 1):
            raise ValueError("temperature is at least 0, timeout above 0 s, reach in 0..1")
        if self.key_variable is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", self.key_variable):
            # not repeated: it may be the key
            raise ValueError("key_variable is the NAME of an environment variable, in capitals, never the key itself")
        check_address(self.base_url)

    def ready(self) -> None:
        if (chat := self._chat()) is not None:
            chat.ready()

    def search(self, problem: Problem) -> Search:
        twin = Twin(problem.space, problem.start, self.reach, random.Random(problem.seed))
        chat = self._chat()
        breeder = twin if chat is None else Advised(twin, chat, problem, self.about, self.retries)
        seeds = [problem.start]
        if self.warm_start and self.population > 1:
            seeds.append(problem.space.lowest(problem.errors))
        children = list(dict.fromkeys(seeds))
        twin.met.update(children)
        children += breeder.initial(self.population - len(children))  # (1)
        heard = dict(zip(children, (yield [Query(a, self.tokens) for a in children]), strict=True))
        for _ in range(self.iterations):
            ranked = sorted(heard, key=lambda a: (heard[a], a))[: self.population]  # (4)
            pairs = breeder.parents([(a, heard[a]) for a in ranked], self.offspring)  # (2)
            children = breeder.crossed(pairs) + breeder.mutated([min(p, key=ranked.index) for p in pairs])  # (3)
            if not children:
                break
            heard |= zip(children, (yield [Query(a, self.tokens) for a in children]), strict=True)
        return min(heard, key=lambda a: (heard[a], a))

    def _chat(self) -> Chat | None:
        if self.backend == "classical":
            return None
        if not self.model:
            raise WrongInput(f"backend {self.backend!r} of self-pruner needs a model; name it with allocator.model")
        if self.backend == "openai":
            return Endpoint(
                self.base_url, self.model, self.key_variable, self.temperature, self.timeout, self.retries
            )  # fmt: skip
        return LocalModel(self.model, self.temperature, self.reply_tokens)


# -- the twin -------------------------------------------------------------------------------------------


@dataclass
class Twin:
    """The operators as they always were. Every child is feasible and was not `met` before."""

    space: Space
    start: Allocation
    reach: float
    rng: random.Random
    met: set[Allocation] = field(default_factory=set)

    def initial(self, count: int) -> list[Allocation]:
        """Up to `count` random allocations."""
        return _present(self.scattered() for _ in range(count))

    def parents(self, ranked: Sequence[tuple[Allocation, float]], count: int) -> list[Pair]:
        """Pairs from a population with its losses, the best first."""
        return [self.pair([a for a, _ in ranked]) for _ in range(count)]

    def crossed(self, pairs: Sequence[Pair]) -> list[Allocation]:
        """Up to one child of each pair."""
        return _present(self.mixed(pair) for pair in pairs)

    def mutated(self, parents: Sequence[Allocation]) -> list[Allocation]:
        """Up to one mutant of each parent."""
        return _present(self.moved(parent) for parent in parents)

    def scattered(self) -> Allocation | None:
        """Rates around the start, some near it, some far."""
        spread = self.reach * self.rng.random()
        sites = zip(self.start, self.space.sites, strict=True)
        return self._new(self.space.nearest([k + spread * self.rng.uniform(-1, 1) * s.n_groups for k, s in sites]))

    def pair(self, ranked: Sequence[Allocation]) -> Pair:
        """The best of three, twice, of a population sorted from best to worst; two different ones if there are."""
        one, *others = (min(self.rng.choices(range(len(ranked)), k=TOURNAMENT)) for _ in range(TRIES))
        return ranked[one], ranked[next((i for i in others if i != one), (one + 1) % len(ranked))]

    def mixed(self, pair: Pair) -> Allocation | None:
        """Every site as in either parent, then repaired."""
        return self._new(self.space.nearest([self.rng.choice(counts) for counts in zip(*pair, strict=True)]))

    def moved(self, parent: Allocation) -> Allocation | None:
        """One to three exchanges away."""
        for _ in range(self.rng.randint(1, 3)):
            parent = self._exchanged(parent)
        return self._new(parent)

    def _new(self, child: Allocation) -> Allocation | None:
        """A child, moved on until it is new; None where luck finds none."""
        for _ in range(TRIES):
            if child not in self.met:
                self.met.add(child)
                return child
            child = self._exchanged(child)
        return None

    def _exchanged(self, here: Allocation) -> Allocation:
        partitions = [members for members, _ in self.space.partitions if len(members) > 1]
        if not partitions:
            return here
        (members,) = self.rng.choices(partitions, weights=[len(members) for members in partitions])
        up, down = self.rng.sample(members, 2)
        return self.space.swap(here, up, down) or here


# -- what a language model sees -------------------------------------------------------------------------


@dataclass(frozen=True)
class Rates:
    """Allocations as vectors of removed shares: of every site, or of every block where there are many sites."""

    space: Space
    start: Allocation

    @cached_property
    def members(self) -> tuple[tuple[int, ...], ...]:
        """The sites behind each entry."""
        sites = self.space.sites
        if len(sites) <= MOST_ENTRIES:
            return tuple((i,) for i in range(len(sites)))
        blocks = sorted({s.block for s in sites})
        return tuple(tuple(i for i, s in enumerate(sites) if s.block == block) for block in blocks)

    @property
    def are_means(self) -> bool:
        """Whether an entry stands for a block."""
        return len(self.space.sites) > MOST_ENTRIES

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Price of every site when whole."""
        return tuple(self.space.budget.price(s, s.n_groups) for s in self.space.sites)

    @cached_property
    def mean(self) -> float:
        """Size-weighted mean rate the budget asks for, as the start meets it."""
        return _weighted([1 - k / s.n_groups for k, s in zip(self.start, self.space.sites, strict=True)], self.sizes)

    @cached_property
    def range(self) -> tuple[float, float]:
        """Smallest and largest rate on any ladder."""
        ends = [
            (ladder[0] / s.n_groups, ladder[-1] / s.n_groups)
            for ladder, s in zip(self.space.ladders, self.space.sites, strict=True)
        ]
        return 1 - max(most for _, most in ends), 1 - min(least for least, _ in ends)

    @cached_property
    def step(self) -> float:
        """Distance of rungs, as a rate."""
        return max(0.01, round(self.space.stride, 2))

    def of(self, allocation: Allocation) -> list[float]:
        """The vector of an allocation."""
        rates = [1 - k / s.n_groups for k, s in zip(allocation, self.space.sites, strict=True)]
        return [_weighted([rates[i] for i in some], [self.sizes[i] for i in some]) for some in self.members]

    def decode(self, vector: Any, like: Allocation) -> Allocation:
        """The allocation nearest to a vector; sites of one entry differ among each other as in `like`.

        Raises:
            ValueError: it is not a list of as many finite numbers within the range; says what it is.
        """
        n, (low, high) = len(self.members), self.range
        numbers = isinstance(vector, list) and all(isinstance(x, (int, float)) for x in vector)
        if not numbers or any(isinstance(x, bool) for x in vector):
            raise ValueError("a vector is a list of numbers")
        if len(vector) != n:
            raise ValueError(f"a vector has {n} numbers, not {len(vector)}")
        if any(not low - 0.005 <= x <= high + 0.005 for x in vector):  # they are told in two decimals; nan is nowhere
            raise ValueError(f"rates lie between {low:.2f} and {high:.2f}")
        wish = [0.0] * len(self.space.sites)
        for some, new, old in zip(self.members, vector, self.of(like), strict=True):
            for i in some:
                wish[i] = like[i] + (old - new) * self.space.sites[i].n_groups
        return self.space.nearest(wish)

    def shown(self, allocation: Allocation) -> str:
        """A vector in two decimals."""
        return "[" + ", ".join(f"{rate:.2f}" for rate in self.of(allocation)) + "]"

    def told(self, about: str) -> str:
        """What a language model has to know about vectors before it is asked for any."""
        sites, (low, high) = self.space.sites, self.range
        n, blocks = len(self.members), len({s.block for s in sites})
        if self.are_means:
            entries = f"one per block, from the first to the last: the mean rate of all parts of blocks 0 to {n - 1}"
        else:
            entries = "one per prunable part, in this order: " + ", ".join(f"{s.block} {s.kind}" for s in sites)
        kinds = sorted({s.kind for s in sites})
        total = sum(self.sizes) or 1
        share = {k: sum(p for p, s in zip(self.sizes, sites, strict=True) if s.kind == k) / total for k in kinds}
        weights = ", ".join(f"{kind} {share[kind]:.0%}" for kind in kinds)
        apart = " for each kind of part by itself" if self.space.budget.by_kind else ""
        return (
            f"You plan the structured pruning of {about} with {blocks} decoder blocks. A plan is a vector of {n} "
            f"pruning rates, {entries}. A rate is the share of a part's heads or neurons that is removed: 0.00 keeps "
            f"all of it, 1.00 drops it. Rates lie between {low:.2f} and {high:.2f}, in steps of "
            f"{self.step:.2f}. Their mean, weighted by parameters ({weights} of the total), is {self.mean:.2f}{apart}; "
            "a plan that misses it is shifted as a whole until it fits. The loss of the pruned model judges a plan; "
            "lower is better.\n\n"
        )


# -- the language model as breeder ----------------------------------------------------------------------


class Advised:
    """The operators by a language model, and by the twin where the model's answers leave something open."""

    def __init__(self, twin: Twin, chat: Chat, problem: Problem, about: str, retries: int) -> None:
        self.twin, self.chat, self.journal, self.seed = twin, chat, problem.journal, problem.seed
        self.rates, self.retries = Rates(problem.space, problem.start), retries
        self.intro = self.rates.told(about)
        self.asked = 0  # prompts so far, replayed ones included
        self.heard_from = False  # whether the model ever replied to this process
        self.idle = 0  # operators in a row without a contribution

    def initial(self, count: int) -> list[Allocation]:
        """Proposals from what the model knows about redundancy."""
        (low, high), mean, reach = self.rates.range, self.rates.mean, self.twin.reach

        def prompt(slots: Sequence[None]) -> str:
            return (
                f"Propose {len(slots)} plans that differ clearly from each other, from what you know of how redundant "
                "attention and MLPs are at different depths of such a model. Most should be plans you believe in, some "
                f"should explore. Stay from {max(low, mean - reach):.2f} to {min(high, mean + reach):.2f}. "
                'Answer with one JSON object and nothing else: {"population": [[rate, ...], ...]}.'
            )

        return self._filled(
            "init", "population", [None] * count, prompt,
            lambda item, _: self._child(item, self.twin.start), lambda _: self.twin.scattered(),
        )  # fmt: skip

    def parents(self, ranked: Sequence[tuple[Allocation, float]], count: int) -> list[Pair]:
        """The pairs the model would breed from."""
        shown = list(ranked[:FEW] if self.rates.are_means else ranked)
        rows = [f"{i}: loss {_loss(loss)}, {self.rates.shown(a)}" for i, (a, loss) in enumerate(shown)]

        def prompt(slots: Sequence[None]) -> str:
            return (
                f"This is the population, the best plan first, each with its id and loss:\n{_lines(rows)}\n"
                f"Choose {len(slots)} pairs of parents by id. Prefer low losses, but keep the population diverse: "
                "plans that are good in different ways make good pairs, and a plan may be in several pairs. "
                'Answer with one JSON object and nothing else: {"pairs": [[id, id], ...]}.'
            )

        def read(item: Any, _: None) -> Pair:
            ids = range(len(shown))
            good = isinstance(item, list) and len(item) == 2 and all(type(i) is int and i in ids for i in item)
            if not good or (item[0] == item[1] and len(shown) > 1):
                raise ValueError(f"a pair is two different ids from 0 to {ids[-1]}")
            return shown[item[0]][0], shown[item[1]][0]

        all_ = [a for a, _ in ranked]
        return self._filled("select", "pairs", [None] * count, prompt, read, lambda _: self.twin.pair(all_))

    def crossed(self, pairs: Sequence[Pair]) -> list[Allocation]:
        """Children that combine the strengths of two plans."""

        def prompt(slots: Sequence[Pair]) -> str:
            rows = [f"{j}: {self.rates.shown(a)} and {self.rates.shown(b)}" for j, (a, b) in enumerate(slots)]
            return (
                f"Cross each of these {len(slots)} pairs of plans:\n{_lines(rows)}\n"
                "A child takes every rate from one parent or from between the two, so that what is good in both "
                f"survives, and keeps the mean. Give {len(slots)} children, one per pair, in the order of the pairs. "
                'Answer with one JSON object and nothing else: {"children": [[rate, ...], ...]}.'
            )

        return self._filled(
            "cross", "children", pairs, prompt, lambda item, pair: self._child(item, pair[0]), self.twin.mixed
        )  # fmt: skip

    def mutated(self, parents: Sequence[Allocation]) -> list[Allocation]:
        """Plans that differ from a parent in few rates."""

        def prompt(slots: Sequence[Allocation]) -> str:
            rows = [f"{j}: {self.rates.shown(parent)}" for j, parent in enumerate(slots)]
            return (
                f"Mutate each of these {len(slots)} plans:\n{_lines(rows)}\n"
                f"Change a few rates by at most {max(0.1, 2 * self.rates.step):.2f}, up in some places and down in "
                f"others, so that the mean stays. Give {len(slots)} mutants, one per plan, in their order. "
                'Answer with one JSON object and nothing else: {"children": [[rate, ...], ...]}.'
            )

        return self._filled("mutate", "children", parents, prompt, self._child, self.twin.moved)

    def _child(self, item: Any, like: Allocation) -> Allocation:
        child = self.rates.decode(item, like)
        if child in self.twin.met:
            raise ValueError("a plan must be new; one was tried before, or is given twice")
        self.twin.met.add(child)
        return child

    def _filled(
        self,
        operator: str,
        key: str,
        slots: Sequence[S],
        prompt: Callable[[Sequence[S]], str],
        read: Callable[[Any, S], T],
        twin: Callable[[S], T | None],
    ) -> list[T]:
        """What the model answers for every slot; asked again for those it left open, then filled by the twin."""
        found, open_, fault = list[T](), list(slots), ""
        for attempt in range(self.retries + 1):
            if not open_ or self.idle >= GIVE_UP:
                break
            again = f" Your last answer could not be used: {fault}." if attempt else ""
            reply = self._replied(operator, attempt, self.intro + prompt(open_) + again)
            if (fault := reply.get("failed", "")) != "":
                break
            try:
                items = _items(reply["reply"], key)
            except ValueError as error:
                fault = str(error)
                continue
            left = open_[len(items) :]
            if left:
                fault = f"{key} had {len(items)} entries, not {len(open_)}"
            for slot, item in zip(open_, items, strict=False):  # more items than slots are no harm
                try:
                    found.append(read(item, slot))
                except ValueError as error:
                    fault = str(error)
                    left.append(slot)
            open_ = left
        self._judge(operator, len(slots), len(open_), fault)
        return found + _present(twin(slot) for slot in open_)

    def _replied(self, operator: str, attempt: int, prompt: str) -> dict[str, str]:
        """{"reply": text} or {"failed": reason}, from the record or from the model."""
        self.asked += 1

        def live() -> dict[str, str]:
            try:
                reply = self.chat.complete(prompt, (self.seed * 1_000_003 + self.asked) % 2**63)
            except Unanswered as error:
                if not self.heard_from:  # nothing is lost yet: rather the user's attention than a search by the twin
                    raise WrongInput(f"{error}; put that right, and the same command goes on from here") from error
                return {"failed": str(error)}
            self.heard_from = True
            return {"reply": reply}

        return self.journal.once({"operator": operator, "attempt": attempt, "prompt": prompt}, live)

    def _judge(self, operator: str, count: int, open_: int, fault: str) -> None:
        """Say what the twin has to do, and give up on a model that is of no use."""
        if self.idle >= GIVE_UP:
            return
        self.idle = self.idle + 1 if count and open_ == count else 0
        if open_:
            self.journal.note(f"warning: {operator}: {open_} of {count} by the classical twin, because {fault}")
        if self.idle == GIVE_UP:
            self.journal.note("warning: the language model was of no use three times in a row; its twin does the rest")


def _items(reply: str, key: str) -> list[Any]:
    """The list under `key` of the last JSON object in a reply that has it; models may think aloud before it.

    Raises:
        ValueError: there is none.
    """
    decoder, found = json.JSONDecoder(), None
    at = reply.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(reply, at)
        except (ValueError, RecursionError):
            end = at + 1
        else:
            found = value[key] if isinstance(value.get(key), list) else found
        at = reply.find("{", end)
    if found is None:
        raise ValueError(f'there was no JSON object {{"{key}": [...]}} in it')
    return found


def _present(items: Any) -> list[Any]:
    return [item for item in items if item is not None]


def _lines(rows: Sequence[str]) -> str:
    return "\n".join(rows)


def _loss(loss: float) -> str:
    return f"{loss:.5g}" if math.isfinite(loss) else "failed"


def _weighted(values: Sequence[float], weights: Sequence[int]) -> float:
    """Weighted mean; the plain one where nothing has a weight."""
    if not any(weights):
        return math.fsum(values) / len(values)
    return math.fsum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)
