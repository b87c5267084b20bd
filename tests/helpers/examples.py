"""Examples of property tests: few with QUICK_TESTS=1, as `make test-unit` sets it, others each time with FUZZ=1."""

import os

from hypothesis import HealthCheck, settings

QUICK = os.environ.get("QUICK_TESTS") == "1"
FUZZ = os.environ.get("FUZZ") == "1"
"""True for examples that no run had before, as `make fuzz` sets it."""


def examples(count: int, **options) -> settings:
    """Make the settings of a property test that draws `count` examples, or at most 5 with QUICK_TESTS=1."""
    return settings(max_examples=min(count, 5) if QUICK else count, **options)


settings.register_profile("deterministic", examples(100), derandomize=True, deadline=None, database=None)
settings.register_profile(
    "fuzz", examples(100), derandomize=False, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
settings.load_profile("fuzz" if FUZZ else "deterministic")
