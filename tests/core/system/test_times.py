"""Times are read as people write them."""

import pytest

from prunekit.errors import WrongInput
from prunekit.system.times import as_seconds


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90),
        (90.5, 90.5),
        ("90s", 90),
        ("45m", 2700),
        ("45 min", 2700),
        ("1.5h", 5400),
        ("1h30m", 5400),
        ("1H 2m 3s", 3723),
    ],
)
def test_numbers_with_units_are_seconds(text: str | float, seconds: float) -> None:
    assert as_seconds(text) == seconds
    assert as_seconds(None) is None


@pytest.mark.parametrize(
    "text", ["", "soon", "-3m", "0", "0h", "3 days", "m", "1h x", "5 6m", "nan", "inf", "9" * 400 + "h"]
)
def test_what_is_no_time_is_one_sentence(text: str) -> None:
    with pytest.raises(WrongInput, match=r"no time .* give it as 45m"):
        as_seconds(text)
