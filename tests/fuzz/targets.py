"""All fuzz targets by name."""

from tests.fuzz import connections, images, requests, texts

TARGETS = {**texts.TARGETS, **images.TARGETS, **connections.TARGETS, **requests.TARGETS}


def tidy() -> None:
    """Closes and removes what targets opened and wrote."""
    connections.leave()
    requests.leave()
    images.forget_files()
