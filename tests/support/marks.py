"""Cases of a parametrized test that come with the slow tests."""

from typing import Any

import pytest


def slow(*values: Any, id: str | None = None, both: bool = False) -> Any:
    """A case that repeats in another layout, or in another way, what a quick one shows; `both`: run with both lines of
    Megatron-Core even so."""
    return pytest.param(*values, id=id, marks=(pytest.mark.slow, pytest.mark.both) if both else pytest.mark.slow)
