"""Which architecture of llama.cpp computes what a model computes, and why there is none where there is none.

In GGUF the counts of heads and neurons may be arrays with one entry per layer, but most graphs of llama.cpp read the
first entry only. Two read all of them. `deci` is Llama's graph: biases, tied or untied output, factors on rotary
frequencies; its heads rotate neighbouring rows. `openelm` has norms on every head and rotates halves, and its output
is always tied. A model whose layers agree in size has the graph that llama.cpp made for it. Graphs with experts take
one number of heads, of experts and of their neurons for all layers.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from prunekit.errors import WrongInput
from prunekit.models.classes import FAMILIES

ELSEWHERE = "exporter hf writes it"
CONVERTER = "where all layers agree in size, llama.cpp's own converter may take what hf has written"


@dataclass(frozen=True)
class Route:
    """The architectures that carry a family."""

    equal: str  # of layers that agree in size
    unequal: str | None  # of others; None: there is none
    why: str = ""  # there is none


@dataclass(frozen=True)
class Mixture:
    """What a graph with experts does with them."""

    normed: bool  # the weights of those that a token selects add up to one
    width: str = "expert_feed_forward_length"  # the key of their neurons
    shared: bool = False  # one more expert reads every token, behind a gate
    bounded: bool = False  # as in gpt-oss: biases, bounds on what gates and on what is gated, scores selected first


@dataclass(frozen=True)
class Graph:
    """What an architecture of llama.cpp has."""

    neighbours: bool  # heads rotate rows 2j and 2j+1, not j and j+d/2
    unequal: bool = False  # sizes are read layer by layer
    fused: bool = False  # queries, keys and values are one matrix
    head_norms: bool = False
    biases: frozenset[str] = frozenset()  # of which linear maps
    untied: bool = True
    tieable: bool = True  # the output may be left out where it is the embeddings
    frequencies: bool = False  # factors on rotary frequencies
    scales: bool = False  # factors on embeddings, scores, sub-layers and logits
    square: bool = False  # query heads are together as wide as the residual stream
    still: int = 0  # every so manieth layer does not rotate; 0: all do
    whole_norms: bool = False  # of queries and of keys, over all heads at once
    sinks: bool = False  # a score of nothing for every query head
    yarn: bool = False  # positions of that type
    windows: int = 0  # every so manieth layer sees all that came before, the others a window; 0: all do
    ffn_norm: str = "ffn_norm"  # the norm before the MLP or the experts
    mixture: Mixture | None = None  # None: it has no experts


QKV = frozenset({"attn_q", "attn_k", "attn_v"})
ALL = QKV | {"attn_output", "ffn_gate", "ffn_up", "ffn_down"}

GRAPHS = {
    "llama": Graph(
        neighbours=True, biases=ALL, frequencies=True, mixture=Mixture(normed=True, width="feed_forward_length")
    ),
    "deci": Graph(neighbours=True, unequal=True, biases=ALL, frequencies=True),
    "openelm": Graph(neighbours=False, unequal=True, fused=True, head_norms=True, untied=False),
    "qwen2": Graph(neighbours=False, biases=QKV, square=True),
    "qwen3": Graph(neighbours=False, head_norms=True),
    "granite": Graph(neighbours=True, biases=QKV, scales=True),
    "smollm3": Graph(neighbours=True, biases=QKV, still=4),
    "qwen2moe": Graph(
        neighbours=False, biases=QKV, square=True, tieable=False, mixture=Mixture(normed=False, shared=True)
    ),
    "qwen3moe": Graph(neighbours=False, head_norms=True, mixture=Mixture(normed=True)),
    "olmoe": Graph(
        neighbours=False,
        whole_norms=True,
        square=True,
        tieable=False,
        mixture=Mixture(normed=False, width="feed_forward_length"),
    ),
    "gpt-oss": Graph(
        neighbours=False,
        biases=QKV | {"attn_output"},
        sinks=True,
        yarn=True,
        windows=2,
        ffn_norm="post_attention_norm",
        tieable=False,
        mixture=Mixture(normed=True, bounded=True),
    ),
}

OPENAI = (1.702, 7.0)  # what gates are multiplied by in the sigmoid, and the bound
EXPERTS = (
    "the graphs of llama.cpp with experts take one number of heads, of experts and of their neurons for all layers"
)

ROUTES = {
    "llama": Route("llama", "deci"),
    "mistral": Route("llama", "deci"),
    "phi3": Route("llama", "deci"),  # its fused maps are written apart
    "qwen2": Route("qwen2", "deci"),
    "qwen3": Route("qwen3", "openelm"),
    "granite": Route("granite", "deci"),  # its factors are multiplied into weights
    "smollm3": Route("smollm3", None, "no graph of llama.cpp has them and layers without rotation"),
    "mixtral": Route("llama", None, EXPERTS),
    "qwen2_moe": Route("qwen2moe", None, EXPERTS),
    "qwen3_moe": Route("qwen3moe", None, EXPERTS),
    "olmoe": Route("olmoe", None, EXPERTS),
    "gpt_oss": Route("gpt-oss", None, EXPERTS),
}

REASONS = {
    "cohere": "attention and MLP stand in parallel behind one LayerNorm",
    "falcon": "its norms have biases and its MLP has no gate",
    "gemma2": "norms stand behind its sub-layers, and tanh bounds scores and logits",
    "gemma3_text": "norms stand behind its sub-layers, and layers rotate by two bases",
    "gpt2": "it is pruned as an OPT model, with learned positions and an MLP without gate",
    "gpt_neox": "its norms have biases, heads rotate in part, and its MLP has no gate",
    "lfm2": "most of its blocks have a short convolution in the place of attention",
    "llava": "it takes images, and what sees them is not written",
    "mamba": "its blocks are no attention and MLP",
    "mamba2": "its blocks are no attention and MLP",
    "olmo2": "its norms stand behind the sub-layers, and those of queries and keys are over all heads",
    "opt": "it has learned positions and an MLP without gate",
    "qwen2_5_vl": "it takes images, and what sees them is not written",
    "qwen3_next": "most of its blocks have a gated delta net in the place of attention",
    "stablelm": "its norms have biases, and heads rotate in part",
    "starcoder2": "its norms have biases, and its MLP has no gate",
}


@dataclass(frozen=True)
class Layer:
    """Sizes of one layer."""

    query: int  # heads; 0: there is no attention
    kv: int
    width: int  # neurons, of each expert where there are some; 0: there is no MLP
    experts: int = 0  # 0: there are none
    shared: int = 0  # neurons of the expert that reads every token; 0: there is none


@dataclass(frozen=True)
class Layout:
    """Sizes of a model, as its config tells them."""

    family: str
    layers: tuple[Layer, ...]
    hidden: int
    head_dim: int
    vocabulary: int
    tied: bool
    config: Any

    @classmethod
    def of(cls, config: Any) -> Layout:
        """That of a config of a stock class, or of one of ours with unequal layers."""
        name = family_of(config)
        family, layers = FAMILIES[name], list[Layer]()
        for own in (config.per_layer_config[index] for index in range(config.num_hidden_layers)):
            skip = getattr(own, "skip", None) or ()
            query, kv = (0, 0) if "attention" in skip else family.heads(own)
            if (experts := family.experts) is None:
                layers.append(Layer(query, kv, 0 if "mlp" in skip else getattr(own, family.width)))
            else:
                shared = getattr(own, experts.shared_width) if experts.shared else 0
                layers.append(Layer(query, kv, getattr(own, experts.width), getattr(own, experts.count), shared))
        width = getattr(config, "head_dim", None) or config.hidden_size // layers[0].query
        tied = bool(config.tie_word_embeddings)
        return cls(name, tuple(layers), config.hidden_size, width, config.vocab_size, tied, config)

    @property
    def equal(self) -> bool:
        """Whether all layers have both parts, of the same sizes."""
        return len({*self.layers}) == 1 and min(self.layers[0].query, self.layers[0].width) > 0


def family_of(config: Any) -> str:
    """The model type of the stock classes."""
    return str(config.model_type).removeprefix("prunekit_")


def carrier(layout: Layout, biases: Collection[str]) -> str:
    """The architecture that carries a model.

    Args:
        layout: its sizes.
        biases: the linear maps with a bias, as GGUF names them.

    Raises:
        WrongInput: there is none; says why, and what there is.
    """
    family, route, others = layout.family, _route(layout.family), {*biases}
    check_config(layout.config, unequal=not layout.equal)
    if layout.equal:
        wide = layout.layers[0].query * layout.head_dim
        fits = others <= GRAPHS[route.equal].biases and not (GRAPHS[route.equal].square and wide != layout.hidden)
        found = route.equal if fits else {"qwen2": "llama", "granite": "llama"}.get(family, route.equal)
    else:
        assert route.unequal is not None  # or it was refused above
        found = route.unequal
    if more := sorted(others - GRAPHS[found].biases):
        raise WrongInput(
            f"gguf cannot carry {family} with a bias of {more[0]}: llama.cpp's graph {found} has none; "
            f"leave recovery steps that add biases away, or {ELSEWHERE}"
        )
    if GRAPHS[found].mixture is not None:
        check_heads(layout.config)
    if (still := GRAPHS[found].still) and [*_rotating(layout.config)] != [
        int((index + 1) % still != 0) for index in range(len(layout.layers))
    ]:
        raise WrongInput(
            f"gguf cannot carry this {family}: llama.cpp takes it that every layer but each {still}th rotates, "
            f"which is not so where layers were dropped; {ELSEWHERE}"
        )
    return found


def check_heads(config: Any, *, fewer: bool = False) -> None:
    """Refuse heads that are not as wide as the residual stream, where a graph with experts takes it that they are.

    Args:
        config: of the model.
        fewer: whether there will be fewer heads than now.

    Raises:
        WrongInput: says why, and what there is.
    """
    family, graph = family_of(config), GRAPHS[_route(family_of(config)).equal]
    if graph.mixture is None or not graph.square:
        return
    query, kv = FAMILIES[family].heads(config.per_layer_config[0])
    width = getattr(config, "head_dim", None) or config.hidden_size // query
    if graph.whole_norms and kv != query:
        raise WrongInput(
            f"gguf cannot carry {family} with {query} query heads that share {kv} KV heads: llama.cpp's graph has a "
            f"norm over as many key heads as query heads; {ELSEWHERE}"
        )
    if fewer or query * width != config.hidden_size:
        raise WrongInput(
            f"gguf cannot carry {family} with fewer heads: llama.cpp's graph takes it that all heads are together as "
            f"wide as the residual stream; keep attention whole with spare.kinds=[attention], or {ELSEWHERE}"
        )


def check_config(config: Any, *, unequal: bool) -> None:
    """Refuse what no architecture carries.

    Args:
        config: of the model.
        unequal: whether layers may differ in size.

    Raises:
        WrongInput: says why, and what there is.
    """
    family = family_of(config)
    route = _route(family)
    if (act := getattr(config, "hidden_act", "silu")) not in ("silu", "swish"):
        raise WrongInput(f"gguf cannot carry {family} with hidden_act {act}: the graphs have silu; {ELSEWHERE}")
    kind, partial = rope(config).get("rope_type", "default"), rope(config).get("partial_rotary_factor") or 1
    if kind not in ("default", "linear", "llama3") and not (kind == "yarn" and GRAPHS[route.equal].yarn):
        raise WrongInput(
            f"gguf cannot carry {family} with rotary positions of type {kind}; default, linear and llama3 can be; "
            f"{ELSEWHERE}"
        )
    if partial != 1:
        raise WrongInput(
            f"gguf cannot carry {family} whose heads rotate only {partial:g} of their width: the graphs that carry it "
            f"rotate all; {ELSEWHERE}"
        )
    if kind == "llama3" and not all(GRAPHS[name].frequencies for name in _names(route, unequal=unequal)):
        raise WrongInput(f"gguf cannot carry {family} with rotary positions of type llama3; {ELSEWHERE}")
    if GRAPHS[route.equal].mixture is not None and FAMILIES[family].experts is not None:
        _check_experts(config, family, GRAPHS[route.equal])
    if unequal:
        _check_unequal(config, family, route)


def has_rounded_ramp(config: Any) -> bool:
    """Whether llama.cpp rotates a little otherwise than the model: of YaRN it rounds where the ramp begins and ends."""
    return rope(config).get("rope_type") == "yarn" and not rope(config).get("truncate", True)


def rope(config: Any) -> dict[str, Any]:
    """The settings of rotary positions."""
    return dict(getattr(config, "rope_parameters", None) or {})


def _check_experts(config: Any, family: str, graph: Graph) -> None:
    """Refuse what the graph of a family of experts does otherwise."""
    mixture, count = graph.mixture, config.num_hidden_layers
    assert mixture is not None
    plain, step = getattr(config, "mlp_only_layers", None) or (), getattr(config, "decoder_sparse_step", 1)
    if any(index in plain or (index + 1) % step for index in range(count)):
        raise WrongInput(
            f"gguf cannot carry {family} in which some layers have an MLP and no experts: llama.cpp's graph has "
            f"experts in all; {ELSEWHERE}"
        )
    if (normed := getattr(config, "norm_topk_prob", mixture.normed)) != mixture.normed:
        raise WrongInput(
            f"gguf cannot carry {family} with norm_topk_prob {normed}: llama.cpp's graph has {mixture.normed}; "
            f"{ELSEWHERE}"
        )
    if getattr(config, "clip_qkv", None) is not None:
        raise WrongInput(f"gguf cannot carry {family} with clip_qkv: llama.cpp's graph has none; {ELSEWHERE}")
    if mixture.bounded:
        _check_gpt_oss(config, family, graph)
    elif getattr(config, "attention_bias", False):
        raise WrongInput(f"gguf cannot carry {family} with attention_bias: llama.cpp's graph has none; {ELSEWHERE}")


def _check_gpt_oss(config: Any, family: str, graph: Graph) -> None:
    wanted = [
        "full_attention" if (index + 1) % graph.windows == 0 else "sliding_attention"
        for index in range(config.num_hidden_layers)
    ]
    settings, others = rope(config), ("attention_factor", "mscale", "mscale_all_dim")
    for wrong, what in (
        (list(config.layer_types) != wanted or not config.sliding_window, "windows in other than every second layer"),
        ((config.swiglu_alpha, config.swiglu_limit) != OPENAI, f"swiglu_alpha and swiglu_limit other than {OPENAI}"),
        (not config.attention_bias, "no attention_bias"),
        (any(settings.get(name) is not None for name in others), "an attention factor of its own in its positions"),
    ):
        if wrong:
            raise WrongInput(f"gguf cannot carry {family} with {what}: llama.cpp's graph is fixed; {ELSEWHERE}")


def _check_unequal(config: Any, family: str, route: Route) -> None:
    equal = "with equal layers it can: prune with allocator uniform and give exporters.gguf.equal=true"
    if route.unequal is None:
        raise WrongInput(
            f"gguf cannot carry {family} whose layers differ in size: {route.why}; {equal}; or {ELSEWHERE}"
        )
    graph = GRAPHS[route.unequal]
    if not graph.untied and not config.tie_word_embeddings:
        raise WrongInput(
            f"gguf cannot carry {family} whose layers differ in size and whose output is not tied to its embeddings: "
            f"the one graph of llama.cpp with norms on heads and unequal layers, {route.unequal}, ties them; {equal}; "
            f"or {ELSEWHERE}"
        )
    if getattr(config, "attention_bias", False) and not graph.biases >= QKV:
        raise WrongInput(f"gguf cannot carry {family} with attention_bias: {route.unequal} has none; {ELSEWHERE}")


def _names(route: Route, *, unequal: bool) -> list[str]:
    return [name for name in (route.unequal if unequal else route.equal,) if name is not None]


def _route(family: str) -> Route:
    if family not in ROUTES:
        why = REASONS.get(family, "its graph is not among those that are known")
        raise WrongInput(f"gguf cannot carry {family}: {why}; {ELSEWHERE}, and {CONVERTER}")
    return ROUTES[family]


def _rotating(config: Any) -> list[int]:
    layers = getattr(config, "no_rope_layers", None)
    return [1] * config.num_hidden_layers if layers is None else [int(each) for each in layers]
