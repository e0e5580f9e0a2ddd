"""`verify`: what a folder is, and whether it is a version's image, bit for bit."""

import argparse
from typing import TYPE_CHECKING

from hotweights.cli.arguments import Subparsers, add_command, add_connection, add_model
from hotweights.cli.errors import CommandFailed

if TYPE_CHECKING:
    from pathlib import Path

    from hotweights.worker_client.image import Image


def add_commands(commands: "Subparsers[argparse.ArgumentParser]") -> None:
    parser = add_command(
        commands, "verify", verify, "Hash a checkpoint folder; compare it with a version when one is named."
    )
    parser.add_argument("source", metavar="DIR|MODEL_ID", help="a folder, or an id in the local Hugging Face cache")
    parser.add_argument("--version", metavar="NAME", help="compare with this version of the coordinator")
    parser.add_argument("--include-code", action="store_true", help="take *.py files along (without --version)")
    add_model(parser)
    add_connection(parser)


def verify(arguments: argparse.Namespace) -> int:
    """Hashes outside of any event loop, so that Ctrl-C ends it at once."""
    from hotweights.worker_client.image import ImageError

    try:
        return _verify(arguments)
    except ImageError as error:
        raise CommandFailed(str(error)) from error


def _verify(arguments: argparse.Namespace) -> int:
    import asyncio

    from hotweights.cli.config import client_settings
    from hotweights.worker_client.image import resolve_model

    settings = client_settings(arguments)
    folder = resolve_model(arguments.source, settings.hf_cache)
    if not arguments.version:
        if arguments.model:
            raise CommandFailed("--model goes with --version: which version is the folder to be?", exit_code=2)
        _show_image(_hash(folder, settings.bucket_bytes, arguments.include_code, arguments), arguments)
        return 0
    name, blob = asyncio.run(_published(arguments))
    return _compare(folder, name, blob, arguments)


async def _published(arguments: argparse.Namespace) -> tuple[str, bytes]:
    """A version's full name and its serialised manifest."""
    from hotweights.cli.client import chosen_model, connect
    from hotweights.v1 import coordinator_service_pb2 as pb

    async with connect(arguments) as coordinator:
        model = await chosen_model(coordinator, arguments)
        request = pb.GetVersionRequest(model=model, version=arguments.version)
        version = (await coordinator.ask(request, pb.GetVersionResponse)).version
        return f"{model} {version.name}", await coordinator.manifest(version.manifest_digest)


def _hash(folder: "Path", bucket_bytes: "int | None", include_code: bool, arguments: argparse.Namespace) -> "Image":
    from hotweights.cli.progress import Bar
    from hotweights.worker_client.image import build_manifest

    with Bar("hashing", wanted=not arguments.json) as bar:
        return build_manifest(folder, bucket_bytes=bucket_bytes, include_code=include_code, progress=bar.to)


def _facts(image: "Image") -> dict[str, object]:
    return {
        "folder": str(image.folder),
        "manifest_digest": image.digest.hex(),
        "image_bytes": image.size_bytes,
        "files": len(image.manifest.files),
        "tensors": len(image.manifest.tensors),
        "buckets": len(image.manifest.buckets),
        "bucket_bytes": image.manifest.bucket_bytes,
    }


def _show_image(image: "Image", arguments: argparse.Namespace) -> None:
    from hotweights.cli.output import counted, print_json, size

    if arguments.json:
        print_json(_facts(image))
        return
    manifest = image.manifest
    print(
        f"{image.folder}: sound, {size(image.size_bytes)} in {counted(len(manifest.files), 'file')}, "
        f"{counted(len(manifest.tensors), 'tensor')}, {counted(len(manifest.buckets), 'bucket')} of "
        f"{manifest.bucket_bytes} bytes"
    )
    print(f"digest {image.digest.hex()}")


def _compare(folder: "Path", name: str, blob: bytes, arguments: argparse.Namespace) -> int:
    """Against the published manifest itself: bucket size and files are the publisher's choice, not ours."""
    from hotweights.cli.output import one_line, print_json
    from hotweights.cli.progress import Bar
    from hotweights.worker_client.image import list_files, manifest_digest, parse_manifest, verify_folder

    manifest = parse_manifest(blob, allow_code=True)
    digest = manifest_digest(blob).hex()
    with Bar("verifying", wanted=not arguments.json) as bar:
        verified = verify_folder(folder, manifest, progress=bar.to)
    problems = [str(problem) for problem in verified.problems]
    published = {file.name for file in manifest.files}
    has_code = any(file.endswith(".py") for file in published)
    here = {file.name for file in list_files(folder, include_code=has_code)} if verified.ok else set()
    problems += [f"{file}: is not part of the version" for file in sorted(here - published)]
    if arguments.json:
        print_json({"folder": str(folder), "version": name, "manifest_digest": digest, "problems": problems})
    elif not problems:
        print(f"{folder}: is {name}, digest {digest}")
    else:
        for problem in problems:
            print(one_line(problem))
        raise CommandFailed(f"{folder} is not {name}: {len(problems)} of its parts differ")
    return 1 if problems else 0
