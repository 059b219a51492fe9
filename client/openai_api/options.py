"""The options of the shim itself; those of the stages are the contract's ``Settings``."""

from __future__ import annotations

from dataclasses import dataclass, field

from .keys import ApiKeys


@dataclass(frozen=True)
class ShimOptions:
    """Options of the HTTP endpoint.

    Attributes:
        served_model_name: the name under which requests ask for the model.
        max_inflight_requests: requests handled at once; one more is refused as overloaded.
        max_body_bytes: bytes of one request body at most.
        max_inflight_bytes: bytes of all request bodies whose media have not reached the engine yet.
        lease_s: the engine ends a request that the shim has not renewed for so long.
        probe_interval_s: pause between two probes of a stage.
        probe_timeout_s: a probe without an answer for so long failed; six of them in a row mean a stuck stage, two that
            are refused a dead one.
        queue_allowance_s: how long a request may wait for its turn before it reaches the engine, beside the time
            that its media may take.
        enable_cache_report: tell in the usage of an answer how many tokens of its prompt came from the prefix cache.
        response_store_bytes: of responses (POST /v1/responses) kept in memory for later requests; 0 keeps none.
        api_keys: who may ask; none: everybody.
        allowed_origins: origins of web pages whose scripts may ask ("*": any).
        playground: whether there is a page at ``/`` to try the model in a browser.
        log_requests: "off", "summary" (a line for each request) or "contents" (with prompt and answer).
        otlp_traces_endpoint: URL that traces are sent to; "" for none.
    """

    served_model_name: str
    max_inflight_requests: int = 1024
    max_body_bytes: int = 512 * 2**20
    max_inflight_bytes: int = 2 * 2**30
    lease_s: float = 10.0
    probe_interval_s: float = 1.0
    probe_timeout_s: float = 5.0
    queue_allowance_s: float = 60.0
    enable_cache_report: bool = True
    response_store_bytes: int = 256 * 2**20
    api_keys: ApiKeys = field(default_factory=ApiKeys)
    allowed_origins: tuple[str, ...] = ()
    playground: bool = True
    log_requests: str = "off"
    otlp_traces_endpoint: str = ""
