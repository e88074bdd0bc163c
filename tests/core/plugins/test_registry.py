"""Names become plug-ins, or one helpful sentence."""

import re
from contextlib import suppress

import pytest

from prunekit import LocalPruner, WrongInput
from prunekit.plugins.registry import (
    ADAPTERS,
    ALLOCATORS,
    EXPORTERS,
    KINDS,
    OBJECTIVES,
    PRUNERS,
    SIGNALS,
    UnknownName,
    _refusal,
)


@pytest.mark.parametrize("registry", KINDS, ids=lambda r: r.kind)
def test_every_entry_loads_and_says_what_it_is(registry):
    for name, entry in registry.items():
        assert entry.name == name
        assert entry.owner == "prunekit" or entry.owner
        assert entry.summary
        if registry.kind == "tracker" and entry.missing:  # no part of what tests need
            continue
        assert isinstance(entry.options, tuple)


def test_an_unknown_name_gets_the_nearest_and_the_list():
    with pytest.raises(UnknownName, match="no pruner 'obz'; did you mean 'obs'\\? there are ace, ace-cosp, ace-varp, "):
        PRUNERS["obz"]
    assert "obz" not in PRUNERS
    assert "obs" in PRUNERS


@pytest.mark.parametrize("registry", [PRUNERS, SIGNALS, ALLOCATORS, OBJECTIVES], ids=lambda r: r.kind)
def test_a_plug_in_and_its_spec_are_inverse(registry):
    for name in registry:
        plugin = registry.build(name)
        assert registry.build(registry.spec(plugin)) == plugin


def test_plug_ins_nest():
    tyr = ALLOCATORS.build({"name": "tyr", "inner": {"name": "evolution", "generations": 3}})
    assert ALLOCATORS.spec(tyr)["inner"]["generations"] == 3


@pytest.mark.parametrize(
    ("registry", "spec", "sentence"),
    [
        (PRUNERS, {"name": "wanda", "refit": "no thanks"}, "refit takes yes/no, not 'no thanks'"),
        (OBJECTIVES, {"name": "divergence", "top_k": 1.5}, "top_k takes a whole number, not 1.5"),
        (ALLOCATORS, {"name": "evolution", "generations": "abc"}, "generations takes a whole number, not 'abc'"),
        (
            ALLOCATORS,
            {"name": "evolution", "selections": [[4, "x"]]},
            "selections takes a list, each 2 values: a whole number, a whole number, not",
        ),
        (PRUNERS, {"name": "obs", "aim": "maybe"}, "no aim 'maybe'; there are own, dense, stream"),
        (
            EXPORTERS,
            {"name": "onnx", "dtype": "bfloat16"},
            "'onnx': no dtype 'bfloat16'; there are auto, float32, float16",
        ),
        (PRUNERS, {"name": "obs", "aime": "own"}, "did you mean 'aim'"),
        (ALLOCATORS, {"name": "metric-map", "signal": "outlier"}, "no signal 'outlier'; did you mean 'outliers'"),
        (PRUNERS, {"refit": True}, "given by its name"),
        (ALLOCATORS, {"name": "milp", "limits": [["flop", 0.5]]}, "no metric 'flop'; did you mean 'flops'"),
        (ALLOCATORS, {"name": "milp", "limits": [["flops"]]}, "limits takes 2 values: a metric, a number, not"),
        (ALLOCATORS, {"name": "milp", "limits": [["flops", "half"]]}, "limits takes a number, not 'half'"),
        (ALLOCATORS, {"name": "milp", "limits": [["latency", 0.5]]}, "latency is measured for the budget alone"),
    ],
    ids=lambda value: getattr(value, "kind", str(value)),
)
def test_a_value_that_cannot_be_is_refused_before_any_work(registry, spec, sentence):
    with pytest.raises(WrongInput, match=sentence):
        registry.build(spec)


def test_no_refusal_is_in_words_of_python():
    hints = set()
    for entry in (entry for registry in KINDS for entry in registry.values() if entry.owner == "prunekit"):
        with suppress(ImportError):  # of what it needs, which is not installed
            hints |= {option.hint for option in entry.options}
    assert len(hints) > 20
    sentences = [_refusal("option", hint, 3) for hint in hints]
    words = re.compile(r"typing|<class|\b(Literal|Union|NoneType|Sequence|Mapping|tuple|dict|bool|int|float|str)\b")
    assert [said for said in sentences if words.search(said)] == []


def test_plug_ins_nest_in_lists():
    milp = ALLOCATORS.build(
        {"name": "milp", "limits": [["kv-cache", 0.4], [{"name": "bytes", "per_parameter": 1}, 0.5]]}
    )
    assert [(metric.unit, share) for metric, share in vars(milp)["limits"]] == [("kv-cache", 0.4), ("bytes", 0.5)]
    assert ALLOCATORS.build(ALLOCATORS.spec(milp)) == milp


def test_lists_of_a_recipe_become_the_tuples_of_a_plug_in():
    built = ALLOCATORS.build({"name": "evolution", "selections": [[2, 64], [1, 128]]})
    assert ALLOCATORS.spec(built)["selections"] == [[2, 64], [1, 128]]


def test_what_is_not_registered_has_no_spec():
    class Mine(LocalPruner):
        def prune(self, layer, keeps):
            return [layer.masked(range(k)) for k in keeps]

    with pytest.raises(ValueError, match="not registered"):
        PRUNERS.spec(Mine())


def test_adapters_go_by_model_type():
    assert {"llama", "mistral", "qwen2", "qwen3", "opt", "gpt_neox"} <= set(ADAPTERS)
