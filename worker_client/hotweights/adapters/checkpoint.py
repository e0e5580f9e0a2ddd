"""Where an engine's own checkpoint lies on this machine."""

from pathlib import Path
from typing import Any


def checkpoint_folder(model_config: Any) -> Path | None:
    """The folder; a model id is looked up in the local Hugging Face cache. None when it is not here."""
    folder = Path(model_config.model)
    if folder.is_dir():
        return folder.resolve()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        found = snapshot_download(model_config.model, revision=model_config.revision, local_files_only=True)
        return Path(found).resolve()
    except (HFValidationError, LocalEntryNotFoundError):
        return None
