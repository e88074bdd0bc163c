"""Time, measured: what every shape of sub-layer takes at every count, and what a pruned model really takes.

Always whole models are run, with one shape of sub-layer cut in all places at once: caches, launches and the loop over
the blocks are as they will be, and the difference is large against the noise.
"""

from __future__ import annotations

import platform
import statistics
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from prunekit.errors import CannotGoOn, WrongInput
from prunekit.layer.candidates import Candidate
from prunekit.measure.rounds import interleaved
from prunekit.measure.speed import timed
from prunekit.models.modules import shallow
from prunekit.plugins.dense import Dense
from prunekit.plugins.metric import Runs
from prunekit.space.prices import Prices, Workload, curve, places, timed_counts, together
from prunekit.space.sites import Site
from prunekit.system.progress import Progress

PROMPT = 256  # tokens, where nothing else is asked and the model takes as many
ROUNDS, FEWEST = 15, 3  # times every model has its turn; no fewer, however long it takes
OFTEN = 8  # a further turn of the first model for each so many others
SECONDS = 120.0  # after which no further round begins
TURN = 100_000_000  # nanoseconds of a turn, filled with repeats of a fast model
JOINT = 3  # models in which all sub-layers are cut
MISS = 0.05  # of the promise, from which on it is not kept

K = TypeVar("K", bound=Hashable)


def workload(batch: int, prompt: int | None, new_tokens: int, model: PreTrainedModel) -> Workload:
    """Resolve the length of the prompt; None: as `PROMPT` says, or what fits.

    Raises:
        WrongInput: the model has no room for so many tokens.
    """
    room = int(getattr(model.config, "max_position_embeddings", None) or new_tokens + PROMPT)
    prompt = prompt or max(1, min(PROMPT, room - new_tokens))
    if prompt + new_tokens > room:
        raise WrongInput(
            f"latency.prompt + latency.new_tokens is {prompt + new_tokens}, and the model takes {room} tokens"
        )
    return Workload(batch, prompt, new_tokens)


def nanoseconds(model: PreTrainedModel, work: Workload) -> int:
    """Measure one run of a workload, in nanoseconds."""
    return sum(timed(model, work))


