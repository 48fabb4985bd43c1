"""The texts of errors."""

import pytest

from megatron_psft.errors import first_line


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("a\nb"), "a"),
        (ValueError("\n a \n"), "a"),
        (EOFError(), "EOFError"),
        (RuntimeError(" \n"), "RuntimeError"),
    ],
)
def test_the_first_line_of_an_error_is_never_empty(error, text):
    assert first_line(error) == text
