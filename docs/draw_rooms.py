"""The rooms of the package as an SVG: a row of boxes for each level, a line for each import that no chain implies."""

from collections.abc import Mapping, Sequence

_WIDTH, _ROW, _BOX = 760, 62, 104  # of the picture, of a row with its lines, of a box
_STYLE = (
    "<style>rect{fill:#eef2f6;stroke:#5b7083}text{font:13px sans-serif;fill:#1d2730;text-anchor:middle}"
    "path{fill:none;stroke:#8a9bab}</style>"
)


def draw(imports: Mapping[str, Mapping[str, object]], rooms: Sequence[str]) -> str:
    """An SVG picture of which of `rooms` imports which, the topmost first."""
    below = {room: {other for other in imports.get(room, ()) if other in rooms} for room in rooms}
    levels = _levels(below)
    centers = _centers(levels)
    lines = [_line(centers[room], centers[other]) for room in rooms for other in sorted(_not_implied(room, below))]
    boxes = [_box(room, *center) for room, center in centers.items()]
    height = _ROW * len(levels)
    start = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}">'
    return "\n".join([start, _STYLE, *lines, *boxes, "</svg>"]) + "\n"


def _levels(below: Mapping[str, set[str]]) -> list[list[str]]:
    """Rooms by how long a chain of imports leads to them, so that each lies below all that import it."""
    depth: dict[str, int] = {}

    def depth_of(room: str) -> int:
        if room not in depth:
            depth[room] = 1 + max((depth_of(other) for other in below if room in below[other]), default=-1)
        return depth[room]

    for room in below:
        depth_of(room)
    return [[room for room in below if depth[room] == level] for level in range(max(depth.values()) + 1)]


def _not_implied(room: str, below: Mapping[str, set[str]]) -> set[str]:
    """The imports of a room that no chain through another of its imports makes."""
    return {other for other in below[room] if not any(other in _all_below(via, below) for via in below[room])}


def _all_below(room: str, below: Mapping[str, set[str]]) -> set[str]:
    return below[room].union(*(_all_below(other, below) for other in below[room]))


def _centers(levels: Sequence[Sequence[str]]) -> dict[str, tuple[int, int]]:
    return {
        room: (_WIDTH * (2 * place + 1) // (2 * len(level)), _ROW * row + 20)
        for row, level in enumerate(levels)
        for place, room in enumerate(level)
    }


def _line(start: tuple[int, int], end: tuple[int, int]) -> str:
    """Straight down beside the rows between, and over to the other box in the last gap."""
    (x, y), (to_x, to_y) = start, end
    turn = max(y, to_y - _ROW) + 14
    middle = (turn + to_y - 14) // 2
    return f'<path d="M{x} {y + 14}V{turn}C{x} {middle} {to_x} {middle} {to_x} {to_y - 14}"/>'


def _box(room: str, x: int, y: int) -> str:
    return (
        f'<rect x="{x - _BOX // 2}" y="{y - 14}" width="{_BOX}" height="28" rx="4"/>'
        f'<text x="{x}" y="{y + 4}">{room}</text>'
    )
