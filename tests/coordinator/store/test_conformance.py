"""What every store does: one suite over all of them."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from hotweights.coordinator.store import Batch, Compacted, Store, open_store

EVENTS_MAX = 5


@pytest.fixture(params=["memory:", "sqlite:PATH"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    opened = open_store(request.param.replace("PATH", str(tmp_path / "deep" / "er" / "s.db")), EVENTS_MAX)
    await opened.open()
    yield opened
    await opened.close()


async def records(store: Store) -> dict[str, bytes]:
    """What a new leader would find."""
    if store.name == "memory:":
        return dict((await store.open()).records)
    await store.close()
    again = open_store(store.name, EVENTS_MAX)
    found = dict((await again.open()).records)
    await again.close()
    return found


async def test_a_new_store_is_empty(tmp_path: Path) -> None:
    for spec in ("memory:", f"sqlite:{tmp_path / 'new.db'}"):
        store = open_store(spec, EVENTS_MAX)
        opened = await store.open()
        assert (opened.records, opened.last_revision, opened.epoch) == ({}, 0, 1)
        assert len(opened.cluster_id) == 36
        assert await store.events_from(1, 10) == []
        await store.close()


async def test_a_batch_is_written_as_a_whole(store: Store) -> None:
    await store.write(Batch(puts={"model a": b"1", "model b": b"2"}, events=[(1, b"one")], manifests={"ab": b"m"}))
    await store.write(Batch(puts={"model a": b"3"}, deletes={"model b"}, events=[(2, b"two"), (3, b"three")]))
    assert await store.events_from(1, 10) == [(1, b"one"), (2, b"two"), (3, b"three")]
    assert await store.manifest("ab") == b"m"
    assert await records(store) == {"model a": b"3"}


async def test_deleting_what_is_not_there_is_nothing(store: Store) -> None:
    await store.write(Batch(deletes={"model x"}, manifest_deletes={"ff"}))
    assert await records(store) == {}


async def test_events_are_read_from_a_revision_on_and_up_to_a_limit(store: Store) -> None:
    await store.write(Batch(events=[(i, str(i).encode()) for i in range(1, 6)]))
    assert await store.events_from(3, 2) == [(3, b"3"), (4, b"4")]
    assert await store.events_from(5, 100) == [(5, b"5")]
    assert await store.events_from(6, 100) == []
    assert await store.events_from(60, 100) == []


async def test_events_beyond_those_kept_are_compacted_and_the_first_is_named(store: Store) -> None:
    for i in range(1, 8):
        await store.write(Batch(events=[(i, b"e")]))
    with pytest.raises(Compacted) as caught:
        await store.events_from(2, 10)
    assert caught.value.first == 3
    assert "3" in str(caught.value)
    assert [at for at, _ in await store.events_from(3, 10)] == [3, 4, 5, 6, 7]


async def test_a_batch_larger_than_the_log_keeps_its_newest(store: Store) -> None:
    await store.write(Batch(events=[(i, b"e") for i in range(1, 21)]))
    with pytest.raises(Compacted) as caught:
        await store.events_from(1, 10)
    assert caught.value.first == 16


async def test_answers_are_kept_until_they_expire(store: Store) -> None:
    await store.write(Batch(answers={"a": (100.0, b"yes"), "empty": (100.0, b"")}))
    assert await store.answer("a", 99.0) == b"yes"
    assert await store.answer("empty", 99.0) == b""
    assert await store.answer("a", 100.0) is None
    assert await store.answer("b", 0.0) is None


async def test_manifests_come_and_go(store: Store) -> None:
    blob = bytes(range(256)) * 20_000
    await store.write(Batch(manifests={"aa": blob, "bb": b"x"}))
    assert await store.manifest("aa") == blob
    await store.write(Batch(manifest_deletes={"aa"}))
    assert await store.manifest("aa") is None
    assert await store.manifest("bb") == b"x"
    assert await store.manifest("") is None


def test_an_empty_batch_is_false_and_any_part_makes_it_true() -> None:
    assert not Batch()
    assert Batch(puts={"a": b""})
    assert Batch(deletes={"a"})
    assert Batch(events=[(1, b"")])
    assert Batch(answers={"a": (0.0, b"")})
    assert Batch(manifests={"a": b""})
    assert Batch(manifest_deletes={"a"})


async def test_the_epoch_rises_with_each_opening_and_the_cluster_stays(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    seen = []
    for _ in range(3):
        store = open_store(f"sqlite:{path}", EVENTS_MAX)
        seen.append(await store.open())
        await store.close()
    assert [opened.epoch for opened in seen] == [1, 2, 3]
    assert len({opened.cluster_id for opened in seen}) == 1
    memory = open_store("memory:", EVENTS_MAX)
    assert [(await memory.open()).epoch for _ in range(3)] == [1, 2, 3]


@pytest.mark.parametrize("spec", ["", "memory", "sqlite", "sqlite:", "memory:x", "redis:x", "/some/path"])
def test_what_names_no_store_is_refused(spec: str) -> None:
    with pytest.raises(ValueError, match="write sqlite:PATH or memory:"):
        open_store(spec, 1)
