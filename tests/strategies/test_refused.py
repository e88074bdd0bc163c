"""Options that make no sense are refused when a plug-in is made, in a sentence that says which."""

import math
from typing import Any

import pytest

from prunekit.plugins.registry import KINDS
from prunekit_strategies.metrics.formulas import Flops
from prunekit_strategies.metrics.latency import Latency
from prunekit_strategies.pruners.admm import ADMM
from prunekit_strategies.pruners.apt import APT
from prunekit_strategies.pruners.obs import OBS

REFUSED: dict[str, dict[str, list[dict[str, Any]]]] = {  # options by what the sentence says
    "pruner admm": {
        "iterations": [{"iterations": -1}, {"rho": 0.0}, {"first_rho": 2.0}],
        "start": [{"start": "random"}],
    },
    "pruner alps": {"rho > 0": [{"rho": 0.0}], "rounds ≥ 0": [{"rounds": -1}], "no per 'all'": [{"per": "all"}]},
    "pruner apt": {
        "no variant 'MX'; there are SS, SM, MS, MM": [{"variant": "MX"}],
        "width ≥ 1|steps ≥ 1|exact ≥ 0": [{"width": 0}, {"steps": 0}, {"exact": -1}],
    },
    "pruner asvd": {"alpha is between 0, the weight itself, and 4, not": [{"alpha": -1}, {"alpha": 5}]},
    "pruner fista": {
        "rounds, steps ≥ 1": [{"rounds": 0}],
        "share lies between": [{"share": 1.0}],
        "no aim 'x'": [{"aim": "x"}],
    },
    "pruner gradient": {
        "no order 'x'; there are |no grain 'x'; there are ": [{"order": "x"}, {"grain": "x"}],
        "no reduce 'x'; there are |no per 'x'; there are ": [{"reduce": "x"}, {"per": "x"}],
    },
    "pruner obs": {
        "no search 'random'; there are greedy, score, swap, penalty": [{"search": "random"}],
        "no score 'best'; there are exact": [{"score": "best"}],
        "step": [{"step": (8, 4)}, {"step": (0, 4)}, {"head_step": 0}],
        "exchange|tries|above 1": [{"exchange": 0}, {"tries": -1}, {"growth": 1.0}],
        "first-order": [{"first_order": "signed", "score": "wanda"}],
    },
    "pruner optishear": {
        "no weights 'cube'|no input_share 'max'": [{"weights": "cube"}, {"input_share": "max"}],
        "all weights score alike": [{"weights": "one", "inputs": "one"}],
    },
    "pruner ria": {"activation_power ≥ 0": [{"activation_power": -1}], "no per 'all'": [{"per": "all"}]},
    "pruner score": {
        "weight_norm > 0|activation_power ≥ 0": [{"weight_norm": 0}, {"activation_power": -1}],
        "all groups score alike": [{"weight_power": 0, "activation_power": 0}],
        "no activation 'l2'; there are rms, std, absolute, relative, contrast": [{"activation": "l2"}],
        "no reduce 'median'|no scope 'all'": [{"reduce": "median"}, {"scope": "all"}],
        "no per 'column'; there are row, layer": [{"per": "column"}],
        "scope coupled": [{"scope": "coupled", "activation": "std"}, {"scope": "coupled", "weight_power": 0}],
    },
    "pruner second-moment": {"no heads 'loud'; there are energy, likeness": [{"heads": "loud"}]},
    "pruner sparsegpt": {
        "width is at least one column, not 0|no per 'column'": [{"width": 0}, {"per": "column"}],
        "no aim 'all'; there are own, dense, stream": [{"aim": "all"}],
        "ADMM chooses no single weights; it knows groups": [{"mask": ADMM()}],
    },
    "pruner z-pruner": {"no per 'all'; there are row, layer": [{"per": "all"}]},
    "signal outliers": {"above 0, not 0": [{"multiple": 0}]},
    "signal tail-exponent": {"at least one bin, not 0": [{"bins": 0}]},
    "allocator evolution": {
        "survivors|tokens": [{"selections": s} for s in ((), ((4, 8), (2, 16)), ((2, 16), (1, 8)))],
        "offspring|no warm_start": [{"offspring": 0}, {"filter": 0}, {"warm_start": "yes"}],
    },
    "allocator global-rank": {
        "no normalise 'l1'|0 < most ≤ 1": [{"normalise": "l1"}, {"most": 0}],
        "it has no price; normalise by l2 or none": [{"per_price": True}],
    },
    "allocator greedy": {"no by|no table|width": [{"by": "luck"}, {"table": "x"}, {"width": 0}, {"steps": 0}]},
    "allocator metric-map": {
        "no per 'layer'; there are block, kind, site|no scale 'log'": [{"per": "layer"}, {"scale": "log"}],
        "0 < spread < 2, not 0": [{"spread": 0.0}],
    },
    "allocator milp": {
        "shares|measured for the budget": [{"limits": ((Flops(), 0.0),)}, {"limits": ((Latency(), 0.5),)}],
        "differ|no table": [{"differ": 0}, {"table": "x"}],
    },
    "allocator nevergrad": {
        "no optimizer 'TwoPointDE'.*TwoPointsDE": [{"optimizer": "TwoPointDE"}],
        "reach|waves": [{"trials": 0}, {"reach": 0.0}, {"waves": -1}],
    },
    "allocator nsga": {
        "no against|population|window": [{"against": "luck"}, {"population": 3}, {"window": 0.0}, {"mutation": 2.0}],
    },
    "allocator optuna-tpe": {"reach|waves": [{"trials": 0}, {"reach": 0.0}, {"waves": -1}]},
    "allocator policy-gradient": {"draws|rate": [{"draws": 1}, {"rate": 0.0}, {"steps": 0}]},
    "allocator random": {"reach": [{"draws": 0}, {"reach": 0.0}]},
    "allocator schedule": {
        "no shape|no bends|lowest|grid": [{"shape": "zigzag"}, {"bends": "none"}, {"lowest": 0.9}, {"grid": 0}],
    },
    "allocator self-pruner": {
        "at least": [{"population": 0}, {"iterations": -1}, {"retries": -1}, {"tokens": 0}, {"temperature": -0.1}],
        "at least|above|base_url": [{"temperature": math.nan}, {"timeout": 0.0}, {"reach": 0.0}, {"base_url": "x"}],
    },
    "allocator softmax": {
        "no rule 'bose'|no energy 'heat'": [{"rule": "bose"}, {"energy": "heat"}],
        "0 < most ≤ 1|above 0": [{"most": 0.0}, {"temperature": 0.0}],
    },
    "allocator table": {
        "no table|no around|stride": [{"table": "x"}, {"around": "x"}, {"stride": 0.0}],
        "reach|candidates": [{"reach": 2.0}, {"candidates": 0}],
    },
    "allocator tyr": {"stride|reach": [{"stride": 0.1, "last_stride": 0.2}, {"last_stride": 0.0}, {"reach": 0}]},
    "finisher bias": {"inputs": [{"inputs": "wet"}]},
    "finisher distillation": {
        "scope|temperature|truth|epochs": [{"scope": "head"}, {"temperature": 0.0}, {"truth": -1.0}, {"epochs": 0}],
    },
    "finisher dsnot": {"swaps|threshold": [{"swaps": 0}, {"threshold": -1.0}, {"threshold": math.nan}]},
    "finisher elsa": {
        "schedule|start|per": [{"schedule": "step"}, {"start": "zero"}, {"per": "block"}],
        "steps|rate|penalty": [{"steps": 0}, {"rate": 0.0}, {"penalty": -1.0}],
        "settle|held_out": [{"settle": 1.0}, {"held_out": 0.0}],
    },
    "finisher least-squares": {"aim|damping": [{"aim": "west"}, {"damping": -1.0}, {"damping": math.nan}]},
    "finisher lora": {
        "rank|alpha|teacher|patience": [{"rank": 0}, {"alpha": 0.0}, {"teacher": -1.0}, {"patience": 0}],
    },
    "finisher reconstruction": {
        "aim|batch_tokens|held_out|rate": [{"aim": "x"}, {"batch_tokens": 0}, {"held_out": 1.0}, {"rate": 0.0}],
    },
    "finisher sparsellm": {
        "aim|rounds|alpha|damping": [{"aim": "west"}, {"rounds": 0}, {"alpha": 0.0}, {"damping": -1.0}],
        "pruner": [{"pruner": OBS()}, {"pruner": APT(aim="dense")}],
    },
    "objective hidden-state": {"at is|weight is": [{"at": ()}, {"at": (1.5,)}, {"weight": 0.0}]},
    "objective robust": {"temperature is more than 0": [{"temperature": 0.0}, {"radius": -1.0}]},
}


ROWS = [(plugin, *row) for plugin, refused in REFUSED.items() for row in refused.items()]


@pytest.mark.parametrize(
    ("plugin", "sentence", "options"), [(plugin, sentence, each) for plugin, sentence, some in ROWS for each in some]
)
def test_what_makes_no_sense_is_refused(plugin: str, sentence: str, options: dict[str, Any]) -> None:
    kind, name = plugin.split()
    (entry,) = (registry[name] for registry in KINDS if registry.kind == kind)
    try:
        made = entry.load()
    except ImportError as missing:
        pytest.skip(str(missing))
    with pytest.raises(ValueError, match=sentence):
        made(**options)
