"""The outer loop of a recipe that names several shares of the residual width: each is searched, the objective decides.

A channel is in every matrix, so that the price of a group depends on the width, and no table of prices adds up over
both. So the width is fixed, the search of the recipe is held under the exact budget of the dense model, what it comes
to is built, and the objective judges it; then the next. All read the same tokens, under the same limit. The lowest loss
wins, the lower share on a tie.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from prunekit.errors import PluginError
from prunekit.run.search import run_search
from prunekit.run.spaces import Shared, share_spaces
from prunekit.run.stages import Run
from prunekit.run.width import narrow
from prunekit.search.ledger import Ledger


def choose_share(run: Run) -> Run:
    """Search with every share of the width that a recipe names, and go on with the best.

    A share that is on record is not searched again, so that an interrupted run goes on behind it.

    Args:
        run: of a recipe with several shares, over the dense model.

    Returns:
        The run of the best share. Its ledger holds what was found with each, and then the conversation of the best,
        which the search replays.

    Raises:
        WrongInput: as `share_spaces`.
        PluginError: no model that was found has a finite loss.
    """
    dense = run.dense
    tried, found = share_spaces(run.parts, dense.model, dense.adapter, dense.dtype), list[dict[str, Any]]()
    for each in tried:
        question = {"kind": "share", "share": each.share, "channels": each.width}
        answer: dict[str, Any] = run.ledger.once(question, lambda each=each: _searched(_begun(run, each, len(tried))))
        found.append({"share": each.share, "channels": each.width, **answer})
    losses = [math.inf if each["loss"] is None else each["loss"] for each in found]
    if not any(map(math.isfinite, losses)):
        raise PluginError(
            f"{type(run.parts.objective).__name__} has no finite loss for any of {len(found)} shares of the width, so "
            "that none is better than another; choose another objective, or look at the model and its text"
        )
    best = losses.index(min(losses))
    run.progress.say(told(found, best))
    won = _begun(run, tried[best], len(tried))
    return replace(won, parts=run.parts, ledger=run.ledger.followed_by(won.ledger), shares=found, among=len(tried))


def told(found: Sequence[Mapping[str, Any]], best: int) -> str:
    """What was found with every share, in a sentence for the user."""

    def said(one: Mapping[str, Any]) -> str:
        loss = "no finite loss" if one["loss"] is None else f"{one['loss']:.4g}"
        return f"{one['share']:g} ({one['channels']:,} channels) {loss}"

    return f"width.share {found[best]['share']:g} has the lowest loss: {', '.join(map(said, found))}"


def _begun(run: Run, each: Shared, among: int) -> Run:
    """A run with one of the shares, in a folder of its own."""
    place, parts = run.place / f"share-{each.share:g}", run.parts.with_share(each.share, among)
    place.mkdir(exist_ok=True)
    ledger, dense, wide = Ledger(place / "ledger.jsonl"), run.dense, None
    if ledger.damaged is not None:
        run.progress.say(f"{ledger.path} is damaged from line {ledger.damaged} on: that is asked anew")
    if each.share:
        text, clock = run.draws.calibration, run.clock.shared
        dense, wide = narrow(parts, run.dense, text, run.shelf, run.progress, clock), run.dense
    return replace(
        run, parts=parts, dense=dense, wide=wide, whole=each.space, ledger=ledger, place=place, share=each.share,
        decided={}, learned={}, domains={}, problems=[], measures=None if each.share else run.measures,
    )  # fmt: skip


def _searched(run: Run) -> dict[str, Any]:
    """Search with one share, build what was found, and judge it on all search tokens."""
    ((net, answer),) = run_search([run])
    net, plan = run.rebuild(net, answer)
    with run.clock("evaluate"):
        loss = run.final_loss(net, plan)
    net.rest()
    ledger, text = run.ledger, run.draws.search
    learnt = run.parts.objective.training(text.n_tokens)
    beside = 3 * text.lessons.first(learnt).n_tokens if learnt and text.lessons is not None else 0
    return {
        "loss": loss if math.isfinite(loss) else None,
        "questions": ledger.questions,
        "token_forwards": ledger.tokens + ledger.trained,
        "trained": ledger.trained,
        "judged": text.n_tokens + beside,  # token-forwards of the loss
    }
