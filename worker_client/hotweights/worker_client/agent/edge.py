"""Where errors become gRPC statuses: one place, so that nothing inside raises or catches for the wire's sake."""

import contextlib
from collections.abc import AsyncIterator

import grpc

from hotweights.wire.errors import Refused, Unreachable, to_metadata
from hotweights.worker_client.agent.work import OutOfTime
from hotweights.worker_client.image.errors import BadImage, FolderChanged, ImageError


def as_refusal(error: Exception) -> Refused:
    """What the caller is told. Each reason is a word that programs may rely on."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, FolderChanged):
        return Refused(
            grpc.StatusCode.FAILED_PRECONDITION,
            "FOLDER_CHANGED",
            str(error),
            folder=str(error.folder),
            file=error.file,
        )
    if isinstance(error, BadImage):
        fields = {"file": error.file, "tensor": error.tensor, "problem": error.problem}
        return Refused(grpc.StatusCode.INVALID_ARGUMENT, "BAD_IMAGE", str(error), **fields)
    if isinstance(error, OutOfTime):
        return Refused(grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE", "it took longer than allowed")
    if isinstance(error, Unreachable):
        return Refused(grpc.StatusCode.UNAVAILABLE, "COORDINATOR_UNREACHABLE", str(error))
    if isinstance(error, FileNotFoundError):
        return Refused(grpc.StatusCode.NOT_FOUND, "NO_SUCH_FILE", str(error))
    if isinstance(error, PermissionError):
        return Refused(grpc.StatusCode.PERMISSION_DENIED, "NOT_READABLE", str(error))
    return Refused(grpc.StatusCode.INTERNAL, "AGENT_FAILED", f"{type(error).__name__}: {error}")


# What may go wrong outside this process; anything else is a bug, and gRPC shows it as UNKNOWN with a traceback here.
EXPECTED = (Refused, Unreachable, OutOfTime, ImageError, OSError)


@contextlib.asynccontextmanager
async def statuses(context: "grpc.aio.ServicerContext[object, object]") -> AsyncIterator[None]:
    """Ends the call with a rich status if what is inside fails in a way that is no bug."""
    try:
        yield
    except EXPECTED as error:
        refusal = as_refusal(error)
        await context.abort(refusal.code, refusal.message, to_metadata(refusal))
