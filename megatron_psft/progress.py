"""How far a long pass has come: a bar on a terminal, elsewhere a line a minute, so that a log is not full of bars."""

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TypeVar

from tqdm import tqdm

_SHORT_SECONDS = 5.0  # a pass that is over sooner shows no bar
_LINE_SECONDS = 60.0
_LINE = "{desc}: {percentage:.0f} %, {n_fmt} of {total_fmt}UNIT, {elapsed} elapsed, {remaining} left"
_LINE_WITHOUT_TOTAL = "{desc}: {n_fmt}UNIT, {elapsed} elapsed"

Item = TypeVar("Item")


def is_on_terminal() -> bool:
    """Whether somebody watches: a bar that is redrawn in place is for them, and fills a file."""
    return sys.stderr.isatty()


class Progress:
    """The progress of one pass, on stderr; a bar leaves no trace."""

    def __init__(
        self, description: str, *, total: int | None, unit: str, is_shown: bool = True, num_done: int = 0
    ) -> None:
        """Starts the clock.

        Args:
            description: what the pass is for.
            total: items of the pass, or bytes; None if it is not known.
            unit: what an item is, in the singular; `B` is shown as kB, MB and so on.
            is_shown: whether this rank shows it.
            num_done: items before these, done by an earlier process.
        """
        self._shown: dict[str, Any] = {
            "total": total,
            "initial": num_done,
            "unit": unit,
            "unit_scale": unit == "B",
        }
        self._description, self._done = description, num_done
        self._has_lines = is_shown and not is_on_terminal()
        self._started = self._last_line = time.monotonic()
        self._bar = tqdm(
            desc=description,
            disable=not is_shown or self._has_lines,
            delay=_SHORT_SECONDS,
            leave=False,
            dynamic_ncols=True,
            **self._shown,
        )

    def update(self, amount: int = 1, *, note: str = "") -> None:
        """Says that so much more is done; `note` stands behind the bar."""
        self._done += amount
        if note:
            self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(amount)
        now = time.monotonic()
        if self._has_lines and now - self._last_line >= _LINE_SECONDS:
            self._last_line = now
            tqdm.write(self._line(now - self._started), file=sys.stderr)

    def _line(self, elapsed: float) -> str:
        unit = "B" if self._shown["unit_scale"] else ""
        shape = (_LINE if self._shown["total"] else _LINE_WITHOUT_TOTAL).replace("UNIT", unit)
        return tqdm.format_meter(self._done, elapsed=elapsed, prefix=self._description, bar_format=shape, **self._shown)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def progress(
    items: Iterable[Item],
    description: str,
    *,
    unit: str,
    is_shown: bool = True,
    num_done: int = 0,
    total: int | None = None,
) -> Iterator[Item]:
    """Iterates over `items`, of which there are `total` (their length if None), and shows how far it is.

    Otherwise as `Progress`.
    """
    if total is None and isinstance(items, Sized):
        total = num_done + len(items)
    with Progress(description, total=total, unit=unit, is_shown=is_shown, num_done=num_done) as shown:
        for item in items:
            yield item
            shown.update()
