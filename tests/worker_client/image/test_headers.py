"""Headers that are right, and every way in which one can be wrong."""

from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from tests.worker_client.image.files import entry, make_folder, write_raw

from hotweights.worker_client.image.errors import BadImage
from hotweights.worker_client.image.headers import DTYPE_BITS, HEADER_BYTES_MAX, read_header, tensor_bytes


def test_the_spans_of_a_real_file_hold_the_bytes_that_safetensors_loads(tmp_path: Path) -> None:
    path = make_folder(tmp_path / "model") / "model.safetensors"
    header = read_header(path)
    raw = path.read_bytes()
    with safe_open(path, framework="np") as reference:
        assert {span.name for span in header.tensors} == set(reference.keys())
        for span in header.tensors:
            tensor: np.ndarray = reference.get_tensor(span.name)
            assert span.shape == tensor.shape
            assert raw[span.offset : span.offset + span.size_bytes] == tensor.tobytes()
    assert header.size_bytes == len(raw)
    assert [span.offset for span in header.tensors] == sorted(span.offset for span in header.tensors)


def test_a_header_padded_with_spaces_is_read(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "x.safetensors", b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}     ', b"hi")
    assert [span.name for span in read_header(path).tensors] == ["a"]


@pytest.mark.parametrize(("dtype", "count", "size"), [("F4", 2, 1), ("F6_E2M3", 4, 3), ("BF16", 3, 6), ("C64", 1, 8)])
def test_sizes_count_in_bits(dtype: str, count: int, size: int) -> None:
    assert tensor_bytes(dtype, [count]) == size
    assert tensor_bytes(dtype, [0, count]) == 0


def test_the_dtypes_are_those_that_the_installed_safetensors_knows(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "x.safetensors", {"a": entry("NONE", [1], 0, 1)}, b"1")
    with pytest.raises(Exception, match="unknown variant") as caught, safe_open(path, framework="np"):
        pass
    known = {word for word in str(caught.value).split("`") if word.replace("_", "").isalnum()} - {"NONE"}
    assert known == set(DTYPE_BITS)


GOOD = {"a": entry("F32", [2], 0, 8), "b": entry("U8", [4], 8, 12)}

BAD = [
    ("overlaps tensor 'a' by 4", "b", {**GOOD, "b": entry("U8", [8], 4, 12)}, 12),
    ("a gap of 2 bytes", "b", {**GOOD, "b": entry("U8", [2], 10, 12)}, 12),
    ("a gap of 4 bytes", "a", {"a": entry("F32", [2], 4, 12)}, 12),
    ("truncated: the file lacks 1 of its bytes", "b", GOOD, 11),
    ("1 bytes behind it belong to no tensor", "b", GOOD, 13),
    ("unknown dtype 'F33'", "a", {"a": entry("F33", [2], 0, 8)}, 8),
    ("needs 12 bytes, its offsets span 8", "a", {"a": entry("F32", [3], 0, 8)}, 8),
    ("does not end at a whole byte", "a", {"a": entry("F4", [3], 0, 2)}, 2),
    ("end (0) before they begin (8)", "a", {"a": entry("F32", [2], 8, 0)}, 8),
    ("65 dimensions", "a", {"a": entry("F32", [1] * 65, 0, 4)}, 4),
    ("shape [-1] is not", "a", {"a": entry("F32", [-1], 0, 4)}, 4),
    ("shape [True] is not", "a", {"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, 4),
    ("shape None is not", "a", {"a": {"dtype": "F32", "data_offsets": [0, 4]}}, 4),
    ("data_offsets [0] are not", "a", {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, 4),
    ("has no dtype", "a", {"a": {"shape": [1], "data_offsets": [0, 4]}}, 4),
    ("is not a JSON object", "a", {"a": 7}, 4),
    ("without a name", "", {"": entry("U8", [1], 0, 1)}, 1),
    ("its name is not Unicode", "\\ud800", {"\ud800": entry("U8", [1], 0, 1)}, 1),
    ("is not a list of sizes", "a", {"a": entry("F32", [0, 1 << 70], 0, 0)}, 0),
    ("is not a list of sizes", "a", {"a": entry("F32", [0, 1 << 64], 0, 0)}, 0),
    ("is larger than 64 bits count", "a", {"a": entry("U8", [1 << 63, 4, 0], 0, 0)}, 0),
    ("data_offsets", "a", {"a": entry("U8", [0], 1 << 64, 1 << 64)}, 0),
    ("__metadata__", "", {"__metadata__": {"format": "\udfff"}, **GOOD}, 12),
    ("__metadata__", "", {"__metadata__": {"\udfff": "pt"}, **GOOD}, 12),
    ("NaN is no number of JSON", "", b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"x":NaN}}', 1),
    ("__metadata__", "", {"__metadata__": {"format": 1}, **GOOD}, 12),
    (
        "twice",
        "a",
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}',
        2,
    ),
    ("header is not JSON", "", b'{"a":', 0),
    ("header is not JSON", "", b"[1, 2]", 0),
    ("header is not JSON", "", b'{"a":"\xff"}', 0),
    ("header is not JSON", "", b'{"a":' * 100_000, 0),
    ("header is not JSON", "", b"", 0),
]


@pytest.mark.parametrize(
    ("problem", "tensor", "header", "size"), BAD, ids=[f"{n} {b[0][:20]}" for n, b in enumerate(BAD)]
)
def test_a_bad_header_is_refused_in_one_line_that_names_file_and_tensor(
    tmp_path: Path, problem: str, tensor: str, header: object, size: int
) -> None:
    path = write_raw(tmp_path / "x.safetensors", header, bytes(size))
    with pytest.raises(BadImage) as caught:
        read_header(path)
    assert problem in caught.value.problem
    assert (caught.value.file, caught.value.tensor) == ("x.safetensors", tensor)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith("x.safetensors: ")
    assert repr(tensor) in text or not tensor


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "not even the header's length"),
        (b"\x08\0\0\0\0\0\0", "not even the header's length"),
        ((100).to_bytes(8, "little") + b"{}", "header of 100 bytes is larger than the file of 10"),
        ((HEADER_BYTES_MAX + 1).to_bytes(8, "little") + b"{}", "header too large"),
        (b"\xff" * 8, "header too large"),
    ],
)
def test_a_file_too_short_for_its_header_is_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(BadImage, match=problem):
        read_header(path)


def test_every_truncation_of_a_real_file_is_refused(tmp_path: Path) -> None:
    whole = (make_folder(tmp_path / "model") / "model.safetensors").read_bytes()
    path = tmp_path / "cut.safetensors"
    for length in [*range(0, 1000, 7), len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(BadImage):
            read_header(path)
