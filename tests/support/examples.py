"""The number of random examples of a test, by the profile of Hypothesis."""

from __future__ import annotations

from hypothesis import settings


def in_profile(full: int) -> int:
    """Return the number for the present profile, of which `full` is that for profile `full`."""
    profile = settings.default
    assert profile is not None
    return max(1, full * profile.max_examples // 100)
