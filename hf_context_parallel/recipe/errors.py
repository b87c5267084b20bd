"""The error of what cannot be run, and the nearest valid name."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


class RecipeError(ValueError):
    """A recipe, an override or a launch that cannot be run. The message names the value, the rule and the remedy."""


def did_you_mean(word: str, allowed: Sequence[str], exact: Sequence[str] = ()) -> str:
    """` Did you mean ...?` with what is `exact`, or else nearest to `word`; all that is allowed if nothing is near."""
    nearest = exact or difflib.get_close_matches(word, list(allowed), n=1)
    if nearest:
        return f" Did you mean {' or '.join(map(repr, nearest))}?"
    return f" Valid are {', '.join(sorted(allowed))}." if len(allowed) <= 20 else ""
