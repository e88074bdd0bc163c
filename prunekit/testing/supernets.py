"""A tiny supernet: a random model, a pruner that keeps the first groups, all counts of every site."""

from __future__ import annotations

import copy
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from prunekit.calibration.fill import Carry, build
from prunekit.calibration.gradients import OutputFisher
from prunekit.data.tokens import Answers, TokenBatch
from prunekit.layer.candidates import Candidate
from prunekit.layer.problem import LayerProblem
from prunekit.models.adapters.find import adapter_for
from prunekit.plugins.adapter import ModelAdapter
from prunekit.plugins.finisher import Workpiece
from prunekit.plugins.pruner import LocalPruner
from prunekit.search.store import CandidateStore, Table
from prunekit.search.supernet import Supernet
from prunekit.space.budgets import Budget
from prunekit.space.forms import parse_form
from prunekit.space.ladders import Space
from prunekit.space.sites import Allocation
from prunekit.system.checkpoints import Checkpoints
from prunekit.system.progress import Progress
from prunekit.testing.models import tiny


@dataclass(frozen=True)
class KeepFirst(LocalPruner):
    """Keep the first groups with their weights: no method, but a valid answer."""

    def prune(self, layer: LayerProblem, keeps: Sequence[int]) -> Sequence[Candidate]:
        return [layer.masked(range(keep)) for keep in keeps]


