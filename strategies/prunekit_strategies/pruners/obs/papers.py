"""Papers that are configurations of OBS: each has its name, its choices and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from prunekit_strategies.pruners.obs.obs import OBS, Aim, Penalty, Score, Search, Slope


@dataclass(frozen=True)
class OSSCAR(OBS):
    """Ten neurons or two heads at a time by their exact price, aimed at the dense output, then exchanges.

    Source: OSSCAR (Meng et al. 2024, arXiv 2403.12983), with its local search, which the released code leaves off.
    """

    aim: Aim = "dense"
    search: Search = "swap"
    step: tuple[int, int] = (10, 10)
    head_step: int = 2


@dataclass(frozen=True)
class SlimGPT(OBS):
    """One head at a time by grouped Cholesky prices; neurons in steps that shrink from 1024 to 8.

    Source: SlimGPT (arXiv 2412.18110), batched greedy pruning and dynamic group size. We differ in
    the law of the steps, which is not published: they depend on what is left, not on the count that is asked, so that
    one removal order answers all counts. `score: exact` costs the same and asks for the true price of a head.
    """

    score: Score = "grouped-cholesky"
    step: tuple[int, int] = (8, 1024)


@dataclass(frozen=True)
class SPAP(OBS):
    """The groups that a growing penalty on a set of as many as are to go makes vanish, then least squares.

    Source: SPAP (arXiv 2505.03373), its choice of neurons; its updates we did not find: these are derived, see
    `penalty.py`. Ours: heads are chosen so too, and the penalty may be on all groups instead (`penalty: log`).
    """

    search: Search = "penalty"
    penalty: Penalty = "set"


@dataclass(frozen=True)
class Tyr(OBS):
    """One head or 16 neurons at a time, by half their exact price and the first-order term.

    Source: Týr-the-Pruner (Li et al. 2025, arXiv 2503.09657), its local pruner; see `OBS` for the term.
    """

    step: tuple[int, int] = (16, 16)
    first_order: Slope = "absolute"


@dataclass(frozen=True)
class ZipLM(OBS):
    """One group at a time by its exact price, against its own output: OBS as it stands, under its first name.

    Source: ZipLM (Kurtic et al. 2023, arXiv 2302.04089); DarwinLM (arXiv 2502.07780) prunes its layers so.
    """
