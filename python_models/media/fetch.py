"""Guarded fetching of media from http(s) URLs that callers give.

A server that fetches what strangers name can be made to read from inside its own network. So: the host is resolved
once, every address is judged, the connection goes to exactly a judged address (a second look-up could answer something
else), every redirect starts over, and neither the environment's proxies nor cookies take part.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import re
import socket
import ssl
import threading
from collections.abc import Awaitable, Callable, Iterable, Sequence

import httpx

from ..contract.errors import ErrorKind, TriptychError, invalid
from .addresses import Address, refusal
from .limits import too_large, unreadable

MAX_REDIRECTS = 5
CONNECT_TIMEOUT_S = 10.0
MAX_URL_CHARS = 8192
_PORTS = {"http": 80, "https": 443}
_REDIRECTS = (301, 302, 303, 307, 308)
_ODD_CHARACTERS = re.compile(r"[\x00-\x20\x7f\\]")

Resolver = Callable[[str, int], Awaitable[Sequence[str]]]
"""(host, port) -> addresses as text."""


class Fetcher:
    """Fetches media. Use from one running loop."""

    def __init__(
        self,
        max_bytes: int,
        allowed_hosts: Iterable[str] = (),
        resolve: Resolver | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """Set the rules.

        Args:
            max_bytes: of one file.
            allowed_hosts: "host" or "host:port" that may be loopback or private.
            resolve: looks a host name up; None: the system's resolver.
            tls: verifies certificates; None: the usual public authorities.
        """
        self._max_bytes = max_bytes
        self._allowed = {entry.lower().rstrip(".") for entry in allowed_hosts}
        self._resolve = resolve or system_resolver
        # a kept connection would be found again by address alone, whatever name its certificate was checked for
        self._transport = httpx.AsyncHTTPTransport(
            verify=tls or httpx.create_ssl_context(trust_env=False),
            trust_env=False,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
        )

    async def close(self) -> None:
        """Close all connections."""
        await self._transport.aclose()

    async def fetch(self, url: str, timeout_s: float, take: Callable[[int], None] = lambda size: None) -> bytes:
        """The body behind ``url``.

        Args:
            url: http or https.
            timeout_s: for everything: look-up, redirects, transfer.
            take: told of every piece's size before the next one is read; what it raises ends the transfer.

        Raises:
            TriptychError: INVALID_REQUEST for a URL that is refused, INVALID_MEDIA where there is nothing to get,
                TOO_LARGE, TIMEOUT. Messages name scheme and host only: paths and queries may hold secrets.
        """
        target = _parse(url)
        try:
            return await asyncio.wait_for(self._follow(target, take), timeout_s)
        except asyncio.TimeoutError:
            raise TriptychError(
                ErrorKind.TIMEOUT, f"{_origin(target)} did not deliver within {timeout_s:.3g} s"
            ) from None

    async def _follow(self, url: httpx.URL, take: Callable[[int], None]) -> bytes:
        for _ in range(MAX_REDIRECTS + 1):
            response = await self._get(url)
            try:
                if response.status_code not in _REDIRECTS:
                    return await self._body(response, _origin(url), take)
                location = response.headers.get("location", "")
            finally:
                # the server may hang up first, and a hostile one does
                with contextlib.suppress(httpx.TransportError):
                    await response.aclose()
            if not location:
                raise unreadable(f"{_origin(url)} answered {response.status_code} without saying where to go")
            url = _parse(location, base=url)
        raise unreadable(f"more than {MAX_REDIRECTS} redirects; the last was to {_origin(url)}")

    async def _get(self, url: httpx.URL) -> httpx.Response:
        """Connect to a judged address of the URL's host and send the request."""
        host, port = url.host, url.port or _PORTS[url.scheme]
        failure = ""
        for address in await self._addresses(url, host, port):
            request = httpx.Request(
                "GET",
                url.copy_with(host=str(address)),
                headers={
                    "host": url.netloc.decode("ascii"),
                    "user-agent": "triptych",
                    "accept": "*/*",
                    # no compression: the size limit counts what arrives
                    "accept-encoding": "identity",
                },
                extensions={
                    "sni_hostname": url.raw_host.decode("ascii"),
                    "timeout": {"connect": CONNECT_TIMEOUT_S, "read": None, "write": None, "pool": None},
                },
            )
            try:
                return await self._transport.handle_async_request(request)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                failure = "certificate not accepted" if "CERTIFICATE" in str(error) else "no connection"
            except httpx.TransportError:
                raise unreadable(f"{_origin(url)} broke the connection") from None
        raise unreadable(f"{_origin(url)} cannot be reached ({failure})")

    async def _addresses(self, url: httpx.URL, host: str, port: int) -> list[Address]:
        """Every address of a host, all of them allowed."""
        try:
            found = await self._resolve(host, port)
            addresses = [ipaddress.ip_address(text) for text in dict.fromkeys(found)]
        except (OSError, UnicodeError, ValueError):
            addresses = []
        if not addresses:
            raise unreadable(f"the host of {_origin(url)} cannot be found")
        name = host.lower().rstrip(".")
        if not self._allowed & {name, f"{name}:{port}", f"[{name}]", f"[{name}]:{port}"}:
            for address in addresses:
                if (reason := refusal(address)) is not None:
                    raise invalid(
                        f"{_origin(url)} is a {reason} address, which media may not come from; "
                        "the operator can allow it with allowed_media_hosts"
                    )
        return addresses

    async def _body(self, response: httpx.Response, origin: str, take: Callable[[int], None]) -> bytes:
        if response.status_code != 200:
            raise unreadable(f"{origin} answered {response.status_code}, not 200")
        encoding = response.headers.get("content-encoding", "identity").strip().lower()
        if encoding not in ("", "identity"):
            raise unreadable(f"{origin} sent content-encoding {encoding[:40]!r}; it must be sent as it is")
        declared = response.headers.get("content-length", "")
        if declared.isascii() and declared.isdigit() and int(declared) > self._max_bytes:
            raise self._too_large(origin)
        body = bytearray()
        try:
            async for chunk in response.aiter_raw():
                take(len(chunk))
                body += chunk
                if len(body) > self._max_bytes:
                    raise self._too_large(origin)
        except httpx.TransportError:
            raise unreadable(f"{origin} broke the connection after {len(body)} bytes") from None
        return bytes(body)

    def _too_large(self, origin: str) -> TriptychError:
        return too_large(f"the file from {origin} is larger than {self._max_bytes} bytes, the limit of one medium")