def sampled(
    models: Mapping[K, Callable[[], PreTrainedModel]],
    work: Workload,
    progress: Progress,
    label: str,
    rounds: int = ROUNDS,
) -> dict[K, list[int]]:
    """Time the workload on each of the models, which are made when it is their turn.

    The first, against which the others are held, has more turns. A turn begins with a run that does not count.

    Returns:
        Nanoseconds of every run, by model.
    """
    first = next(iter(models))
    repeats = max(1, min(10, TURN // max(1, min(nanoseconds(models[first](), work) for _ in range(2)))))

    def turn(key: K) -> list[int]:
        model = models[key]()
        return [nanoseconds(model, work) for _ in range(repeats + 1)][1:]

    turns = {key: lambda key=key: turn(key) for key in models}
    more = len(models) // OFTEN
    found = interleaved(turns, progress, label, rounds=rounds, fewest=FEWEST, seconds=SECONDS, more_of_first=more)
    return {key: [time for times in each for time in times] for key, each in found.items()}


def typical(samples: Mapping[K, Sequence[int]]) -> tuple[dict[K, int], float]:
    """Find the median time of every model, and the noise: how far half of a model's times lie from it, as a share.

    The median, because on a machine that does other things, the least time is that of a moment when it did not.
    """
    found = {key: round(statistics.median(times)) for key, times in samples.items()}
    spread = [statistics.median(abs(t - found[key]) for t in times) / found[key] for key, times in samples.items()]
    return found, round(statistics.median(spread), 4)


def prices(dense: Dense, sites: Sequence[Site], work: Workload, progress: Progress) -> Prices:
    """Measure the price table of a model on this machine.

    Where all sub-layers are cut together to a quarter, half and three quarters, more or less is saved than the sum of
    what each shape saves alone; prices are scaled by the ratio.

    Raises:
        CannotGoOn: the times contradict each other.
    """
    keeps = trials(sites)
    models = {key: lambda counts=counts: cut(dense, counts) for key, counts in keeps.items()}
    samples = sampled(models, work, progress, "time sub-layers")
    found, noise = typical(samples)
    many, groups = Counter(site.shape for site in sites), {site.shape: site.n_groups for site in sites}
    times = {
        shape: {k: found[shape, k] if k < n else found["dense"] for k in timed_counts(n)} for shape, n in groups.items()
    }
    joint = [{site.shape: kept for site, kept in keeps[j].items()} for j in range(JOINT)]
    alone = [[times[shape][k] for shape, k in counts.items()] for counts in joint]
    scale = together(found["dense"], alone, [found[j] for j in range(JOINT)])
    curves = {shape: curve(times[shape], n, many[shape], scale) for shape, n in groups.items()}
    table = Prices(work, hardware(dense.model), found["dense"], noise, curves)
    if table.outside < 0:
        raise CannotGoOn(
            f"sub-layers were measured to take longer than the model (times vary by {noise:.0%}); "
            "the machine is too busy, run again when it is not"
        )
    return table


def trials(sites: Sequence[Site]) -> dict[Hashable, dict[Site, int]]:
    """List the models that are timed for a table, as what is kept of which sites; what is not named stays whole.

    "dense" comes first; (shape, kept) has all sites of a shape cut alike; 0, 1 and 2 have all sites cut, to a quarter,
    half and three quarters.
    """
    keeps: dict[Hashable, dict[Site, int]] = {"dense": {}}
    for shape in dict.fromkeys(site.shape for site in sites):
        some = [site for site in sites if site.shape == shape]
        n = some[0].n_groups
        keeps |= {(shape, k): dict.fromkeys(some, k) for k in timed_counts(n) if k < n}
    return keeps | {j: {site: _at(places(site.n_groups), j) for site in sites} for j in range(JOINT)}


def cut(dense: Dense, keeps: Mapping[Site, int]) -> PreTrainedModel:
    """Cut the dense model to the first so many groups of some sites; what is not cut is shared."""
    small, blocks = shallow(dense.model), dense.adapter.blocks(dense.model)
    for site, kept in keeps.items():
        if kept < site.n_groups:
            weight = dense.adapter.linear(blocks[site.block], site).weight
            dense.adapter.remove(small, site, Candidate(tuple(range(kept)), weight))
    return small


def runs(work: Workload, models: int) -> Runs:
    """Count the runs of so many models in turns; a turn is a run that does not count and one that does."""
    unknown = f"more rounds, as long as {SECONDS:.0f} s are not over"
    return Runs(FEWEST * models * 2, work.batch * (work.prompt + work.new_tokens), work.prompt, unknown=unknown)


def runs_before(work: Workload, sites: Sequence[Site]) -> Runs:
    """Count the runs of a table: the dense model, and one at a time those cut from it."""
    keeps = trials(sites).values()
    copied = max(sum(s.params_per_group * k for s, k in some.items() if k < s.n_groups) for some in keeps)
    return replace(runs(work, len(keeps) + len(keeps) // OFTEN), copied=copied)


def realised(
    dense: PreTrainedModel, small: PreTrainedModel, table: Prices, target: float, promised: float, progress: Progress
) -> dict[str, Any]:
    """Measure both models' time in turns, against the `promised` share of the dense model's; for the report."""
    models = {"dense": lambda: dense, "pruned": lambda: small}
    times, noise = typical(sampled(models, table.workload, progress, "time the result", rounds=2 * ROUNDS))
    found = times["pruned"] / times["dense"]
    return {
        "workload": vars(table.workload),
        "hardware": hardware(dense),
        "target": target,
        "promised": promised,
        "realised": found,
        "miss": found / promised - 1,
        "kept": abs(found / promised - 1) <= MISS,
        "milliseconds": {key: ns / 1e6 for key, ns in times.items()},
        "noise": {"table": table.noise, "result": noise},
    }


def hardware(model: PreTrainedModel) -> dict[str, str | int]:
    """Describe what times depend on besides shapes."""
    weight = next(model.parameters())
    gpu = weight.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(weight.device) if gpu else _processor(),
        "threads": torch.get_num_threads(),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "attention": str(model.config._attn_implementation),
        "torch": torch.__version__,
    }


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _at(some: Sequence[int], j: int) -> int:
    return some[min(j, len(some) - 1)]
