"""How many examples property tests draw: fewer where QUICK_TESTS=1, as `make test-unit` sets it."""

import os

from hypothesis import settings

QUICK = os.environ.get("QUICK_TESTS") == "1"


def examples(count: int, **options) -> settings:
    """Settings of a property test that draws so many examples, or 5 where tests are to be quick."""
    return settings(max_examples=min(count, 5) if QUICK else count, **options)
