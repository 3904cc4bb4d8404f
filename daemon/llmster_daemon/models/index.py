"""The store's sidecar: what each model file was found to be, so that it is read only once."""

import logging
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .files import Stamp, replace_text
from .gguf import GgufInfo

log = logging.getLogger(__name__)

INDEX_NAME = ".index.json"
MAX_INDEX_BYTES = 256 << 20


class Entry(BaseModel):
    """One model file, as of its size and mtime. `digest` is the sha256 of the content."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    size: int
    mtime_ns: int
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    key: Annotated[str, Field(min_length=1)]
    info: GgufInfo

    @property
    def stamp(self) -> Stamp:
        """What the file's stamp must be for this entry to hold."""
        return self.size, self.mtime_ns


class Index(BaseModel):
    """The sidecar's content: entries by path relative to the root. A new `version` per reader."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    version: Literal[1] = 1
    models: dict[str, Entry] = {}


def load_index(path: Path) -> dict[str, Entry] | None:
    """The entries in the sidecar; None where it is missing or damaged, so must be rebuilt."""
    try:
        if path.stat().st_size > MAX_INDEX_BYTES:
            raise ValueError("too large")
        models = Index.model_validate_json(path.read_bytes()).models
        if len({entry.key for entry in models.values()}) != len(models):
            raise ValueError("one key for two models")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        kind = "damaged" if isinstance(error, ValidationError) else str(error)
        log.warning("the model index %s is rebuilt: %s", path, kind)
        return None
    return models


def save_index(path: Path, entries: dict[str, Entry]) -> None:
    """Writes the sidecar atomically. Raises OSError."""
    replace_text(path, Index(models=entries).model_dump_json())
