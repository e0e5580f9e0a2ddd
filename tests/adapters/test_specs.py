"""What does not fit is refused in words that an operator can act on: the tensor, and what differs."""

from collections.abc import Mapping

import pytest

pytest.importorskip("torch")

from hotweights.adapters.mapped import Mismatch, TensorSpec, check_specs

SERVED = {name: TensorSpec("BF16", (32, 64)) for name in ("a.weight", "b.weight", "c.weight")}
OTHER = TensorSpec("BF16", (32, 65))


def without(*names: str) -> dict[str, TensorSpec]:
    return {name: spec for name, spec in SERVED.items() if name not in names}


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (without("b.weight"), "1 tensor of the model is not in the image, first b.weight BF16[32, 64]"),
        (without("c.weight", "b.weight"), "2 tensors of the model are not in the image, first b.weight BF16[32, 64]"),
        ({**SERVED, "d": OTHER}, "1 tensor of the image is not in the model, first d BF16[32, 65]"),
        (
            {**SERVED, "b.weight": OTHER},
            "1 tensor is of another shape or dtype, first b.weight in shape: "
            "BF16[32, 65] in the image, BF16[32, 64] in the model",
        ),
        (
            {**SERVED, "c.weight": OTHER, "b.weight": TensorSpec("F16", (32, 64))},
            "2 tensors are of another shape or dtype, first b.weight in dtype: "
            "F16[32, 64] in the image, BF16[32, 64] in the model",
        ),
    ],
    ids=["missing", "two missing", "extra", "shape", "dtype"],
)
def test_the_refusal_names_the_tensor_and_what_differs(image: Mapping[str, TensorSpec], says: str) -> None:
    with pytest.raises(Mismatch) as refusal:
        check_specs(image, SERVED)
    assert str(refusal.value) == says


def test_the_same_tensors_in_another_order_fit() -> None:
    check_specs(dict(reversed(SERVED.items())), SERVED)
