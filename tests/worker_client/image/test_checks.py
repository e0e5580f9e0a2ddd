"""A manifest from somewhere else: the good one passes, and each way of being bad is refused by itself."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.worker_client.image.files import make_sharded_folder

from hotweights.v1.manifest_pb2 import COMPONENT_ROLE_ADAPTER, COMPONENT_ROLE_DRAFT, Manifest
from hotweights.worker_client.image import BadImage, build_manifest, check_manifest


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = make_sharded_folder(tmp_path_factory.mktemp("image") / "model")
    return build_manifest(folder, bucket_bytes=1024).manifest


# Files: 0 and 1 hold a, b and c; 2 is the index. Each of 140 bytes a tensor.
SPOIL: dict[str, Callable[[Manifest], object]] = {
    "unknown format": lambda m: setattr(m, "format", "gguf"),
    "buckets of 0 bytes": lambda m: setattr(m, "bucket_bytes", 0),
    "buckets of 1073741825 bytes": lambda m: setattr(m, "bucket_bytes", (1 << 30) + 1),
    "its components are not a target": lambda m: m.ClearField("components"),
    "its components are not a target: draft alone": lambda m: setattr(m.components[0], "role", COMPONENT_ROLE_DRAFT),
    "its components are not a target: adapter": lambda m: m.components.add(name="adapter", role=COMPONENT_ROLE_ADAPTER),
    "has a draft model without files": lambda m: m.components.add(name="draft", role=COMPONENT_ROLE_DRAFT),
    "or files of one that it does not have": lambda m: setattr(m.files[0], "name", "draft/a.safetensors"),
    "no tensor at all": lambda m: m.ClearField("tensors"),
    "no plain name of a file that images have: parent": lambda m: setattr(m.files[2], "name", "../x.json"),
    "no plain name of a file that images have: absolute": lambda m: setattr(m.files[2], "name", "/x.json"),
    "no plain name of a file that images have: folder": lambda m: setattr(m.files[2], "name", "x/x.json"),
    "no plain name of a file that images have: deep": lambda m: setattr(m.files[2], "name", "draft/draft/x.json"),
    "no plain name of a file that images have: up": lambda m: setattr(m.files[2], "name", "draft/../x.json"),
    "no plain name of a file that images have: empty": lambda m: setattr(m.files[2], "name", ""),
    "no plain name of a file that images have: dots": lambda m: setattr(m.files[2], "name", ".."),
    "no plain name of a file that images have: pickle": lambda m: setattr(m.files[2], "name", "x.pkl"),
    "is code": lambda m: setattr(m.files[2], "name", "x.py"),
    "only *.safetensors files hold tensors": lambda m: setattr(m.files[2], "weights", True),
    "only *.safetensors files hold tensors: not": lambda m: setattr(m.files[0], "weights", False),
    "not in order": lambda m: setattr(m.files[1], "name", m.files[0].name),
    "not in order: reversed": lambda m: setattr(m.files[0], "name", "zzz.safetensors"),
    "is in file 3 of 3": lambda m: setattr(m.tensors[2], "file", 3),
    "the file holds no tensors": lambda m: setattr(m.tensors[2], "file", 2),
    "empty or stands twice": lambda m: setattr(m.tensors[2], "name", "a"),
    "empty or stands twice: empty": lambda m: setattr(m.tensors[2], "name", ""),
    "of component 1, which its file is not of": lambda m: setattr(m.tensors[0], "component", 1),
    "a digest of 31 bytes": lambda m: setattr(m.tensors[0], "digest", bytes(31)),
    "unknown dtype 'X8'": lambda m: setattr(m.tensors[0], "dtype", "X8"),
    "its shape and dtype 140": lambda m: setattr(m.tensors[0], "size_bytes", 139),
    "reaches beyond": lambda m: setattr(m.tensors[2], "offset", m.files[1].size_bytes - 139),
    "reaches beyond: far": lambda m: setattr(m.tensors[2], "offset", (1 << 64) - 1),
    "overlaps the tensor before": lambda m: setattr(m.tensors[1], "offset", m.tensors[1].offset - 1),
    "overlaps the tensor before: order": lambda m: m.tensors.sort(key=lambda tensor: tensor.name, reverse=True),
    "buckets where its files need: missing": lambda m: m.buckets.pop(),
    "buckets where its files need: more": lambda m: m.buckets.add(file=2),
    "buckets where its files need: huge": lambda m: setattr(m.files[2], "size_bytes", 1 << 63),
    "that were due: offset": lambda m: setattr(m.buckets[0], "offset", 1),
    "that were due: size": lambda m: setattr(m.buckets[0], "size_bytes", m.buckets[0].size_bytes + 1),
    "that were due: file": lambda m: setattr(m.buckets[0], "file", 1),
    "that were due: order": lambda m: m.buckets.sort(key=lambda bucket: bucket.file, reverse=True),
    "has a digest of 0 bytes": lambda m: setattr(m.buckets[0], "digest", b""),
}


def test_the_manifest_of_a_real_folder_passes(good: Manifest) -> None:
    check_manifest(good)


@pytest.mark.parametrize("problem", SPOIL)
def test_a_spoiled_manifest_is_refused(good: Manifest, problem: str) -> None:
    manifest = Manifest()
    manifest.CopyFrom(good)
    SPOIL[problem](manifest)
    assert manifest != good
    with pytest.raises(BadImage) as caught:
        check_manifest(manifest)
    expected = problem.partition(":")[0]
    if expected == "buckets where its files need":
        assert "buckets where its files need" in str(caught.value)
    else:
        assert expected in str(caught.value)


def test_gaps_between_tensors_are_allowed_to_a_manifest_for_digests_cover_them_all_the_same(tmp_path: Path) -> None:
    folder = make_sharded_folder(tmp_path / "model")
    manifest = build_manifest(folder, bucket_bytes=1024).manifest
    del manifest.tensors[0]
    check_manifest(manifest)
