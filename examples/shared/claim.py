"""The folder of an example's results, of which the same scripts use again what they have finished."""

import hashlib
import shutil
from collections.abc import Iterable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def claim(folder: Path, scripts: Iterable[Path], *settings: str) -> None:
    """Empties `folder`, unless the very same scripts, with the same `settings`, have left something there."""
    parts = [*(text.encode() for text in settings), *(script.read_bytes() for script in scripts)]
    digest = hashlib.sha256(b"".join(parts)).hexdigest()
    mark, shown = folder / "scripts.sha256", folder.relative_to(REPOSITORY)
    if mark.is_file() and mark.read_text() == digest:
        print(f"Writing below {shown}, where finished parts are used again: remove it to start anew.")
        return
    print(f"Writing below {shown} (emptied first).")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    mark.write_text(digest)
