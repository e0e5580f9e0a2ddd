"""Which shapes of engines are left alone, and the one line about each."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from hotweights.adapters.vllm_shapes import no_front_end, unsupported


def a_front_end(*, cores: int | None = 1, moe: bool = False, kv: Any = None, ec: Any = None, **parallel: Any) -> Any:
    config = {
        "nnodes": 1,
        "data_parallel_size": 1,
        "data_parallel_size_local": parallel.get("data_parallel_size", 1),
        "distributed_executor_backend": "mp",
        "data_parallel_backend": "mp",
        **parallel,
    }
    client = SimpleNamespace() if cores is None else SimpleNamespace(core_engines=[b""] * cores)
    vllm_config = SimpleNamespace(
        parallel_config=SimpleNamespace(**config),
        model_config=SimpleNamespace(is_moe=moe),
        kv_transfer_config=kv,
        ec_transfer_config=ec,
    )
    return SimpleNamespace(vllm_config=vllm_config, engine_core=client)


def connector(name: str | None, *behind: str) -> Any:
    extra = {"connectors": [{"kv_connector": one} for one in behind]}
    return SimpleNamespace(kv_connector=name, kv_connector_extra_config=extra)


@pytest.mark.parametrize(
    ("front_end", "says"),
    [
        (a_front_end(), ""),
        (a_front_end(cores=2, data_parallel_size=2), ""),
        (a_front_end(cores=None), "VLLM_ENABLE_V1_MULTIPROCESSING=0"),
        (a_front_end(nnodes=2), "2 nodes"),
        (a_front_end(distributed_executor_backend="ray"), "Ray"),
        (a_front_end(cores=2, data_parallel_size=2, data_parallel_backend="ray"), "Ray"),
        (a_front_end(cores=1, data_parallel_size=2), "load balancer"),
        (a_front_end(cores=4, data_parallel_size=4, data_parallel_size_local=2), "2 of its data parallel engines"),
        (a_front_end(cores=2, data_parallel_size=2, moe=True), "expert model"),
        (a_front_end(moe=True), ""),
        (a_front_end(kv=connector(None)), ""),
        (a_front_end(kv=connector("OffloadingConnector")), ""),
        (a_front_end(kv=connector("LMCacheConnectorV1")), "KV connector LMCacheConnectorV1"),
        (a_front_end(kv=connector("MultiConnector", "NixlConnector", "OffloadingConnector")), ""),
        (a_front_end(kv=connector("MultiConnector", "NixlConnector", "Mine")), "KV connector Mine"),
        (a_front_end(ec=SimpleNamespace(ec_connector="ECExampleConnector")), "encoder cache connector"),
    ],
)
def test_shapes_that_are_not_supported_are_named(front_end: Any, says: str) -> None:
    answer = unsupported(front_end)
    assert says in answer
    assert bool(answer) == bool(says)
    assert "\n" not in answer


def test_a_server_without_a_front_end_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vllm")
    assert no_front_end() == ""
    monkeypatch.setattr(sys, "argv", ["vllm", "serve", "m", "--headless"])
    assert "--headless" in no_front_end()
