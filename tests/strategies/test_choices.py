"""Every option of every plug-in that is one of a few words, in Python as in a recipe."""

from dataclasses import fields, is_dataclass
from typing import Literal, get_origin, get_type_hints

import pytest

from prunekit.plugins.registry import ALLOCATORS, FINISHERS, OBJECTIVES, PRUNERS, SIGNALS

CASES = [
    (entry.load(), field.name)
    for registry in (PRUNERS, SIGNALS, ALLOCATORS, OBJECTIVES, FINISHERS)
    for entry in registry.values()
    if is_dataclass(entry.load())
    for field in fields(entry.load())
    if get_origin(get_type_hints(entry.load())[field.name]) is Literal
]


@pytest.mark.parametrize(("plugin", "option"), CASES, ids=[f"{plugin.__name__}-{option}" for plugin, option in CASES])
def test_a_word_that_is_none_of_them_is_refused(plugin, option):
    with pytest.raises(ValueError, match=f"no {option} 'nonsense'; there are "):
        plugin(**{option: "nonsense"})
