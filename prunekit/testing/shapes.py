"""Layers of any shape, for what suites promise of all of them."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prunekit.testing.layers import QUIRKS


def on_any_shape(test: Callable[..., None]) -> Callable[..., None]:
    """Call a test of a suite with thirty n_groups, group_size, d_out, quirk, seed and damping."""
    any_shape = given(
        n_groups=st.integers(1, 7),
        group_size=st.integers(1, 4),
        d_out=st.integers(1, 6),
        quirk=st.sampled_from(QUIRKS),
        seed=st.integers(0, 2**31),
        damping=st.sampled_from([0.0, 1e-4, 0.01, 1.0]),
    )
    # one class serves many subclasses, and the same examples for all of them are what we want
    alike = settings(
        max_examples=30,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.differing_executors, HealthCheck.too_slow],
    )
    return alike(any_shape(test))
