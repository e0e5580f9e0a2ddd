"""vLLM engines that follow updates by themselves.

    pip install + HOTWEIGHTS_ENDPOINT  --vLLM's plugin loading-->  register()   in front end, engine core, every rank
    install_autobind(endpoint=...)     ------------------------->  register()   and the same in child processes

`register` gives every worker the `hotweights_*` methods, every engine core its gate, and every engine a controller
beside its front end: AsyncLLM (the OpenAI server too, in the first of its API servers) or the LLMEngine of an offline
LLM. Unless a coordinator is configured it does nothing at all.
"""

import dataclasses
import functools
import inspect
import logging
import os
import socket
import weakref
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

from hotweights.adapters import vllm_core, vllm_versions, vllm_worker
from hotweights.adapters.settings import settings
from hotweights.adapters.vllm_engine import TORN, AsyncCores, Cores, SyncCores, VllmEngine, lock_sending
from hotweights.adapters.vllm_shapes import no_front_end, unsupported
from hotweights.wire import failpoints
from hotweights.wire.endpoint import BadEndpoint
from hotweights.worker_client.config import BadSetting, Config, load_config

if TYPE_CHECKING:
    from hotweights.worker_client.window.controller import ReplicaController
    from hotweights.worker_client.window.thread import ControllerThread

log = logging.getLogger(__name__)

LEFT_ALONE = "hotweights leaves this engine alone"
_PATCHED = "_hotweights_patched"
_THREAD = "_hotweights_thread"


def install_autobind(
    name_map: Mapping[str, str] | None = None, endpoint: str | None = None, model: str | None = None
) -> None:
    """Call before building an engine: it will follow the newest version of its model.

    What is None is taken from the environment. Raises BadSetting or BadEndpoint; without any coordinator, BadSetting.
    """
    config = settings(endpoint, model, name_map)
    if config.endpoint is None:
        raise BadSetting("HOTWEIGHTS_ENDPOINT", "", "takes the coordinator's address, or give endpoint=")
    config = dataclasses.replace(config, policy=config.policy or "auto")
    # The engine core and the ranks are child processes: the environment is the only way to tell them.
    os.environ.update({name: value for name, value in config.as_environ().items() if value})  # noqa: TID251
    register()


def register() -> None:
    """The `vllm.general_plugins` entry point. Runs in every process, possibly more than once."""
    try:
        config = load_config()
    except (BadSetting, BadEndpoint) as error:
        log.error("%s: %s", LEFT_ALONE, error)
        return
    if config.endpoint is None:
        return
    _speak_through_vllm()
    if not vllm_versions.usable(_vllm_version()):
        return
    try:
        vllm_worker.install()
        vllm_core.install()
        _patch_async_llm()
        _patch_llm_engine()
    except (ImportError, AttributeError) as error:  # a newer vLLM has moved what is hooked; its owner's server goes on
        log.error("%s: vLLM %s is built otherwise: %s", LEFT_ALONE, _vllm_version(), error)
        return
    if reason := no_front_end():
        log.warning("%s: %s", LEFT_ALONE, reason)


def _vllm_version() -> str:
    import vllm

    return str(vllm.__version__)


def _speak_through_vllm() -> None:
    """vLLM configures only its own loggers; without a handler our lines would be lost."""
    ours, theirs = logging.getLogger("hotweights"), logging.getLogger("vllm")
    if not ours.handlers and not logging.getLogger().handlers:
        ours.handlers = theirs.handlers
        ours.setLevel(theirs.level)


