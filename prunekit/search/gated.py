"""The dense model with gates before the maps that sites cut: a learner's questions are answered here."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, kl_div
from torch.utils.checkpoint import checkpoint

from prunekit.data.tokens import TokenBatch
from prunekit.errors import WrongInput
from prunekit.models.blocks import Call, chunks, entered
from prunekit.models.paging import pager_of
from prunekit.plugins.adapter import Cut, ModelAdapter, linear_at
from prunekit.plugins.learner import GateQuery, GateReply
from prunekit.space.sites import Site
from prunekit.system.memory import SHARES, Shares


class GatedModel:
    """A dense model, left as it was, and the text that a learner learns on."""

    def __init__(
        self,
        model: nn.Module,
        adapter: ModelAdapter,
        sites: Sequence[Site],
        text: TokenBatch,
        shares: Shares = SHARES,
    ) -> None:
        self.model, self.adapter, self.sites, self.text, self.shares = model, adapter, tuple(sites), text, shares
        self.blocks = adapter.blocks(model)
        weight = next(model.parameters())
        self.device, self.dtype = weight.device, torch.promote_types(weight.dtype, torch.float32)
        self._group: dict[Site, Tensor] = {}  # of every column, counted over all sites
        first = 0
        for site in self.sites:
            of = torch.empty(site.d_in, dtype=torch.long)
            of[torch.tensor(site.columns(range(site.n_groups)))] = torch.arange(site.n_groups).repeat_interleave(
                site.group_size
            )
            self._group[site] = (first + of).to(self.device)
            first += site.n_groups
        self.groups = first

    @staticmethod
    def graph_bytes(tokens: int, width: int, widest: int, blocks: int, heads: int, seqlen: int, itemsize: int) -> int:
        """What autograd keeps of so many tokens on their way through the model."""
        return tokens * itemsize * blocks * (10 * width + 4 * widest + 3 * heads * seqlen)

    def answer(self, query: GateQuery) -> GateReply:
        """Answer a question that was checked.

        Raises:
            WrongInput: a pass back finds a loss that is not finite, or slopes of all weights are wanted of a model that
                is read block by block.
        """
        if "taylor" in query.want and pager_of(self.model) is not None:
            raise WrongInput(
                "the learner needs the slopes of all weights at once, and the model is read block by block; "
                "give more --memory, or a learner that asks for the slopes of gates"
            )
        batch = self.text if query.windows is None else self.text.rows(list(query.windows))
        gates = query.gates.to(self.device, self.dtype, copy=True).requires_grad_(query.back)
        weights = dict(self._weights()) if "taylor" in query.want else {}
        total, each = 0.0, 1 / (len(batch) * (batch.seqlen - 1))
        slopes = [torch.zeros(x.shape, dtype=self.dtype, device=x.device) for x in (gates, *weights.values())]
        squares = {site: torch.zeros(site.d_in, dtype=self.dtype, device=self.device) for site in self.sites}
        with ExitStack() as stack:
            for weight in weights.values():
                stack.callback(weight.requires_grad_, weight.requires_grad)
                weight.requires_grad_(True)
            if query.back:
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # others add up in no fixed order on CUDA
            for ids in chunks(batch):
                hidden, calls = entered(self.model, self.adapter, ids)
                beside = self._through(hidden, calls, grad=False) if query.dense else None
                listened = squares if "power" in query.want else {}
                with self._gated(gates, listened):
                    out = self._through(hidden, calls, grad=query.back)
                loss, slope = self._judged(out.detach(), ids.to(self.device), beside, query, each)
                total += loss
                if slope is None:
                    continue
                if not math.isfinite(loss):
                    raise WrongInput("the loss under gates is not finite; try --dtype float32, or other text")
                with self._gated(gates, {}):  # what is run again on the way back meets them too
                    found = torch.autograd.grad(out, [gates, *weights.values()], slope, allow_unused=True)
                for i, part in enumerate(found):
                    if part is not None:
                        slopes[i] += part
        return GateReply(
            total if math.isfinite(total) else math.inf,
            slopes[0] if "gradient" in query.want else None,
            self._taylor(dict(zip(weights, slopes[1:], strict=True))) if "taylor" in query.want else None,
            self._power(squares, batch.n_tokens) if "power" in query.want else None,
        )

    # -- inside -------------------------------------------------------------------------------------

    def _through(self, hidden: Tensor, calls: Sequence[Call], *, grad: bool) -> Tensor:
        """What leaves the last block; blocks whose graphs find no place are run again on the way back."""
        again = grad and (pager_of(self.model) is not None or self._graph(hidden) > self.shares.hidden)
        with torch.set_grad_enabled(grad):
            for block, call in zip(self.blocks, calls, strict=True):
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
                stack.enter_context(linear.register_forward_pre_hook(partial(enter, site)))
                if linear._parameters.get("bias") is not None:  # asked for, that of a paged model would be read
                    open_ = bool(gates.detach()[self._group[site]].any())
                    stack.enter_context(linear.register_forward_hook(partial(leave, open_)))
            yield

    def _judged(
        self,
        hidden: Float[Tensor, "windows length d"],
        ids: Int64[Tensor, "windows length"],
        beside: Float[Tensor, "windows length d"] | None,
        query: GateQuery,
        each: float,
    ) -> tuple[float, Tensor | None]:
        """(the part of these windows in the loss, its slope at what leaves the last block where a pass back is due)."""
        total, slopes = 0.0, []
        dense: Sequence[Tensor | None] = [None] * len(ids) if beside is None else beside.split(1)
        for window, own, other in zip(hidden.split(1), ids, dense, strict=True):  # logits are wide: one at a time
            with torch.set_grad_enabled(query.back):
                left = window.detach().requires_grad_(query.back)
                logits = self.adapter.logits(self.model, left)[0, :-1].to(self.dtype)
                loss = query.text * cross_entropy(logits, own[1:], reduction="sum")
                if other is not None:
                    with torch.no_grad():
                        asked = self.adapter.logits(self.model, other)[0, :-1].to(self.dtype).log_softmax(-1)
                    divergence = kl_div(logits.log_softmax(-1), asked, reduction="sum", log_target=True)
                    loss = loss + query.dense * divergence
                loss = loss * each
            total += float(loss.detach())
            if query.back:
                slopes += torch.autograd.grad(loss, left)
        return total, torch.cat(slopes) if query.back else None

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
                weight = linear_at(self.blocks[site.block], cut.path).weight.detach()
                terms = (weight * slopes[site.block, cut.path]).to(self.dtype).abs().sum(1 - cut.dim)
                score += terms[cut.index.to(self.device)].sum(1)
            found.append(score)
        return torch.cat(found)

    def _power(self, squares: dict[Site, Tensor], tokens: int) -> Float[Tensor, " groups"]:
        found = torch.zeros(self.groups, dtype=self.dtype, device=self.device)
        for site, total in squares.items():
            weight = self.adapter.linear(self.blocks[site.block], site).weight.detach()
            found.index_add_(0, self._group[site], weight.to(self.dtype).abs().sum(0) * (total / tokens).sqrt())
        return found
