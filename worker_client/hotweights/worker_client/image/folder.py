"""Which files of a Hugging Face folder make an image, and where the folder of a model is.

    model id --refs/main--> snapshots/REVISION/   weights (*.safetensors) + what rides along
                                 |                (configuration, tokenizer; `.py` only when asked for)
                                 +--links into--> blobs/

A folder `draft` inside with weights in it is the draft model that goes with the target: a checkpoint of its own, whose
files are named `draft/NAME` in the image. Pickles never count: loading one runs its code.
"""

import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from hotweights.worker_client.image.errors import BadImage, ModelNotFound

INDEX = "model.safetensors.index.json"
DRAFT = "draft"
WEIGHTS_SUFFIX = ".safetensors"
# The index lists every tensor once; a million of them make about 100 MB.
INDEX_BYTES_MAX = 256 << 20
NAME_BYTES_MAX = 255

# Configuration, tokenizers (vocab.json, merges.txt, spiece.model, qwen.tiktoken) and chat templates.
_RIDES_ALONG = (".json", ".jinja", ".model", ".tiktoken", ".txt")
# Indexes of pickles, which are not part of the image.
_LEFT_OUT = (".bin.index.json",)

# What the hub allows as "org/name" or "name".
_MODEL_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")


@dataclass(frozen=True)
class FolderFile:
    """A file of the image. `path` is where its bytes are, links followed; `name` has a folder only in a draft's."""

    name: str
    path: Path
    weights: bool


def is_plain_name(name: str) -> bool:
    """Whether `name` can only be a file directly in a folder: no separator, no "..", nothing hidden."""
    try:
        size = len(os.fsencode(name))
    except UnicodeEncodeError:
        return False
    return 0 < size <= NAME_BYTES_MAX and not name.startswith(".") and name.isprintable() and not set(name) & set("/\\")


def is_of_draft(name: str) -> bool:
    """Whether the file of this name in an image is one of the draft model's."""
    return name.startswith(f"{DRAFT}/")


def belongs(name: str, *, include_code: bool) -> bool:
    """Whether a file of this name may be part of an image at all."""
    if not is_plain_name(name.removeprefix(f"{DRAFT}/")) or name.endswith(_LEFT_OUT):
        return False
    return name.endswith((WEIGHTS_SUFFIX, *_RIDES_ALONG)) or (include_code and name.endswith(".py"))


def list_files(folder: Path, *, include_code: bool = False) -> list[FolderFile]:
    """The files of the image in `folder`, sorted by name.

    With an index, weights are the files it names and no others, as vLLM loads them. Raises
    BadImage when there are none, when the index names one that is missing, and for a link that
    leads out of the folder.
    """
    files = _files_of(folder, "", include_code)
    if not any(file.weights for file in files):
        raise BadImage(folder.name, "", "no tensor at all: the folder has no *.safetensors (pickles are not read)")
    of_draft = _files_of(folder, f"{DRAFT}/", include_code) if (folder / DRAFT).is_dir() else []
    if any(file.weights for file in of_draft):  # else it is another folder of that name
        files += of_draft
    return sorted(files, key=lambda file: file.name)


def _files_of(folder: Path, prefix: str, include_code: bool) -> list[FolderFile]:
    """Of the checkpoint whose files have this prefix; without weights where it has none."""
    names = [prefix + name for name in os.listdir(folder / prefix)]
    names = [name for name in names if belongs(name, include_code=include_code)]
    weights = {name for name in names if name.endswith(WEIGHTS_SUFFIX)}
    index = prefix + INDEX
    if index in names:
        named = set(read_index(folder, index).values())
        for name in sorted(named - weights):
            raise BadImage(index, "", f"names {name!r}, which is not in the folder")
        names = [name for name in names if name not in weights or name in named]
    return [FolderFile(name, locate(folder, name), name in weights) for name in names]


def read_index(folder: Path, index: str) -> Mapping[str, str]:
    """Tensor name -> file name, from an index of the folder; a draft's files have its prefix. Raises BadImage."""
    path = locate(folder, index)
    if path.stat().st_size > INDEX_BYTES_MAX:
        raise BadImage(index, "", f"too large: at most {INDEX_BYTES_MAX} bytes are allowed")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BadImage(index, "", f"not JSON: {error}") from None
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadImage(index, "", "has no weight_map")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not is_plain_name(file) or not file.endswith(WEIGHTS_SUFFIX):
            raise BadImage(index, tensor, f"is said to be in {file!r}, which is no plain *{WEIGHTS_SUFFIX} name")
    prefix = index.removesuffix(INDEX)
    return {tensor: prefix + file for tensor, file in weight_map.items()}


def inside(folder: Path) -> dict[str, Path]:
    """All files below a folder, by the names that files of an image have."""
    paths = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return {path.relative_to(folder).as_posix(): path for path in paths}


def locate(folder: Path, name: str) -> Path:
    """Where the bytes of the folder's file `name` are. Raises BadImage unless it is a plain file.

    A link may lead to another file of the folder, or, in a snapshot of the Hugging Face cache, to a
    file of its `blobs`; nowhere else.
    """
    if not is_plain_name(name.removeprefix(f"{DRAFT}/")):
        raise BadImage(name, "", "is not a plain file name")
    home = folder.resolve()
    try:
        path = (home / name).resolve(strict=True)
        mode = path.stat().st_mode
    except OSError as error:
        raise BadImage(name, "", f"cannot be opened in {folder}: {error.strerror}") from None
    except RuntimeError:  # how Python before 3.13 reports a loop of links
        raise BadImage(name, "", "is a link to itself") from None
    if path.parent not in _allowed_homes(home):  # also where `draft` itself is a link
        raise BadImage(name, "", f"is a link out of the folder, to {path}")
    if not stat.S_ISREG(mode):
        raise BadImage(name, "", "is not a plain file")
    return path


def _allowed_homes(folder: Path) -> Iterator[Path]:
    yield folder
    yield folder / DRAFT
    if folder.parent.name == "snapshots":
        yield (folder.parent.parent / "blobs").resolve()


def resolve_model(name_or_path: str, hf_cache: Path, *, revision: str = "main") -> Path:
    """The folder of a model: a path, or an id as vLLM resolves it from the local Hugging Face cache.

    `hf_cache` is the hub folder (HF_HUB_CACHE, or HF_HOME/hub). `revision` is a branch, a tag or a
    commit. Raises ModelNotFound; never asks the network.
    """
    folder = Path(name_or_path)
    if name_or_path and folder.is_dir():
        return folder.resolve()
    if not _MODEL_ID.fullmatch(name_or_path):
        raise ModelNotFound(name_or_path, [folder], "there is no such folder, and it is no model id")
    kept = hf_cache / ("models--" + name_or_path.replace("/", "--"))
    looked_in = [folder, kept]
    if not kept.is_dir():
        raise ModelNotFound(name_or_path, looked_in, "neither a folder nor in the local Hugging Face cache")
    if not all(map(is_plain_name, revision.split("/"))):
        raise ModelNotFound(name_or_path, looked_in, f"{revision!r} is no revision")
    try:
        commit = (kept / "refs" / revision).read_text().strip()
    except OSError:
        commit = revision  # a commit has no ref of its own
    snapshot = kept / "snapshots" / commit
    if not is_plain_name(commit) or not snapshot.is_dir():
        raise ModelNotFound(name_or_path, looked_in, f"revision {revision!r} is not in the local Hugging Face cache")
    return snapshot.resolve()