def _patch_async_llm() -> None:
    """AsyncLLM gets a controller: started where the engine's loop is known, closed before the engine is."""
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.exceptions import EngineDeadError

    if getattr(AsyncLLM, _PATCHED, False):
        return
    init, run_handler, shutdown = AsyncLLM.__init__, AsyncLLM._run_output_handler, AsyncLLM.shutdown
    check_health = AsyncLLM.check_health
    signature = inspect.signature(init)

    @functools.wraps(init)
    def patched_init(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        # Of several API servers over one engine the first one has the controller.
        if bound.arguments.get("client_index", 0) == 0 and _attach(self):
            _start(self)

    @functools.wraps(run_handler)
    def patched_run_handler(self: Any) -> None:
        run_handler(self)
        _start(self)

    @functools.wraps(shutdown)
    def patched_shutdown(self: Any, *args: Any, **kwargs: Any) -> Any:
        thread = self.__dict__.pop(_THREAD, None)
        if thread is not None:
            thread.close()
        return shutdown(self, *args, **kwargs)

    @functools.wraps(check_health)
    async def patched_check_health(self: Any) -> None:
        await check_health(self)
        if TORN in self.__dict__:
            raise EngineDeadError()

    AsyncLLM.__init__ = patched_init
    AsyncLLM._run_output_handler = patched_run_handler
    AsyncLLM.shutdown = patched_shutdown
    AsyncLLM.check_health = patched_check_health
    setattr(AsyncLLM, _PATCHED, True)


def _patch_llm_engine() -> None:
    """So does the LLMEngine of an offline LLM, from its start until it is let go."""
    from vllm.v1.engine.core_client import SyncMPClient
    from vllm.v1.engine.llm_engine import LLMEngine

    if getattr(LLMEngine, _PATCHED, False):
        return
    lock_sending(SyncMPClient)
    init = LLMEngine.__init__

    @functools.wraps(init)
    def patched_init(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if _attach(self):
            thread: ControllerThread = self.__dict__[_THREAD]
            weakref.finalize(self, thread.close)
            thread.start()

    LLMEngine.__init__ = patched_init
    setattr(LLMEngine, _PATCHED, True)


def _attach(front_end: Any) -> bool:
    """After the engine core was started: gRPC must not exist before that fork (FACTS)."""
    if reason := unsupported(front_end):
        log.warning("%s: %s", LEFT_ALONE, reason)
        return False
    from hotweights.worker_client.window.thread import ControllerThread

    config = load_config()
    # Weakly: a thread that held the engine would keep it from ever being collected.
    thread = ControllerThread(functools.partial(_make_controller, weakref.ref(front_end), config))
    front_end.__dict__[_THREAD] = thread
    if config.use_ipc_agent:
        front_end.hotweights_agent = thread
    return True


def _start(llm: Any) -> None:
    """Once an AsyncLLM's loop is known: it is the one that its output handler runs on."""
    thread: ControllerThread | None = llm.__dict__.get(_THREAD)
    if thread is not None and llm.output_handler is not None and not thread.started:
        thread.start()


def _cores_of(front_end: Any) -> Cores:
    handler = getattr(front_end, "output_handler", None)
    return SyncCores(front_end) if handler is None else AsyncCores(front_end, handler.get_loop())


def _make_controller(held: "weakref.ref[Any]", config: Config) -> "ReplicaController":
    """In the controller's thread, on its loop."""
    from hotweights.v1 import model_pb2
    from hotweights.worker_client.agent_client import connect_or_start
    from hotweights.worker_client.session import Session
    from hotweights.worker_client.window.controller import Identity, ReplicaController, Stream
    from hotweights.worker_client.window.engine import EngineFailed
    from hotweights.worker_client.window.identify import Images

    endpoint, llm = config.endpoint, held()
    assert endpoint is not None
    if llm is None:
        raise EngineFailed("the engine was let go before its controller started")
    policies = {"auto": model_pb2.MODEL_POLICY_AUTO, "manual": model_pb2.MODEL_POLICY_MANUAL}
    identity = Identity(
        replica_id=config.replica or f"{socket.gethostname()}-{os.getpid()}",
        node_id=config.node,
        model=config.model,
        policy=policies.get(config.policy, model_pb2.MODEL_POLICY_UNSPECIFIED),
        name_map=config.name_map,
    )

    async def connect_agent() -> Images:
        return await connect_or_start(config)

    def open_stream(hello: Callable[[], Any], on_order: Callable[[Any], Awaitable[str]], welcomed: Any) -> Stream:
        return Session(
            endpoint, hello, on_order, on_welcome=welcomed, adopt_cluster=config.adopt_cluster, access=config.access
        )

    failpoints.arm(config.failpoints)
    log.info("hotweights: replica %s follows %s", identity.replica_id, endpoint)
    engine = VllmEngine(_cores_of(llm))
    return ReplicaController(identity, engine, connect_agent, open_stream, torn_stays=config.torn == "stay")
