"""report.json: its content, and sentences and records made of the same numbers."""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

from torch import nn

from prunekit.data.draws import Draws
from prunekit.data.tokens import TokenBatch
from prunekit.measure.perplexity import Perplexity
from prunekit.plugins.allocator import Problem
from prunekit.plugins.dense import Dense
from prunekit.plugins.learner import Decision, Effort
from prunekit.plugins.registry import KINDS, METRICS, SIGNALS
from prunekit.recipe.resolve import Parts
from prunekit.recipe.schema import Recipe
from prunekit.search.ledger import Ledger
from prunekit.search.probing import Spent
from prunekit.search.supernet import Supernet
from prunekit.space.ladders import Space
from prunekit.space.prices import Workload
from prunekit.space.sites import Allocation

SCHEMA = 1
SPARSE_PATTERNS = ("1:4", "2:4")
SPARSE_UNIT = (32, 64)  # rows and columns come in these for torch's 2:4 kernels of 16 bits, by CUTLASS and cuSPARSELt


def space_record(pass_number: int, problem: Problem) -> dict[str, Any]:
    """Make the ledger's record of a calibration pass: all that is needed to read its questions without the model.

    Args:
        pass_number: number of the pass, from 0.
        problem: as the allocator gets it.
    """
    space = problem.space
    measured: dict[str, Any] = {"signals": [list(row) for row in problem.signals]} if problem.signals else {}
    if problem.scores is not None:  # as many as there are groups: the candidates' files have them
        measured["scores"] = hashlib.sha256(repr(problem.scores).encode()).hexdigest()
    return {
        "kind": "space",
        "walk": pass_number,
        "sites": [site.name for site in space.sites],
        "ladders": [list(ladder) for ladder in space.ladders],
        "prices": [list(row) for row in space.prices],
        "limit": space.budget.limit,
        "metric": METRICS.name_of(space.budget.metric),
        "errors": [list(row) for row in problem.errors],
        **measured,
        "start": list(problem.start),
    }


def report(
    parts: Parts,
    dense: Dense,
    draws: Draws,
    whole: Space,
    net: Supernet,
    plan: Allocation,
    small: nn.Module,
    *,
    losses: Mapping[str, Any],
    search: Mapping[str, int],
    seconds: Mapping[str, float],
    seconds_shared: Mapping[str, float],
    finishers: Sequence[Mapping[str, Any]] = (),
    pace: Mapping[str, Any] | None = None,
    samples: Sequence[Mapping[str, Any]] = (),
    learned: Mapping[str, Any] | None = None,
    shares: Sequence[Mapping[str, Any]] = (),
    share: float | None = None,
) -> dict[str, Any]:
    """Make the content of report.json. Parameters are counted in the tensors, never taken from the request.

    Args:
        parts: of the recipe.
        dense: the model before.
        draws: its text.
        whole: every count of every site, under the budget.
        net: the network that the small model was assembled from.
        plan: kept groups, or weights per row, by site.
        small: the model as it is exported.
        losses: what was measured on the texts, in nats per token.
        search: number of questions, and of token-forwards.
        seconds: by stage.
        seconds_shared: of these, what was spent once for a family.
        finishers: what each reports.
        pace: what a measured metric reports; None: nothing was measured.
        samples: what both models have written, side by side.
        learned: what `learned` makes of a learner's work; empty, or None: there was none.
        shares: what was found with each share of the width, where several were tried.
        share: that of the result.
    """
    recipe, errors, shrinks = parts.recipe, net.site_errors(plan), parts.form.shrinks
    before, after = count(dense.model), count(small)
    blocks, left = count(dense.adapter.blocks(dense.model)), count(dense.adapter.blocks(small))
    return {
        "schema": SCHEMA,
        "model": dense.name,
        "dense": {"parameters": before, "block_parameters": blocks}
        | ({"converted": {**dense.converted}, "dtype": str(dense.dtype)[6:]} if dense.converted else {}),
        "pruned": {
            "parameters": after,
            "block_parameters": left,
            "sparsity_of_blocks": (blocks - left) / blocks,
            "sparsity_of_model": (before - after) / before,
        },
        "budget": {
            "metric": recipe.metric_spec["name"],
            "of": recipe.of,
            "sparsity_asked": recipe.sparsity,
            "limit": whole.budget.limit,
            "spent": whole.cost(plan),
            "removed": (whole.budget.dense - whole.budget.outside - whole.cost(plan)) / whole.budget.dense,
        },
        **({} if parts.width is None else {"width": width(parts, dense.model, small, shares, share)}),
        **({} if recipe.experts != "both" else {"experts": experts(dense, net.model)}),
        **({} if shrinks else {"weights": weights(small, net, plan, recipe.structure)}),
        **({} if pace is None else {recipe.metric_spec["name"]: dict(pace)}),
        "losses": dict(losses),
        "sites": [
            {
                "name": site.name,
                "block": site.block,
                "kind": site.kind,
                "groups": site.n_groups,
                "kept": kept,
                **({} if site.form.coupled else {"keeps": site.describe(kept)}),
                "parameters": site.parameters(kept),
                "error": error,
            }
            for site, kept, error in zip(whole.sites, plan, errors, strict=True)
        ],
        "data": {
            "source": draws.source,
            "calibration": _tokens(draws.calibration),
            "search": _tokens(draws.search),
            "evaluation": _tokens(draws.evaluation),
            **({"recovery": _tokens(draws.recovery)} if draws.recovery is not None else {}),
            **({"contrast": _tokens(draws.contrast)} if draws.contrast is not None else {}),
        },
        "search": dict(search),
        **({"learner": dict(learned)} if learned else {}),
        "finishers": [dict(said) for said in finishers],
        **({"samples": [dict(one) for one in samples]} if samples else {}),
        "seconds": _rounded(seconds),
        **({"seconds_shared": _rounded(seconds_shared)} if recipe.family else {}),  # of these, for all of it
        "seed": recipe.seed,
        "versions": versions(parts),
    }


