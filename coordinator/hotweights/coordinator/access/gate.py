"""The gate: one interceptor that every call passes, unary, streaming and bidirectional alike.

    no token, or an unknown one -> UNAUTHENTICATED      role too low -> PERMISSION_DENIED
    a token that is revoked before the request has come, or while a stream is open -> UNAUTHENTICATED

A token comes with the headers, and what it is to allow may come much later: it is looked at again then.

What is said to a stranger is constant text; who it was and what was asked for goes to the event log.
"""

import asyncio
import functools
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeAlias, TypeVar

import grpc

from hotweights.coordinator.access.refusals import Refusals
from hotweights.coordinator.access.roles import OPEN, allowed, named
from hotweights.coordinator.access.tokens import TOKEN_LENGTH_MAX, Caller, Tokens
from hotweights.coordinator.service.status import Context, abort
from hotweights.wire.errors import Refused

T = TypeVar("T")
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Details: TypeAlias = grpc.HandlerCallDetails

HEADER, SCHEME = "authorization", "bearer"

# Who makes the call that is being answered; each call is a task of its own.
_CALLER: ContextVar[Caller | None] = ContextVar("caller", default=None)


def token_missing() -> Refused:
    return Refused(
        grpc.StatusCode.UNAUTHENTICATED,
        "TOKEN_MISSING",
        "this coordinator wants a token: name the file that has yours with --token-file or HOTWEIGHTS_TOKEN_FILE",
    )


def token_unknown() -> Refused:
    return Refused(
        grpc.StatusCode.UNAUTHENTICATED,
        "TOKEN_UNKNOWN",
        "this coordinator does not know the token: it was replaced or revoked, or is another coordinator's; "
        "ask an operator for one and put it into your token file",
    )


def role_too_low(caller: Caller, method: str) -> Refused:
    needed = named(allowed(method))
    return Refused(
        grpc.StatusCode.PERMISSION_DENIED,
        "ROLE_TOO_LOW",
        f"{method.rpartition('/')[2]} takes a token of role {needed}; yours is a {caller.role.value}'s",
        role=caller.role.value,
        needed=needed,
        method=method,
    )


@dataclass(eq=False)
class _Call:
    """A call that was let in."""

    caller: Caller
    method: str
    revoked: asyncio.Event = field(default_factory=asyncio.Event)


