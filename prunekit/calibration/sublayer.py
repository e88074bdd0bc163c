"""One sub-layer of a block, cut to a candidate, on the tokens of a calibration pass: what pruners that train run."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear as apply

from prunekit.calibration.flow import Stream
from prunekit.errors import WrongInput
from prunekit.layer.candidates import Candidate
from prunekit.layer.sublayer import CutSubLayer, SubLayer
from prunekit.models.blocks import TOKENS_AT_ONCE, Seen
from prunekit.models.modules import grafted
from prunekit.plugins.adapter import Cut, ModelAdapter
from prunekit.plugins.learner import Effort
from prunekit.search.lessons import tokens_of
from prunekit.space.sites import Site

T = TypeVar("T")


@dataclass(eq=False)
class Sent:
    """Tokens that went through a sub-layer."""

    forward: int = 0
    back: int = 0  # there and back


@dataclass(frozen=True, eq=False)
class StreamedSubLayer(SubLayer):
    """The sub-layer that a site cuts, as the stream of a calibration pass reaches it."""

    adapter: ModelAdapter
    site: Site
    block: nn.Module  # dense, left as it is
    stream: Stream  # before the block, with what has reached the map of the site
    sent: Sent = field(default_factory=Sent)

    @classmethod
    def of(cls, adapter: ModelAdapter, site: Site, block: nn.Module, stream: Stream) -> StreamedSubLayer:
        """The sub-layer of a site that has received its tokens.

        Raises:
            WrongInput: it has parameters that are no linear maps.
        """
        found = cls(adapter, site, block, stream)
        cuts = adapter.cuts(block, site)
        plain = all(cut.parameter == "weight" and isinstance(_at(block, cut.path), nn.Linear) for cut in cuts)
        if not (site.form.coupled and plain):
            raise WrongInput(
                f"{site.name} is no attention or MLP of plain linear maps, and the pruner trains those alone; take "
                "another pruner, or the one that it wraps"
            )
        return found

    @property
    def chunks(self) -> Sequence[int]:
        return [len(hidden) for hidden in self.stream.hidden]

    @cached_property
    def power(self) -> float:
        """Σ ‖W x̂‖² over all tokens; 1 where nothing comes out."""
        weight = self.linear.weight
        return sum(float(apply(x, weight).square().sum(dtype=torch.float64)) for x in self.stream.inputs) or 1.0

    @property
    def linear(self) -> nn.Linear:
        return self.adapter.linear(self.block, self.site)

    @property
    def front(self) -> Sequence[Cut]:
        """The cuts of the producer layers."""
        return self.adapter.cuts(self.block, self.site)[:-1]

    def shapes(self, kept: int) -> list[tuple[int, int]]:
        return [(kept * cut.index.shape[1], cut.rows(self.block)[1]) for cut in self.front]

    def wanted(self, i: int) -> Float[Tensor, "windows length d"]:
        """What the dense map makes of chunk i, without its bias."""
        return apply(self.stream.inputs[i], self.linear.weight.detach())

    def cut(self, candidate: Candidate) -> StreamedCut:
        return StreamedCut(self, candidate)

    @torch.no_grad()
    def judged(
        self, candidate: Candidate, root: Float[Tensor, "d_out d_out"] | None = None
    ) -> tuple[float, float | None]:
        """(relative output error of a candidate over all tokens, what it costs in nats per token).

        Args:
            candidate: with producer layers of its own.
            root: R of `LayerProblem.nats`, without which nothing is priced: the price is E ½ ‖R e‖², e the error of
                the output, as there of moments.
        """
        cut, lost, nats, tokens = self.cut(candidate), 0.0, 0.0, 0
        for i in range(len(self.chunks)):
            missed = cut.missed(i).flatten(0, -2).double()
            lost, tokens = lost + float(missed.square().sum()), tokens + len(missed)
            if root is not None:
                nats += 0.5 * float((missed @ root.T).square().sum())
        return lost / self.power, None if root is None else nats / tokens


class StreamedCut(CutSubLayer):
    """A sub-layer with the weights of a candidate, in a block that shares all else with the dense one."""

    def __init__(self, whole: StreamedSubLayer, candidate: Candidate) -> None:
        assert candidate.kept is not None
        adapter, site, block = whole.adapter, whole.site, whole.block
        self.whole, self.kept = whole, candidate.kept
        weight = whole.linear.weight
        self.stored, self.dtype = weight.dtype, torch.promote_types(weight.dtype, torch.float32)
        self.block = grafted(block, adapter.pruned(block, site, in_model(site, candidate)))
        if self.dtype != self.stored:  # what is beside it too: norms, and a sub-layer in front
            self.block = copy.deepcopy(self.block).to(self.dtype)
        modules = [*(_at(self.block, cut.path) for cut in whole.front), adapter.linear(self.block, site)]
        for module in modules:
            own = module.weight.detach().to(self.dtype, copy=True)
            module.weight = nn.Parameter(own, requires_grad=True)
        self.linear = modules[-1]
        self.weights = [module.weight for module in modules]

    def losses(self, chunk: int) -> Float[Tensor, " windows"]:
        each = self.missed(chunk).square().flatten(1).sum(1)
        return each * (sum(self.whole.chunks) / self.whole.power)

    def missed(self, chunk: int) -> Float[Tensor, "windows length d"]:
        """f(x) - y."""
        made = apply(self._reaching(chunk), self.linear.weight)
        tokens = made.shape[0] * made.shape[1]
        if torch.is_grad_enabled():
            self.whole.sent.back += tokens
        else:
            self.whole.sent.forward += tokens
        return made - self.whole.wanted(chunk).to(made)

    def candidate(self) -> Candidate:
        *front, own = (self._stored(weight) for weight in self.weights)
        site = self.whole.site
        columns = torch.tensor(sorted(site.columns(self.kept)), device=own.device)
        weight = own.new_zeros(own.shape[0], site.d_in)
        weight[:, columns] = own
        if site.spread != 1:
            weight = weight[:, order_of(site, weight.device)]
        return Candidate(self.kept, weight, producers=tuple(front))

    def _stored(self, weight: Tensor) -> Tensor:
        most = torch.finfo(self.stored).max
        return weight.detach().clamp(-most, most).to(self.stored, copy=True)

    def _reaching(self, i: int) -> Float[Tensor, "windows length kept"]:
        """What reaches the last map; the block runs no further."""
        stream, seen = self.whole.stream, list[Tensor]()
        hidden, call = stream.hidden[i].to(self.dtype), stream.calls[i][self.whole.site.block]
        if self.dtype != self.stored:
            call = replace(call, args=_widened(call.args, self.dtype), kwargs=_widened(call.kwargs, self.dtype))

        def catch(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.append(args[0].reshape(*hidden.shape[:-1], -1))
            raise Seen

        with ExitStack() as stack:
            stack.enter_context(stream.replaying(self.block, i))
            stack.enter_context(self.linear.register_forward_pre_hook(catch))
            # others add up in no fixed order on the way back
            stack.enter_context(sdpa_kernel(SDPBackend.MATH) if hidden.is_cuda else nullcontext())
            stack.enter_context(suppress(Seen))
            call(self.block, hidden)
        return seen[0]


def token_forwards(effort: Effort, site: Site, weights: int) -> int:
    """What tokens that go through the sub-layer of a site cost, in tokens that go through all blocks.

    Args:
        effort: tokens; one that goes back too counts as in a lesson.
        site: of the sub-layer.
        weights: that a token is multiplied with in all blocks.
    """
    return -(-tokens_of(effort) * site.parameters(site.n_groups) // weights)


def chunked(windows: int, seqlen: int) -> list[int]:
    """Windows of every chunk of so many, as a stream has them."""
    some = max(1, TOKENS_AT_ONCE // seqlen)
    return [min(some, windows - start) for start in range(0, windows, some)]


def in_model(site: Site, candidate: Candidate) -> Candidate:
    """With columns in the order of the model."""
    if site.spread == 1:
        return candidate
    weight = torch.empty_like(candidate.weight)
    weight[:, order_of(site, weight.device)] = candidate.weight
    return Candidate(candidate.kept, weight, producers=candidate.producers)


def order_of(site: Site, device: torch.device) -> Tensor:
    """Columns of the model in the order of the layer problem, group by group."""
    if site.spread == 1:
        return torch.arange(site.d_in, device=device)
    return torch.tensor(site.columns(range(site.n_groups)), dtype=torch.long, device=device)


def _at(block: nn.Module, path: str) -> Any:
    return block.get_submodule(path)


def _widened(value: T, dtype: torch.dtype) -> T:
    """Floating tensors among the arguments of a block in another dtype."""
    found: Any = value
    if isinstance(value, Tensor) and value.is_floating_point():
        found = value.to(dtype)
    elif type(value) in (tuple, list):
        found = type(found)(_widened(each, dtype) for each in found)
    elif isinstance(value, Mapping):
        found = {key: _widened(each, dtype) for key, each in value.items()}
    return found