async def system_resolver(host: str, port: int) -> list[str]:
    """Look up in a thread of its own: a look-up cannot be interrupted and must not hold up others, nor the exit."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[list[str]] = loop.create_future()

    def settle(addresses: list[str], error: Exception | None) -> None:
        if result.done():
            return
        if error is None:
            result.set_result(addresses)
        else:
            result.set_exception(error)

    def look_up() -> None:
        found: list[str] = []
        error: Exception | None = None
        try:
            infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            found = [str(info[4][0]) for info in infos]
        except (OSError, UnicodeError) as problem:
            error = problem
        # the loop may have closed meanwhile
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(settle, found, error)

    threading.Thread(target=look_up, name="triptych-resolve", daemon=True).start()
    return await result


def _parse(text: str, base: httpx.URL | None = None) -> httpx.URL:
    """An absolute http(s) URL without credentials, or INVALID_REQUEST."""
    if len(text) > MAX_URL_CHARS:
        raise invalid(f"the URL has {len(text)} characters; at most {MAX_URL_CHARS} are allowed")
    # parsers disagree on these, and a disagreement is how a check is walked around
    if _ODD_CHARACTERS.search(text):
        raise invalid("the URL has spaces, control characters or backslashes; percent-encode them")
    try:
        url = base.join(text) if base is not None else httpx.URL(text)
        host = url.host
        port = url.port
    except (httpx.InvalidURL, ValueError):
        raise invalid("the URL cannot be parsed") from None
    if url.scheme not in _PORTS:
        raise invalid(f"URLs must start with http:// or https://, not {url.scheme[:20]!r}")
    if url.userinfo:
        raise invalid("the URL holds a user name or password, which is not allowed")
    if not host or "%" in host or port == 0:
        raise invalid("the URL has no valid host or port")
    return url.copy_with(fragment=None)


def _origin(url: httpx.URL) -> str:
    return f"{url.scheme}://{url.netloc.decode('ascii')}"
