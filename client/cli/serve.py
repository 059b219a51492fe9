"""``triptych serve``: arguments. What it does is in ``serving.py``, which takes longer to import."""

from __future__ import annotations

import argparse

from . import access, observing, options

SUMMARY = "serve a model"
DESCRIPTION = "Build the ensemble, start Triton Inference Server and the OpenAI-compatible endpoint, supervise both."
EXAMPLES = """examples:
  triptych serve                                  the built-in model on http://127.0.0.1:30000
  triptych serve Qwen/Qwen2.5-VL-3B-Instruct --device cuda
  triptych serve --model-path ./checkpoint --served-model-name mine --host 0.0.0.0 --port 8000
  triptych serve --triton-url 10.0.0.5:8001       only the endpoint, over a server that already runs"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    group = parser.add_argument_group("endpoint")
    group.add_argument("--served-model-name", metavar="NAME", help="name of the model in requests (default: as given)")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    group.add_argument("--port", type=int, default=30000, metavar="N", help="its port (default %(default)s)")
    group.add_argument(
        "--max-inflight-requests", type=int, default=1024, metavar="N", help="requests at once (default %(default)s)"
    )
    group.add_argument(
        "--max-body-mb", type=float, default=512, metavar="X", help="MiB of one request body (default %(default)s)"
    )
    group.add_argument(
        "--max-inflight-mb",
        type=float,
        default=2048,
        metavar="X",
        help="MiB of all request bodies that have not reached the engine (default %(default)s)",
    )
    group.add_argument(
        "--lease-s",
        type=float,
        default=10,
        metavar="X",
        help="the engine ends a request that the endpoint has not renewed for so long (default %(default)s)",
    )
    group.add_argument(
        "--response-store-mb",
        type=float,
        default=256,
        metavar="X",
        help="MiB of responses (/v1/responses) kept in memory for later requests; 0 keeps none (default %(default)s)",
    )
    group.add_argument(
        "--enable-cache-report",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="usage.prompt_tokens_details.cached_tokens in answers (on by default)",
    )
    group.add_argument(
        "--playground",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="a page at / to try the model in a browser (on by default)",
    )
    access.add_arguments(parser)
    observing.add_arguments(parser)
    group = parser.add_argument_group("Triton server")
    group.add_argument("--tritonserver", metavar="PATH", help="program or installation folder (default: found)")
    group.add_argument("--triton-url", metavar="HOST:PORT", help="gRPC address of a running server to use instead")
    group.add_argument("--grpc-port", type=int, default=0, metavar="N", help="its gRPC port (default: any free one)")
    group.add_argument("--http-port", type=int, default=0, metavar="N", help="its HTTP port (default: any free one)")
    group.add_argument(
        "--metrics-port",
        type=int,
        default=0,
        metavar="N",
        help="its metrics port (default: any free one; 8002 with --triton-url)",
    )
    group.add_argument(
        "--triton-host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address that its ports listen on (default %(default)s: this machine alone)",
    )
    group.add_argument(
        "--stages",
        metavar="NAMES",
        help="run only these, comma-separated, for example vision_encoder in a pool of encoders (default: all)",
    )
    group.add_argument("--server-log", metavar="FILE", help="keep the server's log here")
    group.add_argument(
        "--max-server-restarts",
        type=int,
        default=3,
        metavar="N",
        help="start it again where it ends by itself, this often within ten minutes (default %(default)s)",
    )
    group.add_argument(
        "--startup-timeout", type=float, default=1800, metavar="S", help="seconds to load (default %(default)s)"
    )
    options.add_settings(parser)


def run(args: argparse.Namespace) -> int:
    """Serve until stopped.

    Raises:
        CommandError: why it cannot start.
    """
    from .serving import serve

    return serve(args)
