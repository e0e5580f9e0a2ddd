"""The coordinator as a process: services, health, reflection, and a graceful end."""

import asyncio
import importlib.metadata
import logging
import signal
from collections.abc import Callable
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from hotweights.coordinator.access.gate import Gate
from hotweights.coordinator.access.refusals import Refusals
from hotweights.coordinator.access.tokens import Tokens
from hotweights.coordinator.config import Config
from hotweights.coordinator.rules.state import Limits
from hotweights.coordinator.runtime import Runtime
from hotweights.coordinator.service.coordinator import CoordinatorService
from hotweights.coordinator.service.worker import WorkerService
from hotweights.coordinator.store import open_store
from hotweights.coordinator.tls import server_credentials
from hotweights.v1 import (
    coordinator_service_pb2,
    coordinator_service_pb2_grpc,
    worker_service_pb2,
    worker_service_pb2_grpc,
)
from hotweights.wire import failpoints
from hotweights.wire.channel import server_options
from hotweights.wire.endpoint import Endpoint

log = logging.getLogger(__name__)


class CannotBind(Exception):
    """The endpoint is taken or not ours; the message names it."""


class Coordinator:
    """A running coordinator. `start`, then `endpoint` says where it is; `stop` ends it."""

    def __init__(self, config: Config) -> None:
        """Raises BadCertificate, and BadTokens for a tokens file that cannot be used."""
        self._config = config
        # Kept: gRPC calls the fetcher in it for as long as the port is open.
        self._credentials = server_credentials(config) if config.tls_cert is not None else None
        limits = Limits(lease_s=config.lease_s, keep_versions=config.keep_versions)
        store = open_store(config.store, config.keep_events)
        self.runtime = Runtime(store, limits)
        self._refusals = Refusals(self.runtime.offer, self.runtime.now)
        self._tokens = Tokens(Path(config.tokens)) if config.tokens else None
        self._gate = Gate(self._tokens, self._refusals) if self._tokens is not None else None
        self._following: asyncio.Task[None] | None = None
        gates = [self._gate] if self._gate is not None else []
        self._server: grpc.aio.Server = grpc.aio.server(interceptors=gates, options=server_options())
        self._health = health.aio.HealthServicer()
        self.endpoint = config.endpoint

    async def start(self) -> None:
        """Opens the store, then the port. Raises StoreError or CannotBind."""
        await self.runtime.start()
        try:
            self._bind()
            self._add_services()
            await self._server.start()
        except BaseException:  # cancelled too; raised on
            await self.runtime.stop()
            raise
        if self._tokens is not None and self._gate is not None:
            self._following = asyncio.create_task(self._tokens.follow(self._gate.look_again))
            # Without it revoked tokens would stay good.
            self.runtime.ends_with(self._following, "the look at the tokens file")
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        for name in _service_names():
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        log.info("coordinator at %s", self.endpoint)
        if self._tokens is not None and not self.endpoint.is_loopback and not self.endpoint.tls:
            log.warning("tokens travel in plaintext to %s: whoever sees the traffic can use them", self.endpoint)

    def _bind(self) -> None:
        try:
            if self._credentials is not None:
                port = self._server.add_secure_port(self.endpoint.target, self._credentials)
            else:
                port = self._server.add_insecure_port(self.endpoint.target)
        except RuntimeError as error:
            raise CannotBind(f"cannot listen on {self.endpoint}: it is taken or not this machine's") from error
        if not self.endpoint.path:
            self.endpoint = Endpoint(host=self.endpoint.host, port=port, tls=self._credentials is not None)

    def _add_services(self) -> None:
        config = self._config
        coordinator_service_pb2_grpc.add_CoordinatorServiceServicer_to_server(
            CoordinatorService(self.runtime, software_version(), self._gate), self._server
        )
        worker_service_pb2_grpc.add_WorkerServiceServicer_to_server(
            WorkerService(self.runtime, config.heartbeat_s, config.lease_s, self._refusals), self._server
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (*_service_names(), health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)

    async def stop(self) -> None:
        """Not serving, sessions told, calls given their grace, store closed."""
        if self._following is not None:
            self._following.cancel()
        await self._health.enter_graceful_shutdown()
        await self.runtime.end_streams()
        await self._server.stop(self._config.stop_grace_s)
        await self.runtime.stop()


def _service_names() -> tuple[str, ...]:
    return (
        coordinator_service_pb2.DESCRIPTOR.services_by_name["CoordinatorService"].full_name,
        worker_service_pb2.DESCRIPTOR.services_by_name["WorkerService"].full_name,
    )


def software_version() -> str:
    return importlib.metadata.version("hotweights")


async def serve(config: Config, on_started: Callable[[Endpoint], None] = lambda _: None) -> None:
    """Runs until SIGTERM or SIGINT, or until the store or the leader fails.

    Raises BadCertificate, StoreError, CannotBind.
    """
    failpoints.arm(config.failpoints)
    coordinator = Coordinator(config)
    loop, stops = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stops.set)
    await coordinator.start()
    on_started(coordinator.endpoint)
    failed = coordinator.runtime.failed
    assert failed is not None
    failed.add_done_callback(lambda _: stops.set())
    try:
        await stops.wait()
    finally:
        await coordinator.stop()
    if failed.done() and (error := failed.exception()) is not None:
        raise error
