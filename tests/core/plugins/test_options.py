from dataclasses import dataclass
from typing import Literal

import pytest

from prunekit import check_choices

Word = Literal["low", "high"]


@dataclass(frozen=True)
class Base:
    word: Word = "low"
    size: int = 1

    def __post_init__(self) -> None:
        check_choices(self)


@dataclass(frozen=True)
class Derived(Base):
    dim: Literal[0, 1] | None = None
    name: str | None = None
    either: Literal["auto"] | int = "auto"


def test_what_is_listed_passes():
    assert Derived("high", dim=1) == Derived("high", dim=1, name=None)
    for dim in (0, 1, None):
        assert Derived(dim=dim).dim == dim


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"word": "loud"}, "no word 'loud'; there are low, high"),
        ({"word": None}, "no word None; there are low, high"),
        ({"dim": 2}, "no dim 2; there are 0, 1, none"),
    ],
)
def test_what_is_not_is_refused_in_subclasses_too(wrong, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        Derived(**wrong)


def test_other_types_are_not_its_business():
    assert Derived(size=-1, name="x", either=3).either == 3
