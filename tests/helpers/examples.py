"""Number of examples of property tests, which is small if QUICK_TESTS=1, as `make test-unit` sets it."""

import os

from hypothesis import settings

QUICK = os.environ.get("QUICK_TESTS") == "1"


def examples(count: int, **options) -> settings:
    """Make the settings of a property test that draws `count` examples, or at most 5 with QUICK_TESTS=1."""
    return settings(max_examples=min(count, 5) if QUICK else count, **options)
