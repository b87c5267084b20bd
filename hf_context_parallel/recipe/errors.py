"""Error of a recipe, suggestions for misspelt names, and messages without secrets."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

SECRET = r"(?:token|password|passwd|secret|key)"
"""End of the names of keys whose values are shown nowhere, such as `hub_token`."""
HIDDEN = "***"


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


def shown(key: str, value: object) -> str:
    """Write the value of a key for a message, and hide that of a secret."""
    return HIDDEN if re.search(f"{SECRET}$", key, re.IGNORECASE) else repr(value)


def without_secrets(override: str) -> str:
    """Write an override for a message, and hide the value of a secret."""
    return re.sub(f"({SECRET}\\s*[=: ]).*", rf"\1{HIDDEN}", override, flags=re.IGNORECASE | re.DOTALL)
