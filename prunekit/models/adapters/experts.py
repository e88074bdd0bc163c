"""Mixtures of experts: whole experts are groups, and their rows of the router go with them.

    y = Σ_e g_e f_e        at a token, over the experts that it selects                                     (1)

Every channel of every token is one sample with E inputs, the channel of g_e f_e, zero where e is not selected: y is
their sum, a linear map of weight 1 × E that is all ones. That map is the site. No module of a model is it: it stands
beside the module with the experts for as long as that is there, and is called only while somebody looks at it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunekit.layer.candidates import Candidate
from prunekit.models.adapters.transformer import Transformer
from prunekit.models.classes import Experts, Part, SkippedMixer
from prunekit.plugins.adapter import Cut, Heads, UnsupportedModel, linear_at
from prunekit.space.forms import Form
from prunekit.space.sites import Site


class SumOfExperts(nn.Linear):
    """The sum over experts, (..., channels, experts) -> (..., channels): a linear map whose weight is all ones."""

    def __init__(self, experts: int, like: Tensor) -> None:
        super().__init__(experts, 1, bias=False, device="meta")
        self.weight = nn.Parameter(torch.ones(1, experts, dtype=like.dtype, device=like.device), requires_grad=False)
        self._ones = (self.weight,)  # in a tuple: a parameter once, not twice

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).squeeze(-1)

    @property
    def looked_at(self) -> bool:
        """Whether what it does matters: somebody listens, or its weight is another one."""
        return bool(self._forward_hooks or self._forward_pre_hooks) or self.weight is not self._ones[0]


_sums: WeakKeyDictionary[nn.Module, SumOfExperts] = WeakKeyDictionary()  # by the module with the experts
_lock = Lock()


@dataclass(frozen=True)
class MixtureOfExperts(Transformer):
    """A family of experts; it sets `family`. Attention is cut as ever; a shared expert and plain MLPs stay as they are.

    Removal changes the routing: the next experts come in, and weights are normalised over those that stay. A cut layer
    equals the dense one whose router gives removed experts a score of -∞. The statistics, the errors and the
    activations that calibration carries on are those of the routing as it was; searches run cut layers.
    """

    factors = False
    by_block = False  # a checkpoint has one tensor for every matrix of every expert

    @property
    def experts(self) -> Experts:
        assert self.family.experts is not None
        return self.family.experts

    def prepare(self, model: PreTrainedModel) -> PreTrainedModel:
        """Expert after expert: in a fixed order on every device, and in any dtype."""
        model.config._experts_implementation = "eager"
        return model

    def sites(self, model: nn.Module, heads: Heads = "kv") -> tuple[Site, ...]:
        found = list[Site]()
        for index, block in enumerate(self.blocks(model)):
            if not self.dropped(block):
                found.append(self._site(block, index, "attention", heads))
            if self.experts.there(block):
                found.append(self._experts_site(block, index))
        return tuple(found)

    def linear_sites(self, model: nn.Module, form: Form) -> tuple[Site, ...]:
        raise UnsupportedModel(
            "single weights of experts cannot be removed yet, and most of this model is experts; "
            "remove whole experts with structure groups"
        )

    def stages(self, block: nn.Module) -> list[tuple[str, ...]]:
        """Of attention; the matrices of experts are no linear maps."""
        return [] if self.dropped(block) else [self.family.producers("attention"), (self.family.columns["attention"],)]

    def part(self, site: Site) -> str | None:  # type: ignore[override]
        return "experts" if site.kind == "experts" else "attention"

    def holder(self, site: Site) -> str | None:
        return self.experts.path if site.kind == "experts" else self.family.attention

    def stream_before(self, site: Site) -> str | None:
        if site.kind != "experts":
            return None
        (norm,) = self.family.norms["mlp"]  # of what attention was added to; it comes before the experts
        return norm

    def map_at(self, block: nn.Module, path: str) -> nn.Linear:
        if path != self.experts.path:
            return super().map_at(block, path)
        module: Any = block.get_submodule(path)
        like = next(module.parameters())
        with _lock:
            found = _sums.get(module)
            if found is None or (found.weight.dtype, found.weight.device) != (like.dtype, like.device):
                found = _sums[module] = SumOfExperts(module.num_experts, like)
        return found

    def maps(self, block: nn.Module, site: Site) -> list[nn.Linear]:
        return [self.linear(block, site)] if site.kind == "experts" else super().maps(block, site)

    def multiplied(self, block: nn.Module) -> int:
        if not self.experts.there(block):
            return super().multiplied(block)
        module, router = (block.get_submodule(path) for path in (self.experts.path, self.experts.router))
        each = sum(p[0].numel() for p in module.parameters())
        return super().multiplied(block) + _top_k(router) * each + sum(p.numel() for p in router.parameters())

    def cuts(self, block: nn.Module, site: Site) -> Sequence[Cut]:
        if site.kind != "experts":
            return super().cuts(block, site)
        every = torch.arange(site.n_groups)[:, None]
        front = (
            Cut(path, 0, every, name)
            for path in (self.experts.router, self.experts.path)
            for name, _ in block.get_submodule(path).named_parameters()
        )
        return *front, Cut(self.experts.path, 1, every)

    def pruned(self, block: nn.Module, site: Site, candidate: Candidate) -> dict[str, nn.Module]:
        if site.kind != "experts":
            return super().pruned(block, site, candidate)
        if not candidate.kept or len(candidate.kept) < site.minimum:
            raise ValueError(
                f"{site.name}: a token selects {site.minimum} experts, and the candidate keeps {candidate.kept}"
            )
        kept, experts = torch.tensor(candidate.kept), self.experts
        router, module = (_of_experts(block.get_submodule(path), kept) for path in (experts.router, experts.path))
        for place, scale in enumerate(candidate.weight[0, kept.to(candidate.weight.device)].tolist()):
            for name in experts.outputs if scale != 1 else ():
                own = module.get_parameter(name).data[place]  # which is of this module alone
                own.copy_(own.double() * scale)
        return {experts.router: router, experts.path: module}

    @contextmanager
    def exposed(self, block: nn.Module) -> Iterator[None]:
        """As promised; nothing is computed in another way while nobody looks at the sum."""
        if not self.experts.there(block):
            yield
            return
        module: Any = block.get_submodule(self.experts.path)
        total = self.map_at(block, self.experts.path)
        assert isinstance(total, SumOfExperts)
        if "forward" in vars(module) or not total.looked_at:  # or others say what it answers
            yield
            return

        def forward(hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            return total(contributions(module, hidden, ids, weights))

        module.forward = forward
        try:
            yield
        finally:
            del module.forward

    def dropped(self, block: nn.Module) -> tuple[Part, ...]:
        return ("attention",) if isinstance(block.get_submodule(self.family.attention), SkippedMixer) else ()

    def biased(self, block: nn.Module) -> tuple[Part, ...]:
        there = not self.dropped(block) and linear_at(block, self.family.columns["attention"]).bias is not None
        return ("attention",) if there else ()

    def ranks(self, block: nn.Module) -> dict[str, int]:
        return {}

    def layer_config(self, block: nn.Module) -> dict[str, Any]:
        dropped = self.dropped(block)
        entry: dict[str, Any] = {"skip": list(dropped)} if dropped else {}
        query, kv = (1, 1) if dropped else self.heads(block)[:2]  # a stub caches one head
        entry[self.family.query_heads] = query
        if self.family.kv_heads is not None:
            entry[self.family.kv_heads] = kv
        if self.experts.there(block):
            entry[self.experts.count] = block.get_submodule(self.experts.path).num_experts
        return entry

    def _experts_site(self, block: nn.Module, index: int) -> Site:
        path, router = self.experts.path, block.get_submodule(self.experts.router)
        name = f"{self.layers}.{index}.{path}"
        module: Any = block.get_submodule(path)
        count = module.num_experts
        for each in (module, router):
            for parameter, value in each.named_parameters():
                if not value.is_floating_point() or len(value) != count:
                    raise UnsupportedModel(f"{name}: {parameter} is no plain matrix of every expert; prune before that")
        price = sum(p.numel() for each in (module, router) for p in each.parameters()) // count
        channels = router.get_parameter("weight").shape[1]
        return Site(
            name, index, "experts", count, 1, price, minimum=min(_top_k(router), count), channels=channels
        )  # fmt: skip


def contributions(module: nn.Module, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """g_e f_e of every expert at every token, (tokens, channels, experts); zeros where a token has not selected it.

    Args:
        module: with the experts; each is asked by itself for its own tokens.
        hidden: (tokens, channels).
        ids: of the experts that a token selects, (tokens, selected).
        weights: g_e of them, (tokens, selected).
    """
    experts: Any = module
    found = []
    for expert in range(experts.num_experts):
        tokens, place = (ids == expert).nonzero(as_tuple=True)
        made = hidden.new_zeros(hidden.shape)
        if len(tokens):
            one = type(module).forward(module, hidden[tokens], ids[tokens, place, None], weights[tokens, place, None])
            made = made.index_copy(0, tokens, one)
        found.append(made)
    return torch.stack(found, dim=-1)


def _top_k(router: Any) -> int:
    return int(router.top_k)


def _of_experts(module: nn.Module, kept: Tensor) -> nn.Module:
    """The module with some of its experts; what is not of experts is shared."""
    twin: Any = copy.copy(module)
    twin._parameters = {
        name: nn.Parameter(value.detach().index_select(0, kept.to(value.device)), value.requires_grad)
        for name, value in module.named_parameters(recurse=False)
    }
    twin.num_experts = len(kept)
    return twin