def width(
    parts: Parts, dense: Any, small: Any, shares: Sequence[Mapping[str, Any]] = (), share: float | None = None
) -> dict[str, Any]:
    """Say what became of the residual stream.

    Args:
        parts: of a recipe with a width.
        dense: the model before.
        small: the model as it is exported.
        shares: what was found with each share of the budget, where several were tried.
        share: the one that the result has.
    """
    assert parts.recipe.width is not None
    before, after = (model.get_input_embeddings().weight.shape[1] for model in (dense, small))
    own = small.get_output_embeddings().weight is not small.get_input_embeddings().weight
    tied = dense.get_output_embeddings().weight is dense.get_input_embeddings().weight
    found = {"name": parts.recipe.width["name"], "channels": after, "of": before, "untied": bool(own and tied)}
    return found | ({"share": share, "shares": [dict(each) for each in shares]} if shares else {})


def experts(dense: Any, model: Any) -> list[dict[str, int]]:
    """Say how many whole experts of every layer stay.

    Args:
        dense: the model before.
        model: the one without them.
    """
    before, after = (
        {site.block: site.n_groups for site in dense.adapter.sites(each) if site.kind == "experts"}
        for each in (dense.model, model)
    )
    return [{"block": block, "kept": after[block], "of": of} for block, of in before.items()]


