"""A space file says what it means, and what it cannot say is one sentence."""

from typing import Any

import pytest
import yaml

from prunekit.errors import WrongInput
from prunekit.recipe.choices import SPACES, Choices
from prunekit.recipe.presets import presets
from prunekit.recipe.schema import Recipe

SPACE = """
rebuild: false
sparsity: 0.3
damping: {low: 1.0e-3, high: 0.1, log: true}
carry: [dense, expected]
search_budget: [1000]
pruner:
  - wanda
  - {name: obs, aim: [own, stream]}
allocator: {name: tyr, reach: {low: 1, high: 4}, inner: [uniform, {name: evolution, generations: {low: 2, high: 5}}]}
allocator.stride: {low: 0.125, high: 0.5, step: 0.125}
"""


class _Script:
    """Answers every question with the choice of this index, and writes down what was asked."""

    def __init__(self, index: int) -> None:
        self.index, self.asked = index, dict[str, Any]()

    def suggest_float(self, name: str, low: float, high: float, **how: Any) -> float:
        self.asked[name] = (low, high, how)
        return (low, high)[self.index]

    def suggest_int(self, name: str, low: int, high: int, **how: Any) -> int:
        self.asked[name] = (low, high, how)
        return (low, high)[self.index]

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        self.asked[name] = list(choices)
        return choices[self.index]


def script(index: int) -> Any:
    """As much of an Optuna trial as is asked for."""
    return _Script(index)


def space(text: str = SPACE) -> Choices:
    return Choices.of_mapping(yaml.safe_load(text))


def test_values_are_fixed_and_a_list_of_one_is_its_value() -> None:
    assert space().fixed == {"rebuild": False, "sparsity": 0.3, "search_budget": 1000}


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        (0, {"damping": 1e-3, "carry": "dense", "pruner": "wanda", "allocator.stride": 0.125}),
        (1, {"damping": 0.1, "carry": "expected", "pruner": {"name": "obs", "aim": "stream"}, "allocator.stride": 0.5}),
    ],
)
def test_a_trial_is_asked_for_what_is_open(index: int, expected: dict[str, Any]) -> None:
    found = space().suggested(script(index))
    inner = [{"name": "tyr", "reach": 1, "inner": "uniform"}]
    inner += [{"name": "tyr", "reach": 4, "inner": {"name": "evolution", "generations": 5}}]
    assert found == expected | {"allocator": inner[index]}
    space().check(Recipe.load())
    assert Recipe.load().with_overrides(found).carry == expected["carry"]


def test_parameters_are_called_by_their_path_and_options_only_where_they_are() -> None:
    first, second = script(0), script(1)
    for trial in (first, second):
        space().suggested(trial)
    assert first.asked.keys() == {
        *("damping", "carry", "pruner", "allocator.tyr.reach", "allocator.tyr.inner", "allocator.stride")
    }
    assert second.asked.keys() - first.asked.keys() == {
        "pruner.obs.aim",
        "allocator.tyr.inner.evolution.generations",
    }
    assert second.asked["damping"] == (1e-3, 0.1, {"log": True, "step": None})
    assert second.asked["allocator.stride"] == (0.125, 0.5, {"log": False, "step": 0.125})
    assert second.asked["pruner"] == ["wanda", "obs"]


def test_lists_and_none_can_be_chosen() -> None:
    found = space("allocator.inner.selections: [[[4, 512]], [[8, 512], [1, 1024]]]\nsearch_budget: [null, 5000]")
    assert found.suggested(script(1)) == {"allocator.inner.selections": [[8, 512], [1, 1024]], "search_budget": 5000}
    assert found.suggested(script(0))["search_budget"] is None


@pytest.mark.parametrize("name", sorted(presets(SPACES)))
def test_every_preset_is_a_space_of_the_recipe_of_its_name_or_of_the_default(name: str) -> None:
    choices, base = Choices.load(name), name if name in presets() else "default"
    choices.check(Recipe.load(base).with_overrides(choices.fixed))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("damping: {low: 1, hgh: 2}", "is neither a range {low: ..., high: ..., log: ..., step: ...} nor a plug-in"),
        ("damping: {low: 1e-3, high: 1}", "YAML reads 1e-3 as text: 1.0e-3"),
        ("damping: {low: 2, high: 1}", "low is below high"),
        ("damping: {low: 0, high: 1, log: true}", "above 0 with log"),
        ("damping: {low: 1, high: 2, log: true, step: 1}", "not with log"),
        ("carry: []", "a list of choices is empty"),
        ("carry: [dense, dense]", "'dense' is given twice"),
        ("carry: dense", "leaves nothing to choose"),
        ("{}", "leaves nothing to choose"),
        ("seed: [1, 2]", "seed cannot be tuned"),
        ("data.seqlen: [128, 256]", "of the data there are data.dataset, data.calibration_tokens"),
        ("pruner: [obs, {name: obz, aim: [own]}]", "no pruner 'obz'; did you mean 'obs'?"),
        ("pruner: [wanda, {name: obs, aime: [own, dense]}]", "no option of pruner 'obs' 'aime'"),
        ("sparsity: {low: 0.5, high: 1.5}", "more than 0 and less than 1, not 1.5"),
        ("sparsty: [0.5, 0.6]", "no recipe key 'sparsty'"),
    ],
)
def test_what_a_space_cannot_say_is_one_sentence(text: str, sentence: str) -> None:
    with pytest.raises(WrongInput) as caught:
        space(text).check(Recipe.load())
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_such_space_is_one_sentence() -> None:
    with pytest.raises(WrongInput, match="no space 'adaprunr'; did you mean 'adapruner'"):
        Choices.load("adaprunr")
    with pytest.raises(WrongInput, match=r"no space file 'gone\.yaml'; give a file, or one of the presets adapruner"):
        Choices.load("gone.yaml")
