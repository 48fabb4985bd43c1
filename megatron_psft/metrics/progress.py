"""Progress bars of passes over batches that come between optimizer steps."""

from collections.abc import Iterable, Sequence
from typing import TypeVar

from tqdm import tqdm

_SHORT_SECONDS = 5  # a pass that is over sooner shows no bar

Item = TypeVar("Item")


def progress(
    items: Sequence[Item], description: str, *, unit: str, is_shown: bool, num_done: int = 0
) -> Iterable[Item]:
    """Iterates over `items` under a progress bar, which appears when the pass is a long one and leaves no trace.

    Args:
        items: still to do.
        description: what the pass is for.
        unit: what an item is, in the singular.
        is_shown: whether this rank shows it.
        num_done: items before these, done by an earlier process.
    """
    return tqdm(
        items,
        desc=description,
        unit=unit,
        initial=num_done,
        total=num_done + len(items),
        disable=not is_shown,
        delay=_SHORT_SECONDS,
        leave=False,
    )
