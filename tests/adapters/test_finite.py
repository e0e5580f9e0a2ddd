"""NaN and infinities are found wherever they hide, and named."""

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import save_file  # noqa: E402

from hotweights.adapters import finite  # noqa: E402
from hotweights.adapters.finite import NotFinite, check_finite, has_nonfinite, nonfinite_count  # noqa: E402
from hotweights.adapters.mapped import MappedImage  # noqa: E402

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
NAN, INF = float("nan"), float("inf")
# e4m3fn has no infinity.
KINDS = [(dtype, bad) for dtype in FLOATS for bad in (NAN, INF, -INF) if dtype is not FLOATS[4] or bad is NAN]


def largest(dtype: Any) -> float:
    return float(torch.finfo(dtype).max)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_greatest_and_least_numbers_of_a_type_are_finite(dtype: Any) -> None:
    values = torch.tensor([0.0, -0.0, largest(dtype), -largest(dtype)], dtype=torch.float64).to(dtype)
    assert nonfinite_count(values) == 0
    assert not has_nonfinite(values)


@pytest.mark.parametrize(("dtype", "bad"), KINDS, ids=str)
@pytest.mark.parametrize("at", [0, 511, 512, 999], ids=["first", "chunk's end", "next chunk", "last"])
def test_one_value_is_found_wherever_it_is(dtype: Any, bad: float, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finite, "CHUNK_BYTES", 512 * dtype.itemsize)
    values = torch.ones(1000)
    values[at] = bad
    values = values.to(dtype).reshape(10, 100)
    assert nonfinite_count(values) == 1
    assert has_nonfinite(values)


def test_types_without_such_values_are_passed_by() -> None:
    for dtype in (torch.int64, torch.int8, torch.uint8, torch.bool):
        assert nonfinite_count(torch.full((64,), 127).to(dtype)) == 0
    assert nonfinite_count(torch.empty(0, 3)) == 0


def test_an_image_is_refused_by_tensor_and_count(tmp_path: Path) -> None:
    tensors = {f"layer.{n}.weight": torch.ones(8, 8, dtype=torch.bfloat16) for n in range(8)}
    tensors["layer.3.weight"][0, 5] = NAN
    tensors["layer.3.weight"][7] = INF
    save_file(tensors, tmp_path / "model.safetensors")
    image = MappedImage(tmp_path, {})
    with pytest.raises(NotFinite, match=r"infinite in 1 tensors: layer\.3\.weight has 9 of 64$"):
        check_finite(image)
    assert image.close()


def test_many_tensors_are_counted_and_some_of_them_named(tmp_path: Path) -> None:
    tensors = [(f"t{n}", torch.full((2,), NAN)) for n in range(9)]
    with pytest.raises(NotFinite, match=r"in 9 tensors: t0 has 2 of 2, .*t4 has 2 of 2, and 4 more tensors$"):
        check_finite(tensors)
