"""How many examples property tests draw: `make slow` (profile `random`) all of them, `make test` a third."""

from __future__ import annotations

import hypothesis


def examples(count: int) -> int:
    """Return how many of so many examples to draw under the profile that was chosen."""
    return count if hypothesis.settings.get_current_profile_name() == "random" else -(-count // 3)
