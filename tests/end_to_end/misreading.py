"""A user's own worker extension in the server: reads a value of a version wrong, as broken memory does."""

from typing import Any

from failpoints_by_http import FailpointsByHttp


class Misreading(FailpointsByHttp):
    """Beside the plugin's `hotweights_*` methods: one of its own."""

    def misread(self, digest: str, tensor: str) -> dict[str, Any]:
        """From now on, in this process, the first value of a tensor of the image `digest`; of none where it is ""."""
        from hotweights.adapters.mapped import MappedImage

        if not hasattr(MappedImage, "right"):
            MappedImage.right = MappedImage.__init__  # type: ignore[attr-defined]

        def wrong(image: MappedImage, folder: Any, *arguments: Any, **options: Any) -> None:
            MappedImage.right(image, folder, *arguments, **options)  # type: ignore[attr-defined]
            if folder.name == digest:
                image.tensors[tensor].view(-1)[0] += 1  # the mapping is private: the staged image stays as it is

        MappedImage.__init__ = wrong  # type: ignore[method-assign,assignment]
        return {}
