"""Errors at the edge: what the rules declined and the store refused, as rich gRPC statuses."""

import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn, TypeVar

import grpc

from hotweights.coordinator.rules import Declined
from hotweights.wire.errors import Refused, to_metadata

T = TypeVar("T")
Context = grpc.aio.ServicerContext[Any, Any]


async def abort(context: Context, error: Declined | Refused) -> NoReturn:
    """Ends the call with the error's status and its ErrorInfo."""
    if isinstance(error, Declined):
        code = grpc.StatusCode[error.kind]
        error = Refused(code, error.reason, error.message, **dict(error.fields))
    await context.abort(error.code, error.message, to_metadata(error))
    raise AssertionError("abort returned")


def unary(
    method: Callable[[Any, Any, Context], Awaitable[T]],
) -> Callable[[Any, Any, Context], Awaitable[T]]:
    """A method whose Declined and Refused become statuses."""

    @functools.wraps(method)
    async def guarded(self: Any, request: Any, context: Context) -> T:
        try:
            return await method(self, request, context)
        except (Declined, Refused) as error:
            await abort(context, error)

    return guarded


def streaming(
    method: Callable[[Any, Any, Context], AsyncIterator[T]],
) -> Callable[[Any, Any, Context], AsyncIterator[T]]:
    """The same for a method that streams its answer."""

    @functools.wraps(method)
    async def guarded(self: Any, request: Any, context: Context) -> AsyncIterator[T]:
        try:
            async for message in method(self, request, context):
                yield message
        except (Declined, Refused) as error:
            await abort(context, error)

    return guarded
