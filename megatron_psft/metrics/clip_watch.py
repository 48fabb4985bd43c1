"""Notices when a run has clipped most of its label tokens for long."""

from collections.abc import Callable

_TOO_MUCH = 0.5
_LONGEST = 100  # steps; of a longer window, as with `fixed`, parts of so many are looked at
_QUIET = 9  # windows without another warning after one


class ClipWatch:
    """Looks at `clip_fraction` over whole windows of the old policy: it begins each at 0, and rises."""

    def __init__(self, window_of: Callable[[int], range]) -> None:
        """`window_of` says which steps (from 0) are in a step's window; none in warm-up."""
        self._window_of = window_of
        self._fractions: dict[int, float] = {}
        self._quiet_windows = 0

    def add(self, step: int, clip_fraction: float) -> str | None:
        """Takes up a step (from 0), and says what is to be said after it, if anything."""
        window = self._window_of(step)
        if not window:
            return None
        first = step - (step - window.start) % _LONGEST
        part = range(first, min(first + _LONGEST, window.stop))
        self._fractions[step] = clip_fraction
        if step != part[-1]:
            return None
        seen = [self._fractions[earlier] for earlier in part if earlier in self._fractions]
        self._fractions.clear()
        if self._quiet_windows:
            self._quiet_windows -= 1
            return None
        mean = sum(seen) / len(seen)
        # A resumed run has not seen the beginning of its first window, where little is clipped.
        if len(seen) < len(part) or mean <= _TOO_MUCH:
            return None
        self._quiet_windows = _QUIET
        return (
            f"WARNING: {100 * mean:.0f} % of the label tokens of steps {part[0] + 1} to {part[-1] + 1} were clipped: "
            "most of this epoch's gradient is thrown away; lower lr or shorten the window (old_policy_interval)"
        )
