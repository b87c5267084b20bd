"""Error of a recipe, and suggestions for misspelt names."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


class RecipeError(ValueError):
    """Error of a recipe, an override or a launch. The message names the wrong value, and says how to fix it."""


def did_you_mean(word: str, allowed: Sequence[str], exact: Sequence[str] = ()) -> str:
    """Suggest valid names for a wrong one, as a sentence that begins with a space.

    Args:
        word: the wrong name.
        allowed: the valid names. The nearest is suggested. If none is near, up to 20 are listed.
        exact: names to suggest instead of the nearest.
    """
    nearest = exact or difflib.get_close_matches(word, list(allowed), n=1)
    if nearest:
        return f" Did you mean {' or '.join(map(repr, nearest))}?"
    return f" Valid are {', '.join(sorted(allowed))}." if len(allowed) <= 20 else " Remove or correct it."
