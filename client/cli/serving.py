"""What ``triptych serve`` does: the endpoint in this process, the Triton server as its child, both supervised."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import signal
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import uvicorn
import uvloop

from triptych.client.launcher import Download, LauncherError, TritonServer, find_server, place
from triptych.client.openai_api import Service, ShimOptions, create_app
from triptych.python_models.contract.errors import TriptychError
from triptych.python_models.contract.settings import Settings
from triptych.python_models.contract.tensors import STAGES

from . import access, observing, options
from .parser import CommandError

_SUPERVISE_S = 0.5
# for the last bytes of answers, once every request has ended
_CLOSE_S = 5
_RESTART_WINDOW_S = 600.0
_TRITON_METRICS_PORT = 8002
# gRPC cannot carry more in one message.
_MAX_BODY_MB = 2000


class _Endpoint(uvicorn.Server):
    """uvicorn without its signal handlers: the command stops more than the endpoint."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(args: argparse.Namespace) -> int:
    """Serve until Ctrl-C or SIGTERM.

    Returns:
        0 after a stop that was asked for, 1 where the Triton server ended by itself.

    Raises:
        CommandError: why it cannot start.
    """
    if args.triton_url:
        options.refuse_with_running_server(args)
    access.check(args)
    settings = options.settings_of(args)
    observing.set_up_logs(settings)
    shim = _shim_options(args)
    triton_key = access.take_triton_key(args)
    with _listen(args.host, args.port) as listener:
        try:
            return uvloop.run(_Serving(args, settings, shim, triton_key, listener).run())
        except LauncherError as error:
            raise CommandError(error.message, error.remedy) from None
        except TriptychError as error:
            raise CommandError(error.message) from None


