"""How messages become text and JSON."""

from google.protobuf.timestamp_pb2 import Timestamp

from hotweights.cli.output import as_plain, counted, moment, one_line, size, word, written
from hotweights.cli.status import route_tables
from hotweights.v1 import fleet_pb2, model_pb2, update_pb2


def test_json_has_digests_in_hex_big_numbers_as_numbers_and_enums_by_name() -> None:
    version = model_pb2.Version(
        name="7", sequence=7, manifest_digest=b"\xab\xcd", image_bytes=1 << 40, state=model_pb2.VERSION_STATE_AVAILABLE
    )
    shown = as_plain(version)
    assert (shown["name"], shown["sequence"], shown["image_bytes"]) == ("7", 7, 1 << 40)
    assert shown["manifest_digest"] == "abcd"
    assert shown["state"] == "VERSION_STATE_AVAILABLE"
    assert shown["holder_node_ids"] == []


def test_json_reaches_into_lists_and_messages() -> None:
    replica = fleet_pb2.Replica(fingerprints=[b"\x01", b"\xff"])
    replica.last_window.apply_ms = 2.5
    shown = as_plain(replica)
    assert shown["fingerprints"] == ["01", "ff"]
    assert shown["last_window"]["apply_ms"] == 2.5
    assert "last_window" not in as_plain(fleet_pb2.Replica())


def test_text_of_others_is_one_line_and_steers_no_terminal() -> None:
    assert one_line("two\nlines\x1b[31m and\ttabs\u202e") == "two lines [31m and tabs "


def test_enums_are_words_and_values_of_a_newer_coordinator_are_numbers() -> None:
    assert word(update_pb2.UpdatePhase, update_pb2.UPDATE_PHASE_ROLLED_BACK) == "rolled back"
    assert word(fleet_pb2.EventKind, fleet_pb2.EVENT_KIND_NODE_STAGED) == "node staged"
    assert word(update_pb2.UpdatePhase, 99) == "99"


def test_sizes_counts_and_times_read_well() -> None:
    assert (size(0), size(999), size(16_570), size(98_000_000)) == ("0 B", "999 B", "16.6 kB", "98.0 MB")
    assert (counted(1, "node"), counted(2, "node")) == ("1 node", "2 nodes")
    assert moment(Timestamp()) == "-"


def test_routes_are_one_line_of_those_there_are() -> None:
    routes = fleet_pb2.Routes(direct_modules=1, direct_bytes=999, assembled_modules=30, assembled_bytes=2_000_000)
    assert written(routes) == "direct 1 module 999 B · assembled 30 modules 2.0 MB"
    routes = fleet_pb2.Routes(reload_modules=7, reload_bytes=1_500, reasons=["a: repacked", "b: tied"])
    assert written(routes) == "reload 7 modules 1.5 kB (a: repacked; b: tied)"
    routes = fleet_pb2.Routes(
        direct_modules=1, direct_bytes=999, sources=["cuda-ipc: 1 MiB of GPU-1", "host memory: no"]
    )
    assert written(routes) == "direct 1 module 999 B; from cuda-ipc: 1 MiB of GPU-1; host memory: no"


def test_routes_are_shown_of_replicas_that_said_them() -> None:
    silent = fleet_pb2.Replica(id="r1")
    assert list(route_tables([silent])) == []
    says = fleet_pb2.Replica(id="r2", routes=fleet_pb2.Routes(direct_modules=2, direct_bytes=5, reasons=["x\x1b[31m"]))
    (table,) = route_tables([silent, says])
    assert table.rows == [("r2", "direct 2 modules 5 B (x [31m)")]
