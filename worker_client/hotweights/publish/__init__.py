"""The publisher's library: checkpoint folders and live modules, handed to the node's agent.

    from hotweights.publish import publish_folder, publish_module, wait_copies

Nothing is imported before it is asked for; `await` the `_async` ones where a loop runs.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hotweights.publish.copies import wait_copies, wait_copies_async
    from hotweights.publish.folder import publish_folder, publish_folder_async
    from hotweights.publish.module import publish_module, publish_module_async, write_module

__all__ = [
    "publish_folder",
    "publish_folder_async",
    "publish_module",
    "publish_module_async",
    "wait_copies",
    "wait_copies_async",
    "write_module",
]

_HOMES = {
    "publish_folder": "folder",
    "publish_folder_async": "folder",
    "publish_module": "module",
    "publish_module_async": "module",
    "wait_copies": "copies",
    "wait_copies_async": "copies",
    "write_module": "module",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
