"""Who an engine is: its processes, and the kind of its ranks together."""

import pytest
from tests.worker_client.window.benches import Bench, running
from tests.worker_client.window.fakes import FakeEngine

from hotweights.worker_client.window.engine import Status
from hotweights.worker_client.window.identify import meet


def with_kinds(*kinds: str | None, backwards: bool = False) -> FakeEngine:
    """One rank for each; None is of a worker that says nothing of it."""
    engine = FakeEngine(ranks=len(kinds))

    async def identify(call: str) -> list[Status]:
        answers: list[Status] = [
            {"call": call, "rank": rank, "ok": True, "reason": "", "pid": 100 + rank, "started": 1, "device": "cpu"}
            for rank in range(len(kinds))
        ]
        for answer, kind in zip(answers, kinds, strict=True):
            if kind is not None:
                answer["kind"] = kind
        return answers[::-1] if backwards else answers

    engine.does["identify"] = identify
    return engine


async def kind_of(*kinds: str | None, backwards: bool = False) -> str:
    return (await meet(with_kinds(*kinds, backwards=backwards))).kind


async def test_the_kinds_of_the_ranks_make_one_in_the_order_of_the_ranks() -> None:
    kind = await kind_of("a", "b")
    assert len(kind) == 16
    assert kind == await kind_of("a", "b", backwards=True)
    assert len({kind, await kind_of("b", "a"), await kind_of("a"), await kind_of("ab"), await kind_of("a", "a")}) == 5


@pytest.mark.parametrize("kinds", [("a", ""), ("", "a"), ("a", None), (None, None), ("",)])
async def test_where_a_rank_has_no_kind_the_replica_has_none(kinds: tuple[str | None, ...]) -> None:
    assert await kind_of(*kinds) == ""


async def test_hello_says_the_kind() -> None:
    engine = with_kinds("a", "b")
    async with running(Bench(engine=engine)) as bench:
        assert bench.stream.hello is not None
        assert bench.stream.hello().replica.fingerprint_kind == (await meet(engine)).kind != ""


async def test_hello_of_an_engine_without_a_kind_says_none() -> None:
    async with running(Bench()) as bench:
        assert bench.stream.hello is not None
        assert bench.stream.hello().replica.fingerprint_kind == ""
