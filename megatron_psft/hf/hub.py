"""Turns `DIR|ID` into a local folder."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from megatron_psft.errors import UserError

# Pickled weights are not even downloaded.
_PATTERNS = ["*.json", "*.jinja", "*.txt", "*.model", "*.safetensors"]


def model_folder(field: str, name: str) -> Path:
    """Returns the folder `name`, or the local copy of the hub repository of that name.

    Args:
        field: of the configuration, for errors.
        name: a folder, or a hub ID such as `Qwen/Qwen2.5-7B`.

    Raises:
        UserError: `name` is neither.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise UserError(f"{field} ({name}) must be an existing folder or a hub ID; check the path")
    try:
        return Path(snapshot_download(name, allow_patterns=_PATTERNS))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, HFValidationError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{field} ({name}) is no local folder and the hub has no answer for it: {reason}") from None