class _Serving:
    """One run of the command."""

    def __init__(
        self,
        args: argparse.Namespace,
        settings: Settings,
        shim: ShimOptions,
        triton_key: str | None,
        listener: socket.socket,
    ) -> None:
        self._args = args
        self._stages = _stages(args)
        self._triton_key = triton_key
        self._settings = settings
        self._listener = listener
        self._service = Service(shim)
        self._download: Download | None = None
        self._triton: TritonServer | None = None
        self._began = time.monotonic()
        self._stopping = asyncio.Event()
        self._draining: asyncio.Task[None] | None = None
        self._restarts: list[float] = []

    async def run(self) -> int:
        """Start everything, wait, stop everything."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal, number)
        # The endpoint listens from the beginning, so that /health can say that the model is loading.
        config = uvicorn.Config(
            create_app(self._service),
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=_CLOSE_S,
            timeout_keep_alive=math.ceil(self._args.keep_alive_s),
            ssl_certfile=self._args.ssl_certfile,
            ssl_keyfile=self._args.ssl_keyfile,
        )
        endpoint = _Endpoint(config)
        serving = asyncio.create_task(endpoint.serve(sockets=[self._listener]))
        starting = asyncio.create_task(self._start())
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait({serving, starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()
                return await self._supervise(serving)
            return 0
        finally:
            self._service.drain()
            endpoint.should_exit = True
            # Stopping the server also ends a start that is under way.
            await asyncio.gather(serving, self._stop_triton(), return_exceptions=True)
            await asyncio.gather(starting, return_exceptions=True)
            stopping.cancel()
            if self._stopping.is_set():
                _say("stopped")

    def _on_signal(self, number: int) -> None:
        # Ctrl-C is for somebody who waits, SIGTERM comes from what moves the traffic elsewhere first.
        if number == signal.SIGTERM and self._draining is None:
            self._draining = asyncio.create_task(self._drain(), name="drain")
        else:
            self._stopping.set()

    async def _drain(self) -> None:
        """Take no new requests, let those that run finish for a while, then stop."""
        traffic, limit = self._service.traffic, self._args.drain_timeout_s
        traffic.close()
        if traffic.running:
            _say(
                f"{traffic.running} requests run; stopping once they have ended, in {limit:g} s at most (a second "
                "signal stops at once)"
            )
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(traffic.ended(), limit)
        self._stopping.set()

    async def _start(self) -> None:
        if self._args.triton_url:
            host = self._args.triton_url.split("://")[-1].rpartition(":")[0] or self._args.triton_url
            metrics_port = self._args.metrics_port or _TRITON_METRICS_PORT
            await self._service.connect(
                self._args.triton_url, f"http://{host}:{metrics_port}/metrics", self._triton_key or ""
            )
            assert self._service.settings is not None
            if not self._args.served_model_name:
                name = options.name_of(self._service.settings.model)
                self._service.options = replace(self._service.options, served_model_name=name)
        else:
            triton = await asyncio.to_thread(self._prepare_triton)
            await self._service.connect(triton.grpc_url, triton.metrics_url, triton.management_key)
        self._say_ready()

    def _prepare_triton(self) -> TritonServer:
        args, settings, placement = self._args, self._settings, place(self._settings)
        if settings.model != "builtin" and not Path(settings.model).is_dir():
            _say(f"downloading {settings.model} from the hub, or finding it in the local cache")
            self._download = Download(settings.model, settings.revision, code=settings.trust_remote_code)
            self._download.run()
        where = f"GPU {', '.join(map(str, placement.gpu_ids))}" if placement.gpu_ids else "the CPU"
        _say(f"serving {self._settings.model} on {where}")
        self._triton = triton = TritonServer(
            find_server(args.tritonserver),
            self._settings,
            grpc_port=args.grpc_port,
            http_port=args.http_port,
            metrics_port=args.metrics_port,
            embedding_dtype=placement.embedding_dtype,
            gpu_ids=placement.gpu_ids,
            log=Path(args.server_log).absolute() if args.server_log else None,
            trace_config=args.trace_config,
            management_key=self._triton_key,
            host=args.triton_host,
            stages=self._stages,
        )
        self._bring_up(triton)
        return triton

    async def _supervise(self, serving: asyncio.Task[None]) -> int:
        while not self._stopping.is_set():
            if serving.done():
                _complain("the HTTP endpoint ended by itself")
                return 1
            if self._triton is not None and not self._triton.alive():
                # A stage that dies while it holds a lock of the server takes the server along.
                if not self._may_restart():
                    _complain("tritonserver ended by itself; its log says why (--server-log FILE keeps it)")
                    return 1
                restarting = asyncio.create_task(self._restart())
                stopping = asyncio.create_task(self._stopping.wait())
                await asyncio.wait({restarting, stopping}, return_when=asyncio.FIRST_COMPLETED)
                stopping.cancel()
                if not restarting.done():
                    # Stopping the server ends the restart.
                    await asyncio.gather(self._stop_triton(), restarting, return_exceptions=True)
                    return 0
                restarting.result()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), _SUPERVISE_S)
        return 0

    def _may_restart(self) -> bool:
        now = time.monotonic()
        self._restarts = [moment for moment in self._restarts if now - moment < _RESTART_WINDOW_S]
        if len(self._restarts) >= self._args.max_server_restarts:
            return False
        self._restarts.append(now)
        return True

    async def _restart(self) -> None:
        assert self._triton is not None
        _complain("tritonserver ended by itself; starting it again")
        ended, began = self._triton, time.monotonic()
        await self._service.disconnect("the Triton server is being restarted")
        await asyncio.to_thread(ended.stop)
        if self._stopping.is_set():
            return
        self._triton = triton = ended.another()
        await asyncio.to_thread(self._bring_up, triton)
        await self._service.connect(triton.grpc_url, triton.metrics_url, triton.management_key)
        self._service.metrics.server_restarts.inc()
        _say(f"ready again after {time.monotonic() - began:.1f} s")

    def _bring_up(self, triton: TritonServer) -> None:
        triton.start()
        triton.wait_ready(self._args.startup_timeout, _say)

    async def _stop_triton(self) -> None:
        if self._download is not None:
            self._download.stop()
        if self._triton is not None:
            await asyncio.to_thread(self._triton.stop)

    def _say_ready(self) -> None:
        name = self._service.options.served_model_name
        host = self._args.host if self._args.host not in ("0.0.0.0", "::") else "127.0.0.1"
        scheme = "https" if self._args.ssl_certfile else "http"
        url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{self._listener.getsockname()[1]}"
        body = json.dumps({"model": name, "messages": [{"role": "user", "content": "Hello"}]})
        _say(f"ready: {url} after {time.monotonic() - self._began:.1f} s, model {name!r}; Ctrl-C stops it")
        key = " -H 'Authorization: Bearer KEY'" if self._service.options.api_keys else ""
        _say(f"  curl {url}/v1/chat/completions{key} -d '{body}'")


def _shim_options(args: argparse.Namespace) -> ShimOptions:
    for option in ("max_inflight_requests", "max_body_mb", "max_inflight_mb", "lease_s"):
        if not 0 < getattr(args, option) < math.inf:
            raise CommandError(
                f"--{option.replace('_', '-')} must be a number greater than 0, got {getattr(args, option):g}"
            )
    if not 0 <= args.response_store_mb < math.inf:
        raise CommandError(f"--response-store-mb must be a number of at least 0, got {args.response_store_mb:g}")
    if args.max_body_mb > _MAX_BODY_MB:
        raise CommandError(f"--max-body-mb must be at most {_MAX_BODY_MB}, got {args.max_body_mb:g}")
    return ShimOptions(
        served_model_name=options.served_name(args),
        max_inflight_requests=args.max_inflight_requests,
        max_body_bytes=int(args.max_body_mb * 2**20),
        max_inflight_bytes=int(args.max_inflight_mb * 2**20),
        lease_s=args.lease_s,
        api_keys=access.take_keys(args),
        allowed_origins=tuple(args.allowed_origins),
        response_store_bytes=int(args.response_store_mb * 2**20),
        enable_cache_report=args.enable_cache_report,
        log_requests=args.log_requests,
        otlp_traces_endpoint=observing.traces_endpoint(args),
        playground=args.playground,
    )


def _stages(args: argparse.Namespace) -> tuple[str, ...]:
    if args.stages is None:
        return tuple(STAGES)
    wanted = [name.strip() for name in args.stages.split(",")]
    if unknown := [name for name in wanted if name not in STAGES]:
        raise CommandError(f"--stages: there is no stage {unknown[0]!r}", f"there are: {', '.join(STAGES)}")
    return tuple(name for name in STAGES if name in wanted)


def _listen(host: str, port: int) -> socket.socket:
    """A bound socket; a taken port shows before a model is loaded for minutes."""
    if not 0 <= port < 65536:
        raise CommandError(f"--port must be between 0 and 65535, got {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise CommandError(f"--host {host!r} is no address: {error.strerror}", "try 127.0.0.1 or 0.0.0.0") from None
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        # Listening is what makes a second server on this port fail.
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise CommandError(
            f"port {port} of {host} cannot be taken: {error.strerror}",
            "stop what listens there, or choose another with --port",
        ) from None
    return listener


def _say(text: str) -> None:
    print(text, flush=True)


def _complain(text: str) -> None:
    print(f"triptych serve: {text}", file=sys.stderr, flush=True)
