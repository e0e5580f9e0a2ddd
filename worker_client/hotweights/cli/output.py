"""How things look: JSON for programs, tables for people, plain columns when nobody's terminal is there."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

from google.protobuf.message import Message

if TYPE_CHECKING:
    from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper
    from google.protobuf.timestamp_pb2 import Timestamp

    from hotweights.v1 import fleet_pb2, update_pb2

NOTHING = "-"
# Where a terminal is too narrow, these columns wrap, and of these others as many go, in order, as must: names and
# states stay whole. Whoever wants all of it has --json, and plain columns where no terminal is.
_MAY_WRAP = {
    "ENGINE",
    "HOLDERS",
    "LAST PAUSE",
    "MEANING",
    "NAMES",
    "NOTE",
    "PAUSE",
    "REASON",
    "ROUTES",
    "SOURCES",
    "WHAT",
}
_MAY_GO = ("BUCKETS", "TENSORS", "RANKS", "DIGEST", "PUBLISHED", "ENGINE", "MEANING")
_WRAPPED_WIDTH = 20


def as_plain(message: Message) -> Any:
    """A message as JSON's types: names as in the protocol, bytes in hex, 64-bit numbers as numbers."""
    from google.protobuf.json_format import MessageToDict

    shown = MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    return _plain(message, shown)


def _plain(value: Any, shown: Any) -> Any:
    """Protobuf's own JSON beside the values it came from: base64 and numbers in quotes are put right."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(shown, dict):
        return {name: _plain(getattr(value, name), inner) for name, inner in shown.items()}
    if isinstance(shown, list):
        return [_plain(item, inner) for item, inner in zip(value, shown, strict=True)]
    is_number = isinstance(value, int) and isinstance(shown, str) and shown.removeprefix("-").isdigit()
    return int(shown) if is_number else shown


def print_json(value: Any) -> None:
    """One document, indented."""
    print(json.dumps(as_plain(value) if isinstance(value, Message) else value, indent=2), flush=True)


def print_json_line(value: Any) -> None:
    """One document on one line, for streams of them."""
    print(json.dumps(as_plain(value) if isinstance(value, Message) else value), flush=True)


@dataclass
class Table:
    """Rows under headings. A title of "" shows none."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    # What stands there when there are no rows.
    empty: str = "none"

    def add(self, *cells: object) -> None:
        self.rows.append(tuple(one_line(str(cell)) or NOTHING for cell in cells))


def print_tables(*tables: Table) -> None:
    """Rich on a terminal. Elsewhere plain columns as wide as they need to be: grep and awk want whole lines."""
    if sys.stdout.isatty():
        _print_rich(tables)
        return
    for number, table in enumerate(tables):
        if number:
            print()
        _print_plain(table)


def _print_plain(table: Table) -> None:
    if table.title:
        print(table.title)
    if not table.rows:
        print(f"  {table.empty}")
        return
    lines = [table.columns, *table.rows]
    widths = [max(len(line[at]) for line in lines) for at in range(len(table.columns))]
    for line in lines:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _print_rich(tables: Sequence[Table]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Column
    from rich.table import Table as RichTable
    from rich.text import Text

    console = Console()
    for table in tables:
        if table.title:
            console.print(Text(table.title, style="bold"))
        if not table.rows:
            console.print(Text(f"  {table.empty}\n", style="dim"))
            continue
        kept = _that_fit(table, console.width)
        names = [table.columns[at] for at in kept]
        columns = [Column(name, overflow="fold", no_wrap=name not in _MAY_WRAP) for name in names]
        shown = RichTable(*columns, box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for row in table.rows:
            # Text, not markup: what others sent must not draw on this terminal.
            shown.add_row(*(Text(row[at]) for at in kept))
        console.print(shown, "")


def _that_fit(table: Table, width: int) -> list[int]:
    """The columns to show on a terminal of this width: those that say nothing go first, then `_MAY_GO`."""
    lines = [table.columns, *table.rows]
    widths = [max(len(line[at]) for line in lines) for at in range(len(table.columns))]
    kept = list(range(len(table.columns)))
    silent = [at for at in kept if all(row[at] == NOTHING for row in table.rows)]
    expendable = silent + [table.columns.index(name) for name in _MAY_GO if name in table.columns]
    for at in expendable:
        needed = sum(3 + (min(widths[i], _WRAPPED_WIDTH) if table.columns[i] in _MAY_WRAP else widths[i]) for i in kept)
        if needed <= width:
            break
        if at in kept:
            kept.remove(at)
    return kept


def one_line(text: str) -> str:
    """Text of others on one line, without what would steer a terminal."""
    return "".join(c if c.isprintable() else " " for c in " ".join(text.split()))


def word(kind: "EnumTypeWrapper", value: int) -> str:
    """An enum's value for a person: UPDATE_PHASE_ROLLED_BACK is "rolled back"."""
    if value not in kind.values():
        return str(value)
    prefix = "".join(f"_{c}" if c.isupper() else c for c in kind.DESCRIPTOR.name).lstrip("_").upper() + "_"
    text: str = kind.Name(value)
    return text.removeprefix(prefix).replace("_", " ").lower()


def size(count: int) -> str:
    """Bytes for a person, in powers of ten as the events have them."""
    for unit, one in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= one:
            return f"{count / one:.1f} {unit}"
    return f"{count} B"


def counted(count: int, what: str) -> str:
    """ "1 replica", "2 replicas"."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def moment(at: "Timestamp") -> str:
    """Local time to the second; nothing for a time that is not set."""
    if not at.seconds:
        return NOTHING
    return datetime.fromtimestamp(at.seconds).isoformat(sep=" ")


def short(digest: bytes) -> str:
    """Enough of a digest to tell it from others."""
    return digest.hex()[:16]


def pause(window: "update_pb2.WindowTimes") -> str:
    """A window's pause, in its parts."""
    whole = window.quiesce_ms + window.apply_ms + window.resume_ms
    return (
        f"{whole:.1f} ms (quiesce {window.quiesce_ms:.1f}, apply {window.apply_ms:.1f}, resume {window.resume_ms:.1f})"
    )


def written(routes: "fleet_pb2.Routes") -> str:
    """By which routes a replica is written, why not all of it directly, and from whose GPU memory."""
    parts = (
        ("direct", routes.direct_modules, routes.direct_bytes),
        ("assembled", routes.assembled_modules, routes.assembled_bytes),
        ("reload", routes.reload_modules, routes.reload_bytes),
    )
    said = " · ".join(f"{route} {counted(modules, 'module')} {size(held)}" for route, modules, held in parts if modules)
    said = f"{said} ({'; '.join(routes.reasons)})" if routes.reasons else said
    return f"{said}; from {'; '.join(routes.sources)}" if routes.sources else said