@dataclass(frozen=True)
class KeepLargest(LocalPruner):
    """Keep the largest weights of every row, or of every block of a row, as they are; on a tie the lower column."""

    structures = frozenset({"weights", "n:m"})

    def prune(self, layer: LayerProblem, keeps: Sequence[int]) -> Sequence[Candidate]:
        blocks = layer.weight.unflatten(1, (-1, layer.m or layer.d_in))  # (d_out, blocks, width)
        place = blocks.abs().argsort(dim=-1, descending=True, stable=True).argsort(-1)  # of every weight among its own
        counts = (keep // len(blocks[0]) for keep in keeps)
        return [Candidate(None, (blocks * (place < count)).flatten(1)) for count in counts]


@dataclass(frozen=True)
class KeepSpectrum(LocalPruner):
    """Keep the largest singular values of the weight."""

    structures = frozenset({"low-rank"})

    def prune(self, layer: LayerProblem, keeps: Sequence[int]) -> Sequence[Candidate]:
        basis, _, _ = torch.linalg.svd(layer.weight.double(), full_matrices=False)
        return layer.truncated(basis).candidates(keeps)


def toy_tokens(windows: int = 4, seqlen: int = 12, vocabulary: int = 61, seed: int = 0, sources: int = 1) -> TokenBatch:
    """Random token ids; the windows of several sources take turns."""
    ids = torch.randint(2, vocabulary, (windows, seqlen), generator=torch.Generator().manual_seed(seed))
    origins = tuple(f"toy-{i % sources + 1}" for i in range(windows)) if sources > 1 else ()
    lessons = TokenBatch(ids.roll(1, 0).flip(1), "lessons")
    return TokenBatch(ids, "+".join(dict.fromkeys(origins)) or "toy", origins, lessons=lessons)


def toy_questions(questions: int = 4, choices: int = 3, seqlen: int = 12, seed: int = 0) -> TokenBatch:
    """Random questions whose choices are one to four tokens long."""
    rng = torch.Generator().manual_seed(seed)
    n = questions * choices
    first = torch.randint(3, seqlen - 4, (questions,), generator=rng).repeat_interleave(choices)
    last = first + torch.randint(1, 5, (n,), generator=rng)
    ids = torch.randint(2, 61, (questions, seqlen), generator=rng).repeat_interleave(choices, 0)  # one prompt
    position = torch.arange(seqlen)
    ids = torch.where(position >= first[:, None], torch.randint(2, 61, (n, seqlen), generator=rng), ids)
    ids = torch.where(position >= last[:, None], 0, ids)
    question = torch.arange(questions).repeat_interleave(choices)
    right = torch.arange(n) % choices == torch.randint(choices, (questions,), generator=rng)[question]
    return TokenBatch(ids, "questions", answers=Answers(question, first, last, right))


@torch.no_grad()
def spoken(net: Supernet, batch: TokenBatch, seed: int = 0) -> TokenBatch:
    """The windows with what the dense model itself would say, so that by what they hold no other model is better.

    Text is drawn from it token by token behind the first; of questions the right choices become its likeliest tokens.
    """
    ids, asked, generator = batch.ids.clone(), batch.answers, torch.Generator().manual_seed(seed)
    for position in range(1, batch.seqlen):
        likely = net.model(ids[:, :position], use_cache=False).logits[:, -1].softmax(-1)
        if asked is None:
            ids[:, position] = torch.multinomial(likely, 1, generator=generator)[:, 0]
        else:
            here = asked.right & (asked.first <= position) & (position < asked.last)
            ids[:, position] = torch.where(here, likely.argmax(-1), ids[:, position])
    return replace(batch, ids=ids)


def toy_supernet(
    model_type: str = "llama",
    *,
    pruner: LocalPruner | None = None,
    carry: Carry = "expected",
    share: float = 0.5,
    heads: str = "kv",
    structure: str = "groups",
    directory: Path | None = None,
    **sizes: Any,
) -> Supernet:
    """A supernet over a tiny random model; its ladders hold every count, the dense allocation included.

    Where neither a pruner nor a directory is given, all who ask for the same share its candidates, which are only read.
    """
    model = tiny(model_type, **sizes).requires_grad_(False)
    adapter: ModelAdapter = adapter_for(model_type)
    form = parse_form(structure)
    sites = adapter.sites_of(model, form, heads)  # type: ignore[arg-type]
    whole = Space.whole(sites, Budget.keeping(share, sites))
    toy: dict[str, LocalPruner] = {"groups": KeepFirst(), "low-rank": KeepSpectrum()}
    toy |= {"weights": KeepLargest(), "n:m": KeepLargest()}
    plain, key = pruner is None and directory is None, str((model_type, carry, share, heads, structure, sizes))
    if plain and (known := _MADE.get(key)):
        return Supernet(model, adapter, whole, *known)
    folder = directory or Path(tempfile.mkdtemp(prefix="prunekit-toy-"))
    store = CandidateStore(folder, {"toy": model_type})
    if directory is None:
        weakref.finalize(store, shutil.rmtree, folder, ignore_errors=True)
    fisher = OutputFisher.collected(model, adapter, sites, toy_tokens(), 0, folder / "fisher", Progress())
    errors = build(
        model, adapter, whole, whole.uniform(), pruner or toy[form.units],
        toy_tokens(), store, fisher=fisher, carry=carry, dtype=torch.float64, progress=Progress(),
    )  # fmt: skip
    if plain:
        _MADE[key] = errors, store
    return Supernet(model, adapter, whole, errors, store)


_MADE: dict[str, tuple[Table, CandidateStore]] = {}
"""Errors and candidates of the toys that were asked for, which take long and are only read."""


def toy_workpiece(
    net: Supernet | None = None,
    *,
    plan: Allocation | None = None,
    tokens: TokenBatch | None = None,
    seed: int = 0,
    checkpoints: Checkpoints | None = None,
) -> Workpiece:
    """A toy supernet, assembled after a plan (None: uniform), as finishers are given it; in float64."""
    net = net or toy_supernet()
    plan = plan or net.space.uniform()
    small = copy.deepcopy(net.assemble(plan))
    kept = tuple(net.store.get(site, count).kept or () for site, count in zip(net.space.sites, plan, strict=True))
    return Workpiece(
        small, net.model, net.adapter, net.space.sites, plan, kept, tokens or toy_tokens(), seed,
        Progress(), checkpoints or Checkpoints(),
    )  # fmt: skip