class Gate(grpc.aio.ServerInterceptor):
    """Give it to the server, and call `look_again` when the tokens have changed."""

    def __init__(self, tokens: Tokens, refusals: Refusals) -> None:
        self._tokens = tokens
        self._refusals = refusals
        self._open: set[_Call] = set()

    async def intercept_service(
        self,
        continuation: "Callable[[Details], Awaitable[Handler | None]]",
        handler_call_details: Details,
    ) -> "Handler | None":
        handler, method = await continuation(handler_call_details), handler_call_details.method
        # No handler: gRPC answers UNIMPLEMENTED, and nothing is told that the proto files do not tell.
        if handler is None or method in OPEN:
            return handler
        try:
            caller = self._known(handler_call_details.invocation_metadata or ())
        except Refused as refusal:
            return self._refusing(refusal, None, method)
        if caller.role not in allowed(method):
            return self._refusing(role_too_low(caller, method), caller, method)
        _CALLER.set(caller)
        return self._until_revoked(handler, _Call(caller, method))

    def require(self, method: str, context: Context) -> None:
        """For a call that asks for something that another method would take. Raises Refused, noted as its refusal."""
        caller = _CALLER.get()
        assert caller is not None, "only calls that passed the gate come here"
        if not self._tokens.still(caller):
            refusal = token_unknown()
        elif caller.role not in allowed(method):
            refusal = role_too_low(caller, method)
        else:
            return
        self._refusals.note(context.peer(), caller, method, refusal.reason)
        raise refusal

    def look_again(self) -> None:
        """Ends the streams of tokens that are not what they were."""
        for call in self._open:
            if not self._tokens.still(call.caller):
                call.revoked.set()

    def _known(self, metadata: Iterable[tuple[str, str | bytes]]) -> Caller:
        """Whose token came with the call. Raises Refused."""
        values = [value for key, value in metadata if key == HEADER]
        if len(values) != 1 or not isinstance(values[0], str):
            raise token_missing()
        scheme, _, token = values[0].partition(" ")
        if scheme.lower() != SCHEME or not token.strip():
            raise token_missing()
        caller = self._tokens.find(token.strip().encode()) if len(token) <= 2 * TOKEN_LENGTH_MAX else None
        if caller is None:
            raise token_unknown()
        return caller

    def _refusing(self, refusal: Refused, caller: Caller | None, method: str) -> Handler:
        """A handler that answers with the refusal, having read nothing: it serves calls of every shape."""

        async def refuse(requests: AsyncIterator[bytes], context: Context) -> None:
            await self._refuse(refusal, caller, method, context)

        return grpc.stream_stream_rpc_method_handler(refuse)

    async def _refuse(self, refusal: Refused, caller: Caller | None, method: str, context: Context) -> NoReturn:
        self._refusals.note(context.peer(), caller, method, refusal.reason)
        await abort(context, refusal)

    def _until_revoked(self, handler: Handler, call: _Call) -> Handler:
        """The same handler, which does nothing more once the call's token is revoked."""
        asks = "stream" if handler.request_streaming else "unary"
        answers = "stream" if handler.response_streaming else "unary"
        inner = getattr(handler, f"{asks}_{answers}")
        if inspect.isasyncgenfunction(inner):
            outer: Callable[..., Any] = self._generator(inner, call)
        elif handler.response_streaming:
            outer = self._coroutine(inner, call)
        elif handler.request_streaming:
            outer = self._reader(inner, call)
        else:
            outer = self._single(inner, call)
        make = getattr(grpc, f"{asks}_{answers}_rpc_method_handler")
        made: Handler = make(outer, handler.request_deserializer, handler.response_serializer)
        return made

    def _single(self, inner: Callable[..., Awaitable[T]], call: _Call) -> Callable[..., Awaitable[T]]:
        """One request, one answer: what was begun with a good token is done, so that its outcome is known."""

        @functools.wraps(inner)
        async def outer(request: Any, context: Context) -> T:
            await self._look_again_at(call, context)
            return await inner(request, context)

        return outer

    def _reader(self, inner: Callable[..., Awaitable[T]], call: _Call) -> Callable[..., Awaitable[T]]:
        """Many requests, one answer: the handler is not ended but reads no further, and raises as `unary` maps it."""

        async def read(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
            while True:
                request = await _or_revoked(call, anext(requests, None))
                if not self._tokens.still(call.caller):
                    raise token_unknown()
                if request is None:
                    return
                yield request

        @functools.wraps(inner)
        async def outer(requests: AsyncIterator[Any], context: Context) -> T:
            with self._tracked(call):
                await self._look_again_at(call, context)
                return await inner(read(requests), context)

        return outer

    def _coroutine(self, inner: Callable[..., Awaitable[T]], call: _Call) -> Callable[..., Awaitable[T]]:
        @functools.wraps(inner)
        async def outer(request: Any, context: Context) -> T:
            with self._tracked(call):
                await self._look_again_at(call, context)
                try:
                    return await _or_revoked(call, inner(request, context))
                except Refused as refusal:
                    await abort(context, refusal)

        return outer

    def _generator(self, inner: Callable[..., AsyncIterator[T]], call: _Call) -> Callable[..., AsyncIterator[T]]:
        @functools.wraps(inner)
        async def outer(request: Any, context: Context) -> AsyncIterator[T]:
            with self._tracked(call):
                await self._look_again_at(call, context)
                messages = inner(request, context)
                while True:
                    try:
                        message = await _or_revoked(call, anext(messages))
                    except StopAsyncIteration:
                        return
                    except Refused as refusal:
                        await abort(context, refusal)
                    yield message

        return outer

    @contextmanager
    def _tracked(self, call: _Call) -> Iterator[None]:
        self._open.add(call)
        try:
            yield
        finally:
            self._open.discard(call)

    async def _look_again_at(self, call: _Call, context: Context) -> None:
        """Refuses the call if its token was revoked between its headers and now; a tracked one is told of later."""
        if not self._tokens.still(call.caller):
            await self._refuse(token_unknown(), call.caller, call.method, context)


async def _or_revoked(call: _Call, work: Awaitable[T]) -> T:
    """What the work gives, unless the call's token is revoked first: then it is cancelled. Raises Refused."""
    task, revoked = asyncio.ensure_future(_as_coroutine(work)), asyncio.ensure_future(call.revoked.wait())
    try:
        await asyncio.wait({task, revoked}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for each in (task, revoked):
            each.cancel()
        await asyncio.gather(task, revoked, return_exceptions=True)
    if task.cancelled():
        raise token_unknown()
    return task.result()


async def _as_coroutine(work: Awaitable[T]) -> T:
    return await work