def learned(parts: Parts, effort: Effort, *, shared: int, domains: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Say what a learner has read and what its masks are of.

    Args:
        parts: of the recipe.
        effort: what was read.
        shared: number of budgets of a family that it decided for at once.
        domains: shares of the text of all data sets in the end, where it weighs them.
    """
    assert parts.recipe.learner is not None
    masks = "learned on un-refitted weights: those of the dense model, before the pruner works on what is kept"
    if effort.steps:
        kept = (
            "and pruned" if parts.recipe.learned == "weights" else "and not kept: those of the dense model are pruned"
        )
        masks = f"learned together with weights, which were trained along {kept}"
    return {
        "name": parts.recipe.learner["name"],
        "masks": masks,
        **({"steps_of_weights": effort.steps} if effort.steps else {}),
        "queries": effort.queries,
        "tokens_forward": effort.forward,
        "tokens_forward_and_back": effort.back,
        "tokens_of_dense_model": effort.dense,
        "budgets_at_once": shared,
        **({"domains": dict(domains)} if domains else {}),
    }


def searched(ledger: Ledger) -> dict[str, Any]:
    """Say what a search has taken; what its candidates were trained on is a part of the token-forwards.

    Where a limit has ended a search that had hardly begun, `limited` says so in words.
    """
    found: dict[str, Any] = {"questions": ledger.questions, "token_forwards": ledger.tokens + ledger.trained}
    trained, shares = ledger.trained, [r["answer"] for r in _records(ledger) if r.get("kind") == "share"]
    if shares:  # of which the ledger holds the conversation of one
        found["questions"] = sum(each["questions"] + 1 for each in shares)
        found["token_forwards"] = sum(each["token_forwards"] + each["judged"] for each in shares)
        trained = sum(each["trained"] for each in shares)
    if trained:
        found["training_of_candidates"] = trained
    if (spent := ended_by_limit(ledger)) is not None and spent.by_probes:
        found["limited"] = spent.words
    return found


def ended_by_limit(ledger: Ledger) -> Spent | None:
    """What the first search had asked when the limit ended it; None: it was not ended, or a later one was."""
    found = next((r for r in _records(ledger) if r.get("kind") == "limit"), None)
    return None if found is None or found["walk"] else Spent.of_record(found)


def _records(ledger: Ledger) -> Iterator[dict[str, Any]]:
    """All on file, in order."""
    return (json.loads(line) for line in ledger.text().splitlines())


def decision_digest(decision: Decision) -> str:
    """sha256 of the groups that a learner keeps and of their scales."""
    scales = None if decision.scales is None else decision.scales.double().tolist()
    return hashlib.sha256(json.dumps([decision.kept, scales]).encode()).hexdigest()


def weights(small: nn.Module, net: Supernet, plan: Allocation, structure: str) -> dict[str, Any]:
    """Count zeros in the linear maps of the blocks.

    Args:
        small: the pruned model.
        net: the network that it was assembled from.
        plan: weights kept per row, by site.
        structure: of the recipe.

    Returns:
        Numbers of weights, and bytes as they are stored and as a bit mask with values; of patterns, how many maps keep
        each, and how many of them sparse tensor cores take (`SPARSE_UNIT`).
    """
    blocks, sites = net.adapter.blocks(small), net.space.sites
    total = kept = size = packed = fit = 0
    for site, count in zip(sites, plan, strict=True):  # one at a time: the model may be paged
        weight = net.adapter.linear(blocks[site.block], site).weight
        nonzero = int(weight.count_nonzero())
        total, kept, size = total + weight.numel(), kept + nonzero, size + weight.nbytes
        packed += -(-weight.numel() // 8) + nonzero * weight.itemsize
        whole = all(size % unit == 0 for size, unit in zip(weight.shape, SPARSE_UNIT, strict=True))
        fit += bool(site.form.m) and site.describe(count) in SPARSE_PATTERNS and whole
    patterns = [site.describe(count) for site, count in zip(sites, plan, strict=True) if site.form.m]
    kept_patterns = {each: patterns.count(each) for each in sorted(set(patterns))}
    return {
        "structure": structure,
        "in_linear_maps": total,
        "not_zero": kept,
        "sparsity": 1 - kept / total,
        "bytes": size,
        "bytes_as_mask_and_values": packed,
        **({"patterns": kept_patterns, "fit": fit} if patterns else {}),
    }


def gained(found: Mapping[str, Any]) -> str:
    """Say in words what zeros save and what they do not; `found` is of `weights`."""
    size, small = found["bytes"], found["bytes_as_mask_and_values"]
    said = (
        "Nothing is smaller or faster by itself: zeros are stored and multiplied like other numbers. "
        f"As a bit mask and values, the {size / 1e6:,.1f} MB of these linear maps would take {small / 1e6:,.1f} MB"
    )
    if (patterns := found.get("patterns")) is None:
        return f"{said}; time is saved only by kernels for sparse weights."
    rows, columns = SPARSE_UNIT
    return (
        f"{said}. Sparse tensor cores take 2:4 once weights are converted, of maps whose rows are a multiple of {rows} "
        f"and columns of {columns}: {found['fit']} of {sum(patterns.values())} maps fit ("
        f"{', '.join(f'{many} keep {pattern}' for pattern, many in patterns.items())})."
    )


def settings(recipe: Recipe) -> dict[str, Any]:
    """Write a recipe for those who watch a run: without the prices that were measured, which may be thousands."""
    values = recipe.model_dump(mode="json")
    for part in ("metric", "latency"):
        if isinstance(values.get(part), dict):
            values[part].pop("prices", None)
    return values


def headline(document: Mapping[str, Any], front: str = "") -> dict[str, float]:
    """Choose the numbers of a report by which results are compared.

    Args:
        document: content of report.json.
        front: of every name.

    Returns:
        Perplexities, parameters, what is gone, token-forwards and seconds, by name.
    """
    losses, search, seconds = document["losses"], document["search"], document["seconds"]
    found: dict[str, Any] = {
        "dense/perplexity": losses["dense"]["perplexity"],
        "dense/parameters": document["dense"]["parameters"],
        "pruned/perplexity": losses["pruned"]["perplexity"],
        "pruned/parameters": document["pruned"]["parameters"],
        "pruned/removed": document["budget"]["removed"],
        "pruned/objective": losses["objective"],
        "token_forwards": search["token_forwards"],
        **{f"spent/{stage}": spent for stage, spent in seconds.items()},
        "spent/in_all": sum(seconds.values()),
    }
    return {front + name: float(value) for name, value in found.items() if value is not None}


def promise(document: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Find what a report says of a measured metric, promised and realised; None: nothing was measured."""
    found = document.get(document.get("budget", {}).get("metric"))
    return found if isinstance(found, Mapping) and "realised" in found else None


def kept_promise(found: Mapping[str, Any]) -> str:
    """Put the promised and the realised share into words; `found` is of `MeasuredMetric.realised`."""
    timed = "workload" in found
    said = (
        (f"{Workload(**found['workload'])}: " if timed else "")
        + f"{found['promised']:.3f} of the dense model's{' time' if timed else ''} was promised ({found['target']:g} "
        f"asked), {found['realised']:.3f} was measured, {found['miss']:+.1%}; {'times' if timed else 'measurements'} "
        f"of one model vary by {found['noise']['result']:.1%}"
    )
    if found["kept"]:
        return said
    return f"{said}. The promise is not kept: measure anew when the machine does nothing else, or ask for less"


def by_source(batch: TokenBatch, dense: Perplexity, pruned: Perplexity) -> dict[str, dict[str, float]]:
    """Average the losses of each data set's windows, in nats per token; empty where there is one data set."""
    found: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(batch.origins):
        here = [i for i, origin in enumerate(batch.origins) if origin == name]
        both = {"dense": dense, "pruned": pruned}
        found[name] = {which: math.fsum(it.losses[i] for i in here) / len(here) for which, it in both.items()}
    return found


def versions(parts: Parts) -> dict[str, str]:
    """Find the versions of all that the result depends on: libraries, Python, and the distributions of plug-ins."""
    recipe = parts.recipe
    specs = [*parts_of(recipe), ("metric", recipe.metric_spec), *(("exporter", spec) for spec in recipe.exporters)]
    owners = {registry[spec["name"]].owner for registry in KINDS for kind, spec in specs if kind == registry.kind}
    owners |= {SIGNALS[name].owner for name in map(SIGNALS.name_of, parts.signals) if name is not None}
    names = sorted({"prunekit", "torch", "transformers", *owners} - {"unknown"})
    return {name: metadata.version(name) for name in names} | {"python": platform.python_version()}


def count(module: nn.Module) -> int:
    """Count parameters, tied ones once."""
    return sum(p.numel() for p in module.parameters())


def _rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    return {stage: round(spent, 3) for stage, spent in seconds.items()}


def _tokens(batch: TokenBatch) -> dict[str, Any]:
    return {"source": batch.source, "tokens": batch.n_tokens, "seqlen": batch.seqlen, "sha256": batch.digest}


def parts_of(recipe: Recipe) -> list[tuple[str, Mapping[str, Any]]]:
    named = [(kind, getattr(recipe, kind)) for kind in ("width", "pruner", "allocator", "learner", "objective")]
    fixed = [(kind, spec) for kind, spec in named if spec is not None]  # an allocator or a learner
    return [*fixed, *(("finisher", spec) for spec in recipe.finishers)]
