"""Of what kind a rank is: the same wherever its checkpoint lies, another where what is installed would differ."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hotweights.adapters import kind as kind_module
from hotweights.adapters import vllm_worker
from hotweights.adapters.kind import cpu, digest, kind, without_folder

CONFIG = {"_name_or_path": "/a/v1", "transformers_version": "5.0", "hidden_size": 8, "text_config": {"layers": 2}}


@pytest.fixture(autouse=True)
def a_vllm(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    module = SimpleNamespace(__version__="0.32.0")
    monkeypatch.setitem(sys.modules, "vllm", module)
    return module


def a_worker(
    *, config: dict[str, Any] | None = None, dtype: Any = torch.bfloat16, quantization: str | None = None, **more: Any
) -> Any:
    parallel = {
        **{"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "data_parallel_size": 1},
        "enable_expert_parallel": False,
        **{name: value for name, value in more.items() if name not in ("module", "device")},
    }
    hf_config = SimpleNamespace(to_dict=lambda: config or CONFIG)
    model = SimpleNamespace(hf_config=hf_config, dtype=dtype, quantization=quantization)
    module = more.get("module") or torch.nn.Linear(4, 2)
    return SimpleNamespace(
        vllm_config=SimpleNamespace(model_config=model, parallel_config=SimpleNamespace(**parallel)),
        model_config=model,
        device=more.get("device", torch.device("cpu")),
        model_runner=SimpleNamespace(get_model=lambda: module),
        rank=0,
    )


def test_it_is_short_and_the_same_again_whatever_the_weights_are() -> None:
    assert len(kind(a_worker())) == 16
    assert kind(a_worker()) == kind(a_worker())


def test_where_the_checkpoint_lies_and_who_saved_it_are_left_out() -> None:
    moved = {**CONFIG, "_name_or_path": "/b/v2", "transformers_version": "4.9", "name_or_path": "x"}
    assert kind(a_worker(config=moved)) == kind(a_worker())
    inside = {"text_config": {"_name_or_path": "/a", "layers": 2}, "parts": [{"_name_or_path": "/b", "n": 1}]}
    assert without_folder(inside) == {"text_config": {"layers": 2}, "parts": [{"n": 1}]}


OTHERS: dict[str, Callable[[], Any]] = {
    "a config": lambda: a_worker(config={**CONFIG, "hidden_size": 9}),
    "a config inside": lambda: a_worker(config={**CONFIG, "text_config": {"layers": 3}}),
    "a dtype": lambda: a_worker(dtype=torch.float32),
    "a quantization": lambda: a_worker(quantization="fp8"),
    "tensor parallel": lambda: a_worker(tensor_parallel_size=2),
    "pipeline parallel": lambda: a_worker(pipeline_parallel_size=2),
    "data parallel": lambda: a_worker(data_parallel_size=2),
    "expert parallel": lambda: a_worker(enable_expert_parallel=True),
    "a device": lambda: a_worker(device=torch.device("meta")),
    "a shape": lambda: a_worker(module=torch.nn.Linear(4, 3)),
    "a tensor's type": lambda: a_worker(module=torch.nn.Linear(4, 2).double()),
    "a name": lambda: a_worker(module=torch.nn.Sequential(torch.nn.Linear(4, 2))),
}


@pytest.mark.parametrize("what", OTHERS)
def test_it_is_another_with_another(what: str) -> None:
    assert kind(OTHERS[what]()) != kind(a_worker())


def test_it_is_another_with_another_vllm(a_vllm: SimpleNamespace) -> None:
    before = kind(a_worker())
    a_vllm.__version__ = "0.33.0"
    assert kind(a_worker()) != before


def test_it_is_another_on_another_processor_and_with_other_threads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kinds = set()
    for name, text, threads in (
        ("none", "", 1),
        ("one", "model name\t: One\nflags\t\t: avx2\n", 1),
        ("other", "model name\t: Other\nflags\t\t: avx2\n", 1),
        ("newer", "model name\t: One\nflags\t\t: avx2 avx512f\n", 1),
        ("wider", "model name\t: One\nflags\t\t: avx2\n", 2),
    ):
        (tmp_path / name).write_text(text)
        monkeypatch.setattr(kind_module, "_CPUINFO", tmp_path / name)
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        kinds.add(kind(a_worker()))
    assert len(kinds) == 5


def test_of_a_processor_only_what_lasts_counts(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text(
        "processor\t: 0\nmodel name\t: One\ncpu MHz\t\t: 2445.4\nflags\t\t: b a\n\nprocessor\t: 1\nflags\t\t: c\n"
    )
    assert cpu(info) == ["flags\t\t: b a", "model name\t: One"]
    assert cpu(tmp_path / "not there") == []


def test_of_a_cuda_device_its_name_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"name of {device}")
    assert kind_module.device(torch.device("cuda", 1)) == ["cuda", "name of cuda:1"]


def test_ranks_whose_experts_move_have_none() -> None:
    assert kind(a_worker(enable_eplb=True)) == ""


def test_facts_in_any_order_and_of_any_type_have_one_digest() -> None:
    assert digest({"a": 1, "b": torch.float16}) == digest({"b": torch.float16, "a": 1})
    assert digest({"a": 1}) != digest({"a": "1"})


def test_identify_says_it() -> None:
    worker = a_worker()
    answer = vllm_worker.METHODS["hotweights_identify"](worker, "call")
    assert (answer["ok"], answer["kind"]) == (True, kind(worker))
    json.dumps(answer)  # plain data
