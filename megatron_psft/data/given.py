"""A path of records together with the setting that has named it: what every error about the path begins with."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class GivenPath:
    """A path, or an ID of the hub. `str()` is how an error about it begins, as `valid_data (held_out.jsonl)`."""

    field: str
    """The setting, as the configuration calls it."""
    path: str
    """As the user has written it; of one of the files that this stands for, that file's."""

    def __str__(self) -> str:
        return f"{self.field} ({self.path})"

    def at(self, file: Path) -> "GivenPath":
        """A file that the same setting has led to."""
        return GivenPath(self.field, str(file))
