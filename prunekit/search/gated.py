"""The dense model with gates before the maps that sites cut: a learner's questions are answered here."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, kl_div
from torch.nn.functional import linear as apply
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from prunekit.data.tokens import TokenBatch
from prunekit.errors import WrongInput
from prunekit.models.blocks import Call, chunks, entered
from prunekit.models.opening import stored_as
from prunekit.models.paging import pager_of
from prunekit.plugins.adapter import Cut, ModelAdapter, linear_at
from prunekit.plugins.learner import Decision, GateQuery, GateReply, Training
from prunekit.search.weights import Weights
from prunekit.space.sites import Site
from prunekit.system.memory import SHARES, Shares


class GatedModel:
    """A dense model, left as it was, and the text that a learner learns on.

    Where weights are trained along, a copy of the model answers, and the dense one says what the copy diverges from.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        adapter: ModelAdapter,
        sites: Sequence[Site],
        text: TokenBatch,
        shares: Shares = SHARES,
        training: Training | None = None,
        seed: int = 0,
        teacher: PreTrainedModel | None = None,
    ) -> None:
        """`teacher`: what the answers diverge from, where `model` is a narrower one; None: `model` itself."""
        self.dense, self.adapter, self.sites, self.text, self.shares = (
            teacher or model,
            adapter,
            tuple(sites),
            text,
            shares,
        )
        self.weights = None if training is None else Weights(model, adapter, training, seed)
        self.model = model if self.weights is None else self.weights.model
        self.blocks, self.dense_blocks = adapter.blocks(self.model), adapter.blocks(self.dense)
        weight = next(self.model.parameters())
        self.device, self.dtype = weight.device, torch.promote_types(weight.dtype, torch.float32)
        self._group: dict[Site, Tensor] = {}  # of every column, counted over all sites
        self._rank: dict[Site, Tensor] = {}  # of every weight of a pattern, counted over its site
        self._first: dict[Site, slice] = {}  # of the groups of all sites, those of this
        self._epoch = -1  # of `reorder` questions: for which ranks were found
        first = 0
        for site in self.sites:
            units = site.n_groups if site.form.shrinks else site.n_groups // site.step
            self._first[site] = slice(first, first + units)
            if site.form.shrinks:
                of = torch.empty(site.d_in, dtype=torch.long)
                of[torch.tensor(site.columns(range(site.n_groups)))] = torch.arange(site.n_groups).repeat_interleave(
                    site.group_size
                )
                self._group[site] = (first + of).to(self.device)
            first += units
        self.groups = first

    @staticmethod
    def graph_bytes(tokens: int, width: int, widest: int, blocks: int, heads: int, seqlen: int, itemsize: int) -> int:
        """What autograd keeps of so many tokens on their way through the model."""
        return tokens * itemsize * blocks * (10 * width + 4 * widest + 3 * heads * seqlen)

    def answer(self, query: GateQuery, number: int = 0) -> GateReply:
        """Answer a question that was checked, then take the step that it asks for.

        Args:
            query: what is asked.
            number: of the question, from 0.

        Raises:
            WrongInput: a pass back finds a loss that is not finite, or slopes of all weights are wanted of a model that
                is read block by block.
        """
        if query.want & {"taylor", "aligned"} and pager_of(self.model) is not None:
            raise WrongInput(
                "the learner needs the slopes of all weights at once, and the model is read block by block; "
                "give more --memory, or a learner that asks for the slopes of gates"
            )
        if self.weights is not None and (epoch := number // self.weights.training.reorder) != self._epoch:
            self._epoch = epoch
            self._rank.clear()
        trained = [] if self.weights is None or not (query.rate or "lora" in query.want) else self.weights.parameters
        weights: dict[tuple[int, str], Tensor] = dict(self._weights()) if "taylor" in query.want else {}
        own: dict[Site, Tensor] = {}
        if "aligned" in query.want:
            own = {site: self.adapter.linear(self.blocks[site.block], site).weight for site in self.sites}
        leaves: dict[Tensor, None] = dict.fromkeys((*trained, *weights.values(), *own.values()))
        squares = {site: torch.zeros(site.d_in, dtype=self.dtype, device=self.device) for site in self.sites}
        squares = squares if "power" in query.want else {}
        batch = self.text if query.windows is None else self.text.rows(list(query.windows))
        each, at_gates, slopes = self._passed(batch, query, list(leaves), squares)
        aligned = None
        if "aligned" in query.want:
            beside = self.text.rows(list(query.beside))
            _, _, others = self._passed(beside, query, list(own.values()), {})
            aligned = self._aligned({site: slopes[weight] * others[weight] for site, weight in own.items()})
        total = math.fsum(each) / len(each)
        reply = GateReply(
            total if math.isfinite(total) else math.inf,
            at_gates if "gradient" in query.want else None,
            self._taylor({key: slopes[weight] for key, weight in weights.items()}) if weights else None,
            self._power(squares, batch.n_tokens) if "power" in query.want else None,
            self._lora(slopes) if "lora" in query.want else None,
            aligned,
            torch.tensor(each, dtype=torch.float64) if "windows" in query.want else None,
        )
        if query.rate and self.weights is not None:
            self.weights.step([slopes[p] for p in trained], query.rate)
        return reply

    def state(self) -> dict[str, Tensor]:
        """All that later answers depend on beside what is asked; nothing where no weights are trained."""
        if self.weights is None:
            return {}
        orders = {f"{i}.rank": self._rank[site] for i, site in enumerate(self.sites) if site in self._rank}
        small = {name: rank.to(torch.int16) for name, rank in orders.items()}
        return {"epoch": torch.tensor(self._epoch), **small, **self.weights.state()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go back, or on, to a state."""
        assert self.weights is not None
        self._epoch = int(state["epoch"])
        self._rank = {
            site: state[f"{i}.rank"].to(self.device, torch.long)
            for i, site in enumerate(self.sites)
            if f"{i}.rank" in state
        }
        self.weights.restore(state)

    @torch.no_grad()
    def trained(self, decision: Decision) -> PreTrainedModel:
        """The copy as a plain model in which the decided gates are part of the weights; it answers no more.

        What reaches the map of a site from a group that goes is multiplied by 0, what stays by its scale.
        """
        assert self.weights is not None
        model = self.weights.merged()
        for site, kept in zip(self.sites, decision.kept, strict=True):
            where, ids = self._first[site], torch.tensor(kept, dtype=torch.long)
            gate = torch.zeros(self.groups, dtype=torch.float64)
            gate[where.start + ids] = 1.0 if decision.scales is None else decision.scales[where][ids]
            weight = self.adapter.linear(self.blocks[site.block], site).weight
            gate = gate.to(weight)
            if site.form.shrinks:
                weight.mul_(gate[self._group[site]])
            else:
                order = self._rank[site] if site in self._rank else ranks(weight, site)
                weight.mul_(gate[where][order])
        return stored_as(model, next(self.dense.parameters()).dtype)

    # -- inside -------------------------------------------------------------------------------------

    def _passed(
        self, batch: TokenBatch, query: GateQuery, leaves: Sequence[Tensor], squares: dict[Site, Tensor]
    ) -> tuple[list[float], Tensor, dict[Tensor, Tensor]]:
        """(the loss of every window, its mean's slope at the gates and at every leaf where the question goes back)."""
        gates = query.gates.to(self.device, self.dtype, copy=True).requires_grad_(query.back)
        losses, share = list[float](), 1 / (len(batch) * (batch.seqlen - 1))
        ends = [gates, *leaves]
        slopes = [torch.zeros(x.shape, dtype=self.dtype, device=x.device) for x in ends] if query.back else []
        with ExitStack() as stack:
            for leaf in leaves:
                stack.callback(leaf.requires_grad_, leaf.requires_grad)
                leaf.requires_grad_(True)
            if query.back:
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # others add up in no fixed order on CUDA
            for ids in chunks(batch):
                hidden, calls = entered(self.model, self.adapter, ids)
                beside = None
                if query.dense:
                    before, called = entered(self.dense, self.adapter, ids)
                    beside = self._through(before, called, grad=False, dense=True)
                with self._gated(gates, squares):
                    out = self._through(hidden, calls, grad=query.back)
                some, slope = self._judged(out.detach(), ids.to(self.device), beside, query, share)
                losses += [loss * len(batch) for loss in some]
                if slope is None:
                    continue
                if not all(map(math.isfinite, some)):
                    raise WrongInput("the loss under gates is not finite; try --dtype float32, or other text")
                with self._gated(gates, {}):  # what is run again on the way back meets them too
                    found = torch.autograd.grad(out, ends, slope, allow_unused=True)
                for i, part in enumerate(found):
                    if part is not None:
                        slopes[i] += part
        return losses, slopes[0] if slopes else gates, dict(zip(leaves, slopes[1:], strict=bool(slopes)))

    def _through(self, hidden: Tensor, calls: Sequence[Call], *, grad: bool, dense: bool = False) -> Tensor:
        """What leaves the last block; blocks whose graphs find no place are run again on the way back."""
        again = grad and (pager_of(self.model) is not None or self._graph(hidden) > self.shares.hidden)
        with torch.set_grad_enabled(grad):
            for block, call in zip(self.dense_blocks if dense else self.blocks, calls, strict=True):
                hidden = checkpoint(call, block, hidden, use_reentrant=False) if again else call(block, hidden)  # type: ignore[assignment]
        return hidden

    def _graph(self, hidden: Tensor) -> int:
        config: Any = self.model.config
        heads, widest = getattr(config, "num_attention_heads", 1), max(site.d_in for site in self.sites)
        tokens, size = hidden.shape[0] * hidden.shape[1], hidden.element_size()
        return self.graph_bytes(tokens, hidden.shape[2], widest, len(self.blocks), heads, hidden.shape[1], size)

    @contextmanager
    def _gated(self, gates: Tensor, squares: dict[Site, Tensor]) -> Iterator[None]:
        """Within, gates multiply what the maps of the sites receive; the squares of that are added to `squares`."""

        def enter(site: Site, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x = args[0] * gates[self._group[site]].to(args[0].dtype)
            if site in squares:
                squares[site] += x.detach().flatten(0, -2).to(self.dtype).square().sum(0)
            return x, *args[1:]

        def leave(open_: bool, _: nn.Module, __: Any, out: Tensor) -> Tensor:
            return out if open_ else torch.zeros_like(out)

        with ExitStack() as stack:
            for site in self.sites:
                linear = self.adapter.linear(self.blocks[site.block], site)
                if not site.form.shrinks:
                    stack.enter_context(self._weighed(linear, site, gates))
                    continue
                stack.enter_context(linear.register_forward_pre_hook(partial(enter, site)))
                if linear._parameters.get("bias") is not None:  # asked for, that of a paged model would be read
                    open_ = bool(gates.detach()[self._group[site]].any())
                    stack.enter_context(linear.register_forward_hook(partial(leave, open_)))
            yield

    @contextmanager
    def _weighed(self, linear: nn.Linear, site: Site, gates: Tensor) -> Iterator[None]:
        """Within, gates multiply the weights of a map by their rank in their block."""
        if site not in self._rank:
            self._rank[site] = ranks(self._weight(linear).detach(), site)

        def forward(x: Tensor) -> Tensor:
            gate = _Picked.apply(gates[self._first[site]], self._rank[site])
            return apply(x, self._weight(linear) * gate.to(linear.weight.dtype), linear.bias)  # type: ignore[union-attr]

        shadowed = vars(linear).get("forward")
        linear.forward = forward  # type: ignore[method-assign]  of this instance, within
        try:
            yield
        finally:
            del linear.forward
            if shadowed is not None:
                linear.forward = shadowed

    def _weight(self, linear: nn.Linear) -> Tensor:
        return linear.weight if self.weights is None else self.weights.weight(linear)

    def _judged(
        self,
        hidden: Float[Tensor, "windows length d"],
        ids: Int64[Tensor, "windows length"],
        beside: Float[Tensor, "windows length d"] | None,
        query: GateQuery,
        each: float,
    ) -> tuple[list[float], Tensor | None]:
        """(the part of every window in the loss, its slope at what leaves the last block where a pass back is due)."""
        losses, slopes = list[float](), list[Tensor]()
        dense: Sequence[Tensor | None] = [None] * len(ids) if beside is None else beside.split(1)
        for window, own, other in zip(hidden.split(1), ids, dense, strict=True):  # logits are wide: one at a time
            with torch.set_grad_enabled(query.back):
                left = window.detach().requires_grad_(query.back)
                logits = self.adapter.logits(self.model, left)[0, :-1].to(self.dtype)
                loss = query.text * cross_entropy(logits, own[1:], reduction="sum")
                if other is not None:
                    with torch.no_grad():
                        asked = self.adapter.logits(self.dense, other)[0, :-1].to(self.dtype).log_softmax(-1)
                    divergence = kl_div(logits.log_softmax(-1), asked, reduction="sum", log_target=True)
                    loss = loss + query.dense * divergence
                loss = loss * each
            losses.append(float(loss.detach()))
            if query.back:
                slopes += torch.autograd.grad(loss, left)
        return losses, torch.cat(slopes) if query.back else None

    def _weights(self) -> Iterator[tuple[tuple[int, str], Tensor]]:
        """The weights of all maps that groups go through, by (block, path)."""
        for site in self.sites:
            for cut in self._cuts(site):
                yield (site.block, cut.path), linear_at(self.blocks[site.block], cut.path).weight

    def _cuts(self, site: Site) -> Sequence[Cut]:
        return self.adapter.cuts(self.blocks[site.block], site)

    def _taylor(self, slopes: dict[tuple[int, str], Tensor]) -> Float[Tensor, " groups"]:
        found = []
        for site in self.sites:
            score = torch.zeros(site.n_groups, dtype=self.dtype, device=self.device)
            for cut in self._cuts(site):
                weight = self._weight(linear_at(self.blocks[site.block], cut.path)).detach()
                score += self._by_group(weight * slopes[site.block, cut.path], cut)
            found.append(score)
        return torch.cat(found)

    def _lora(self, slopes: dict[Tensor, Tensor]) -> Float[Tensor, "maps groups"]:
        """Map by map, Σ |ĝ w| over the weights of every group."""
        assert self.weights is not None
        cuts = {site: self._cuts(site) for site in self.sites}
        found = torch.zeros(max(map(len, cuts.values())), self.groups, dtype=self.dtype, device=self.device)
        for site, some in cuts.items():
            for row, cut in enumerate(some, len(found) - len(some)):
                linear = linear_at(self.blocks[site.block], cut.path)
                terms = self.weights.slope(linear, slopes) * self._weight(linear).detach()
                found[row, self._first[site]] = self._by_group(terms, cut)
        return found

    def _by_group(self, terms: Float[Tensor, "d_out d_in"], cut: Cut) -> Float[Tensor, " groups"]:
        """Σ of magnitudes over the rows or columns of every group."""
        return terms.to(self.dtype).abs().sum(1 - cut.dim)[cut.index.to(self.device)].sum(1)

    def _aligned(self, products: dict[Site, Tensor]) -> Float[Tensor, " groups"]:
        found = torch.zeros(self.groups, dtype=self.dtype, device=self.device)
        for site, product in products.items():
            if site.form.shrinks:
                found.index_add_(0, self._group[site], product.sum(0))
            else:
                found[self._first[site]] = of_ranks(product, self._rank[site], self._first[site])
        return found

    def _power(self, squares: dict[Site, Tensor], tokens: int) -> Float[Tensor, " groups"]:
        found = torch.zeros(self.groups, dtype=self.dtype, device=self.device)
        for site, total in squares.items():
            weight = self.adapter.linear(self.blocks[site.block], site).weight.detach()
            found.index_add_(0, self._group[site], weight.to(self.dtype).abs().sum(0) * (total / tokens).sqrt())
        return found


def ranks(weight: Float[Tensor, "d_out d_in"], site: Site) -> Int64[Tensor, "d_out d_in"]:
    """Of every weight among the magnitudes of its block, the largest first, as many in one as counts are apart; on a
    tie the one further left comes first."""
    m = site.form.m
    together = m * site.step // site.n_groups
    order = torch.sort(weight.reshape(len(weight), -1, m).abs(), stable=True, dim=-1, descending=True).indices
    place = torch.empty_like(order).scatter_(-1, order, torch.arange(m, device=order.device).expand_as(order))
    return (place // together).reshape(weight.shape)


def of_ranks(values: Tensor, rank: Tensor, where: slice) -> Tensor:
    """Sums over the weights of every rank, in an order that does not change."""
    return torch.stack([torch.where(rank == r, values, 0).sum() for r in range(where.stop - where.start)])


class _Picked(torch.autograd.Function):
    """gates[rank], whose slope is added up in a fixed order."""

    @staticmethod
    def forward(ctx: Any, gates: Tensor, rank: Tensor) -> Tensor:
        ctx.save_for_backward(rank)
        ctx.count = len(gates)
        return gates[rank]

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        (rank,) = ctx.saved_tensors
        return of_ranks(slopes[0], rank, slice(0, ctx.count)), None
