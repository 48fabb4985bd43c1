"""Cases of a parametrized test that come with the slow tests."""

from typing import Any

import pytest


def slow(*values: Any, id: str | None = None) -> Any:
    """A case that repeats in another layout, or in another way, what a quick one shows."""
    return pytest.param(*values, id=id, marks=pytest.mark.slow)
