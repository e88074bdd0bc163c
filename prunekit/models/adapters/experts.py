"""Mixtures of experts: whole experts are groups, and their rows of the router go with them; or neurons inside of them.

    y = Σ_e g_e f_e        at a token, over the experts that it selects                                     (1)

Every channel of every token is one sample with E inputs, the channel of g_e f_e, zero where e is not selected: y is
their sum, a linear map of weight 1 × E that is all ones. That map is the site. No module of a model is it: it stands
beside the module with the experts for as long as that is there, and is called only while somebody looks at it.

    y = Σ_e W_e x_e + Σ_e g_e b_e        x_e = g_e h_e, h_e the neurons of expert e, W_e its output matrix          (2)

Where neurons go, the site is the map [W_1 … W_E] of all x_e side by side, of which those are zero that a token does not
select. It is no module either.

    y = y_experts + s f        f the shared expert's output, s the sigmoid of its gate, one number for a token     (3)

The neurons h of a shared expert are a site of their own, its linear map W behind them: s f = W (s h). While somebody
looks at that map the gate comes before it and not behind, so that it receives s h, and makes what is added.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunekit.layer.candidates import Candidate
from prunekit.models.adapters.transformer import Transformer
from prunekit.models.classes import Experts
from prunekit.plugins.adapter import Cut, Heads, Inside, UnsupportedModel, check_plain, linear_at
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


class OutputsOfExperts(nn.Linear):
    """[W_1 … W_E] of (2), a copy: (..., neurons, experts) -> (..., channels). What is all zeros is not multiplied."""

    def __init__(self, weight: Tensor, experts: int) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.experts, self._own = experts, (self.weight,)

    def forward(self, input: Tensor) -> Tensor:
        flat = input.flatten(0, -3)
        made = flat.new_zeros(len(flat), self.out_features)
        for expert, weight in enumerate(self.of_experts(self.weight)):
            own = flat[..., expert]
            tokens = (own != 0).any(-1).nonzero().flatten()
            if len(tokens):
                made = made.index_add(0, tokens, nn.functional.linear(own[tokens], weight))
        return made.unflatten(0, input.shape[:-2])

    def of_experts(self, weight: Tensor) -> Sequence[Tensor]:
        """W_e of every expert, (channels, neurons)."""
        return weight.unflatten(1, (self.experts, -1)).unbind(1)

    @property
    def looked_at(self) -> bool:
        """As of `SumOfExperts`."""
        return bool(self._forward_hooks or self._forward_pre_hooks) or self.weight is not self._own[0]


_sums: WeakKeyDictionary[nn.Module, SumOfExperts] = WeakKeyDictionary()  # by the module with the experts
_outputs: WeakKeyDictionary[nn.Module, ref[OutputsOfExperts]] = WeakKeyDictionary()  # copies: only while they are used
_lock = Lock()


@dataclass(frozen=True)
class MixtureOfExperts(Transformer):
    """A family of experts; it sets `family`. Attention and plain MLPs are cut as ever; of a shared expert one neuron
    stays at least, and its gate.

    Removal changes the routing: the next experts come in, and weights are normalised over those that stay. A cut layer
    equals the dense one whose router gives removed experts a score of -∞. The statistics, the errors and the
    activations that calibration carries on are those of the routing as it was; searches run cut layers.
    """

    factors = False

    @property
    def experts(self) -> Experts:
        assert self.family.experts is not None
        return self.family.experts

    def prepare(self, model: PreTrainedModel) -> PreTrainedModel:
        """Expert after expert: in a fixed order on every device, and in any dtype."""
        model.config._experts_implementation = "eager"
        return model

    def sites(self, model: nn.Module, heads: Heads = "kv") -> tuple[Site, ...]:
        return self._sites(model, heads, "whole")

    def sites_of(
        self, model: nn.Module, form: Form, heads: Heads = "kv", experts: Inside = "whole"
    ) -> tuple[Site, ...]:
        return self._sites(model, heads, experts) if form.coupled else self.linear_sites(model, form)

    def _sites(self, model: nn.Module, heads: Heads, experts: Inside) -> tuple[Site, ...]:
        found = list[Site]()
        for index, block in enumerate(self.blocks(model)):
            found += [site for part in self.left(block) for site in self.sites_in(block, index, part, heads)]
            if self.experts.there(block):
                found += [] if self.experts.shared is None else [self._shared_site(block, index)]
                found.append((self._experts_site if experts == "whole" else self._neurons_site)(block, index))
        return tuple(found)

    def linear_sites(self, model: nn.Module, form: Form) -> tuple[Site, ...]:
        raise UnsupportedModel(
            "single weights of experts cannot be removed yet, and most of this model is experts; "
            "remove whole experts with structure groups"
        )

    def part(self, site: Site) -> str | None:  # type: ignore[override]
        if site.experts:  # what one expert makes is no sub-layer's output
            return None
        return "shared" if self._is_shared(site) else site.kind

    def holder(self, site: Site) -> str | None:
        if self._is_shared(site):
            return self.experts.shared
        return self.experts.path if site.kind == "experts" else super().holder(site)

    def stream_before(self, site: Site) -> str | None:
        if site.kind != "experts" or self.experts.shared is not None:  # whose output is a term as well
            return None
        (norm,) = self.family.norms["mlp"]  # of what attention was added to; it comes before the experts
        return norm

    def map_at(self, block: nn.Module, path: str) -> nn.Linear:
        if path == self._neurons:
            return self._outputs_of(block)
        if path != self.experts.path:
            return super().map_at(block, path)
        module: Any = block.get_submodule(path)
        like = module.get_parameter(self.experts.outputs[0])
        with _lock:
            found = _sums.get(module)
            if found is None or (found.weight.dtype, found.weight.device) != (like.dtype, like.device):
                found = _sums[module] = SumOfExperts(module.num_experts, like)
        return found

    def maps(self, block: nn.Module, site: Site) -> list[nn.Linear]:
        if self._is_shared(site):
            return [linear_at(block, path) for path in (*self.experts.shared_rows, self.experts.shared_columns)]
        return [self.linear(block, site)] if self._is_routed(site) else super().maps(block, site)

    def multiplied(self, block: nn.Module) -> int:
        if not self.experts.there(block):
            return super().multiplied(block)
        module, router = (block.get_submodule(path) for path in (self.experts.path, self.experts.router))
        each = sum(p[0].numel() for p in module.parameters())
        return super().multiplied(block) + _top_k(router) * each + sum(p.numel() for p in router.parameters())

    def cuts(self, block: nn.Module, site: Site) -> Sequence[Cut]:
        if self._is_shared(site):
            rows = torch.arange(site.n_groups)[:, None]
            return *(Cut(path, 0, rows) for path in self.experts.shared_rows), Cut(self.experts.shared_columns, 1, rows)
        if not self._is_routed(site):
            return super().cuts(block, site)
        if site.experts:
            columns = torch.tensor(site.columns(range(site.n_groups))).reshape(site.n_groups, -1)
            return (Cut(self._neurons, 1, columns),)
        every = torch.arange(site.n_groups)[:, None]
        front = (
            Cut(path, 0, every, name)
            for path in (self.experts.router, self.experts.path)
            for name, _ in block.get_submodule(path).named_parameters()
        )
        return *front, Cut(self.experts.path, 1, every)

    def pruned(self, block: nn.Module, site: Site, candidate: Candidate) -> dict[str, nn.Module]:
        if self._is_shared(site) and not candidate.kept:
            raise ValueError(
                f"{site.name}: a shared expert has one neuron or more, and the candidate keeps {candidate.kept}"
            )
        if not self._is_routed(site):
            return super().pruned(block, site, candidate)
        if site.experts:
            return {self.experts.path: self._of_neurons(block, site, candidate)}
        if not candidate.kept or len(candidate.kept) < site.minimum:
            raise ValueError(
                f"{site.name}: a token selects {site.minimum} experts, and the candidate keeps {candidate.kept}"
            )
        kept, experts = torch.tensor(candidate.kept), self.experts
        router, module = (_of_experts(block.get_submodule(path), kept) for path in (experts.router, experts.path))
        scales = candidate.weight[0, kept.to(candidate.weight.device)]
        for place, scale in enumerate([] if scales.is_meta else scales.tolist()):  # of shapes alone there are none
            for name in experts.outputs if scale != 1 else ():
                own = module.get_parameter(name).data[place]  # which is of this module alone
                own.copy_(own.double() * scale)
        return {experts.router: router, experts.path: module}

    @contextmanager
    def exposed(self, block: nn.Module) -> Iterator[None]:
        """As promised; nothing is computed in another way while nobody looks at the sum, or at the shared expert."""
        with ExitStack() as stack:
            if self.experts.there(block):
                stack.enter_context(self._exposed_shared(block))
                stack.enter_context(self._exposed_experts(block))
            yield

    @contextmanager
    def _exposed_experts(self, block: nn.Module) -> Iterator[None]:
        module: Any = block.get_submodule(self.experts.path)
        total, inside = self.map_at(block, self.experts.path), self._outputs_there(module)
        assert isinstance(total, SumOfExperts)
        of_neurons = inside is not None and inside.looked_at
        if "forward" in vars(module) or not (total.looked_at or of_neurons):  # or others say what it answers
            yield
            return

        def forward(hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            if not of_neurons or inside is None:
                return total(contributions(module, hidden, ids, weights))
            made = inside(activations(module, hidden, ids, weights))
            if module.has_bias:  # which stays
                made = made + (module.down_proj_bias[ids] * weights[..., None]).sum(1).to(made.dtype)
            return made

        module.forward = forward
        try:
            yield
        finally:
            del module.forward

    @contextmanager
    def _exposed_shared(self, block: nn.Module) -> Iterator[None]:
        """Within: the gate of the shared expert is in front of its last map, as in (3), if somebody looks at that."""
        if self.experts.shared is None:
            yield
            return
        shared, last = block.get_submodule(self.experts.shared), linear_at(block, self.experts.shared_columns)
        answered = "forward" in vars(shared)  # others say what it answers, and that is s f
        if not (answered or last._forward_hooks or last._forward_pre_hooks):
            yield
            return
        gate, seen = linear_at(block, self.experts.shared_gate), list[Tensor]()
        scores = gate.forward  # s = sigmoid(scores)

        def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.append(args[0])

        def weigh(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
            return (args[0] * torch.sigmoid(scores(seen.pop())),)  # s h

        def opened(input: Tensor) -> Tensor:
            return input.new_full((*input.shape[:-1], 1), torch.inf)  # whose sigmoid is one

        with ExitStack() as stack:
            if not answered:
                stack.enter_context(shared.register_forward_pre_hook(note))
                stack.enter_context(last.register_forward_pre_hook(weigh, prepend=True))
            gate.forward = opened
            try:
                yield
            finally:
                del gate.forward

    def ranks(self, block: nn.Module) -> dict[str, int]:
        return {}

    def layer_config(self, block: nn.Module) -> dict[str, Any]:
        dropped = self.dropped(block)
        entry: dict[str, Any] = {"skip": list(dropped)} if dropped else {}
        entry |= self._mixing(block)
        if self.experts.there(block):
            entry[self.experts.count] = block.get_submodule(self.experts.path).num_experts
            entry[self.experts.width] = self.experts.neurons(block)
            if self.experts.shared is not None:
                entry[self.experts.shared_width] = linear_at(block, self.experts.shared_columns).in_features
        elif "mlp" in self.left(block):
            entry[self.family.width] = linear_at(block, self.family.columns["mlp"]).in_features
        return entry

    def _is_shared(self, site: Site) -> bool:
        """Whether the groups of a site are neurons of a shared expert."""
        return self.experts.shared is not None and self.path(site) == self.experts.shared_columns

    def _is_routed(self, site: Site) -> bool:
        """Whether the groups of a site are experts, or neurons inside of them."""
        return site.kind == "experts" or bool(site.experts)

    def _shared_site(self, block: nn.Module, index: int) -> Site:
        name = f"{self.layers}.{index}.{self.experts.shared_columns}"
        for path in (*self.experts.shared_rows, self.experts.shared_columns):
            check_plain(block, path, name)
        last = linear_at(block, self.experts.shared_columns)
        front = [linear_at(block, path) for path in self.experts.shared_rows]
        price = last.out_features + sum(each.in_features + (each.bias is not None) for each in front)
        return Site(name, index, "mlp", last.in_features, 1, price, d_out=last.out_features, minimum=1)

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

    # -- neurons -------------------------------------------------------------------------------------------

    @property
    def _neurons(self) -> str:
        """Path of the map of all output matrices side by side."""
        return f"{self.experts.path}.{self.experts.outputs[0]}"

    def _outputs_there(self, module: nn.Module) -> OutputsOfExperts | None:
        """The map that somebody uses."""
        found = _outputs.get(module)
        return None if found is None else found()

    def _outputs_of(self, block: nn.Module) -> OutputsOfExperts:
        module = block.get_submodule(self.experts.path)
        value = module.get_parameter(self.experts.outputs[0]).detach()
        with _lock:
            found = self._outputs_there(module)
            if found is None or (found.weight.dtype, found.weight.device) != (value.dtype, value.device):
                each = value.transpose(1, 2) if self.experts.transposed else value  # (experts, channels, neurons)
                found = OutputsOfExperts(each.transpose(0, 1).flatten(1), len(value))
                _outputs[module] = ref(found)
        return found

    def _neurons_site(self, block: nn.Module, index: int) -> Site:
        whole, name = self._experts_site(block, index), f"{self.layers}.{index}.{self._neurons}"
        module, neurons = block.get_submodule(self.experts.path), self.experts.neurons(block)
        tile, count = math.gcd(neurons, TILE), whole.n_groups
        price = sum(
            p.numel() // neurons for part, p in module.named_parameters() if self.experts.slices(part) is not None
        )
        return Site(
            name, index, "mlp", neurons // tile, tile * count, tile * price, spread=count, d_out=whole.channels,
            minimum=1, experts=count, selected=whole.minimum,
        )  # fmt: skip

    def _of_neurons(self, block: nn.Module, site: Site, candidate: Candidate) -> nn.Module:
        """The module with some neurons of each expert, those that the candidate keeps."""
        if not candidate.kept:
            raise ValueError(f"{site.name}: an expert has one neuron or more, and the candidate keeps {candidate.kept}")
        experts, width = self.experts, site.d_in // site.experts
        ids = torch.tensor(candidate.kept).reshape(site.experts, -1) % width  # (experts, kept)
        twin: Any = copy.copy(block.get_submodule(experts.path))
        twin._parameters = dict(twin._parameters)
        for name in experts.inputs:
            value, dim = twin.get_parameter(name), experts.slices(name) or 0
            pairs = (
                torch.stack([2 * ids, 2 * ids + 1], 2).flatten(1)
                if experts.transposed
                else torch.cat([ids, ids + width], 1)
            )
            twin._parameters[name] = _picked(value.detach(), pairs, dim, value.requires_grad)
        own = twin.get_parameter(experts.outputs[0])
        weight = candidate.weight.detach().to(own).unflatten(1, (site.experts, width)).transpose(0, 1)
        weight = weight.transpose(1, 2) if experts.transposed else weight
        twin._parameters[experts.outputs[0]] = _picked(
            weight, ids, experts.slices(experts.outputs[0]) or 0, own.requires_grad
        )
        experts.resize(twin, ids.shape[1])
        return twin


TILE = 8  # neurons of an expert that go together in number: kernels ask for rows of whole 16 bytes


def _picked(value: Tensor, ids: Tensor, dim: int, requires_grad: bool) -> nn.Parameter:
    """Slices of every expert along a dimension, (experts, kept) of them."""
    index = ids.to(value.device).reshape(*ids.shape[:1], *([1] * (dim - 1)), -1, *([1] * (value.ndim - dim - 1)))
    shape = [*value.shape]
    shape[dim] = ids.shape[1]
    return nn.Parameter(value.gather(dim, index.expand(shape)), requires_grad)


def activations(module: nn.Module, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """x_e = g_e h_e of every expert at every token, (tokens, neurons, experts); zeros where a token selects others.

    Args:
        module, hidden, ids, weights: as of `contributions`.
    """
    experts: Any = module
    found = []
    for expert in range(experts.num_experts):
        tokens, place = (ids == expert).nonzero(as_tuple=True)
        matrix = experts.gate_up_proj[expert]
        made = hidden[tokens] @ (matrix if experts.is_transposed else matrix.T)
        if experts.has_bias:
            made = made + experts.gate_up_proj_bias[expert]
        one = (experts._apply_gate(made) * weights[tokens, place, None]).to(hidden.dtype)
        found.append(hidden.new_zeros(len(hidden), one.shape[1]).index_copy(0, tokens, one))
    return torch.stack(found, dim=-1)


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
    own = [name for name, _ in module.named_parameters(recurse=False)]
    values = {name: module.get_parameter(name) for name in own}  # read, where the model is read block by block
    twin._parameters = {
        name: nn.Parameter(value.detach().index_select(0, kept.to(value.device)), value.requires_grad)
        for name, value in values.items()
    }
    twin.num_experts = len(kept)
    return twin
