"""The texts of errors."""

import pytest

from megatron_psft.errors import counted, first_line, in_words, reason_of


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


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (FileNotFoundError(2, "No such file or directory", "a.yaml"), "No such file or directory"),
        (FileNotFoundError("No such file or directory: a.safetensors"), "No such file or directory"),
        (OSError("a network that is gone"), "a network that is gone"),
        (ValueError("line 1\n  line 2"), "line 1 line 2"),
        (EOFError(), "EOFError"),
    ],
)
def test_a_reason_leaves_the_path_to_who_quotes_it(error, text):
    assert reason_of(error) == text


@pytest.mark.parametrize(
    ("number", "unit", "spec", "text"),
    [
        (1, "step", ",", "1 step"),
        (0, "step", ",", "0 steps"),
        (2048, "record", ",", "2,048 records"),
        (1, "pass", ",", "1 pass"),
        (0.5, "pass", ".4g", "0.5 passes"),
        (3, "batch", ",", "3 batches"),
        (1.0, "time", ".4g", "1 time"),
        (1.0, "record", ".1f", "1.0 records"),
    ],
)
def test_a_number_has_its_unit_in_the_singular_or_plural(number, unit, spec, text):
    assert counted(number, unit, spec) == text


def test_names_in_words():
    assert [in_words(names) for names in ("a", "ab", "abc")] == ["a", "a and b", "a, b and c"]
