"""Guarded fetching: which addresses are refused, and what a hostile or slow server can do."""

from __future__ import annotations

import asyncio
import http.server
import ipaddress
import re
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from triptych.python_models.contract.errors import ErrorKind, TriptychError
from triptych.python_models.media.addresses import refusal
from triptych.python_models.media.fetch import Fetcher

BODY = b"a medium" * 1000


def fetch(url: str, timeout_s: float = 20.0, max_bytes: int = 10**6, **options: Any) -> bytes:
    async def run() -> bytes:
        fetcher = Fetcher(max_bytes, **options)
        try:
            return await fetcher.fetch(url, timeout_s)
        finally:
            await fetcher.close()

    return asyncio.run(run())


def refused(url: str, **options: Any) -> TriptychError:
    with pytest.raises(TriptychError) as caught:
        fetch(url, **options)
    return caught.value


def names(table: dict[str, list[str]], asked: list[str] | None = None) -> Any:
    """A resolver that knows only ``table``; a list with several answers gives one more at each look-up."""

    async def resolve(host: str, port: int) -> Sequence[str]:
        if asked is not None:
            asked.append(host)
        if host not in table:
            raise OSError("unknown host")
        return table[host]

    return resolve


def words(text: str) -> list[str]:
    return text.split()


REFUSED = words("""
127.0.0.1 127.255.255.254 0.0.0.0 0.1.2.3 10.0.0.1 10.255.255.255 172.16.0.1 172.31.255.255 192.168.0.1 192.168.255.255
169.254.169.254 169.254.0.1 100.64.0.1 100.100.100.200 100.127.255.255 168.63.129.16 192.0.0.192 192.0.2.1 198.18.0.1
198.19.255.255 198.51.100.1 203.0.113.1 192.88.99.1 224.0.0.1 239.255.255.255 240.0.0.1 255.255.255.255
:: ::1 ::127.0.0.1 ::10.0.0.1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:169.254.169.254 fe80::1 fe80::1%1 febf::1 fc00::1
fd00:ec2::254 fd12::1 fec0::1 ff02::1 ff0e::1 2001:db8::1 100::1 64:ff9b::7f00:1 64:ff9b::a9fe:a9fe 64:ff9b:1::1
2002:7f00:1:: 2002:a9fe:a9fe::1 2002:c0a8:1:: 2001:0:4136:e378:8000:63bf:80ff:fffe 2607:f8b0::5efe:a00:1
2607:f8b0::200:5efe:7f00:1 5f00::1 4000::1 ::2
""")
ALLOWED = words("""
8.8.8.8 1.1.1.1 93.184.216.34 172.15.255.255 172.32.0.1 100.63.255.255 100.128.0.1 11.0.0.1 223.255.255.255
2606:4700:4700::1111 2a00:1450:4001:82a::200e ::ffff:8.8.8.8 64:ff9b::808:808 2002:808:808::1
""")


@pytest.mark.parametrize("address", REFUSED)
def test_refused_addresses(address: str) -> None:
    assert refusal(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", ALLOWED)
def test_allowed_addresses(address: str) -> None:
    assert refusal(ipaddress.ip_address(address)) is None


@pytest.mark.parametrize(
    "host",
    words("""127.0.0.1 127.1 127.0.1 2130706433 0x7f000001 0x7f.1 017700000001 0177.0.0.1 0 localhost LOCALHOST
    localhost. [::1] [::ffff:127.0.0.1] [::ffff:7f00:1] [0:0:0:0:0:0:0:1] [::] 169.254.169.254 2852039166 0xa9fea9fe
    10.0.0.1 192.168.1.1 [fe80::1] [fd00:ec2::254] [64:ff9b::7f00:1] [2002:7f00:1::]"""),
)
def test_literal_forms_never_connect(web: Any, host: str) -> None:
    web.serve("/secret", BODY)
    error = refused(f"http://{host}:{web.port}/secret")
    # a form that parser or resolver do not know is refused as that, every other as what it is
    assert error.kind in (ErrorKind.INVALID_REQUEST, ErrorKind.INVALID_MEDIA)
    assert re.search("media may not come from|cannot be found|cannot be parsed", error.message)
    assert web.seen == []


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd", "ftp://example.com/a", "gopher://example.com/", "data:image/png;base64,AAAA",
        "/etc/passwd", "//example.com/a", "example.com/a.png", "", "http://", "http:///a", "https://:443/",
        "http://exa mple.com/", "http://example.com\\@127.0.0.1/", "http://example.com/\r\nHost: a",
        "http://example.com:99999/", "http://example.com:0/", "http://[::1", "http://[fe80::1%25eth0]/",
        "http://" + "a" * 9000,
    ],
)  # fmt: skip
def test_bad_urls(url: str) -> None:
    error = refused(url, resolve=names({}))
    assert error.kind in (ErrorKind.INVALID_REQUEST, ErrorKind.INVALID_MEDIA)


def test_credentials_are_refused_and_not_repeated() -> None:
    error = refused("http://me:hunter2@example.com/a?token=hunter3", resolve=names({"example.com": ["8.8.8.8"]}))
    assert "password" in error.message
    assert "hunter" not in str(error)


def test_secrets_stay_out_of_messages(web: Any) -> None:
    web.serve("/path-hunter1", b"", status=403)
    for host in ("127.0.0.1", "nowhere.invalid"):
        error = refused(
            web.url("/path-hunter1?token=hunter2", host),
            allowed_hosts=["127.0.0.1"],
            resolve=None if "1" in host else names({}),
        )
        assert "hunter" not in str(error)
        assert host in str(error)


@pytest.mark.parametrize("entry", ["127.0.0.1", "127.0.0.1:{port}"])
def test_allowed_host(web: Any, entry: str) -> None:
    assert fetch(web.serve("/a", BODY), allowed_hosts=[entry.format(port=web.port)]) == BODY


@pytest.mark.parametrize("entry", ["127.0.0.2", "127.0.0.1:1", "127.0.0", "localhost"])
def test_other_host_allowed_is_not_enough(web: Any, entry: str) -> None:
    assert refused(web.serve("/a", BODY), allowed_hosts=[entry]).kind is ErrorKind.INVALID_REQUEST
    assert web.seen == []


def test_allowed_by_name_and_host_header_kept(web: Any) -> None:
    web.serve("/a", BODY)
    url = web.url("/a?x=1&y=%20z#fragment", "Media.Example")
    assert fetch(url, allowed_hosts=["media.example"], resolve=names({"media.example": ["127.0.0.1"]})) == BODY
    path, headers = web.seen[0]
    assert path == "/a?x=1&y=%20z"
    assert headers["host"] == f"media.example:{web.port}"
    assert "cookie" not in headers


def test_one_bad_address_among_good_ones(web: Any) -> None:
    web.serve("/a", BODY)
    for found in (["8.8.8.8", "127.0.0.1"], ["127.0.0.1", "8.8.8.8"], ["::ffff:127.0.0.1"], ["fe80::1%1"]):
        assert refused(web.url("/a", "mixed.example"), resolve=names({"mixed.example": found})).kind is (
            ErrorKind.INVALID_REQUEST
        )
    assert web.seen == []


def test_rebinding_resolver_is_asked_once(web: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that answers something else at every look-up: what was judged is what is connected to."""
    web.serve("/a", BODY)
    asked: list[str] = []

    async def resolve(host: str, port: int) -> Sequence[str]:
        asked.append(host)
        return ["127.0.0.1"] if len(asked) == 1 else ["127.0.0.9"]

    looked_up: list[Any] = []
    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *a, **k: looked_up.append(host) or real(host, *a, **k))
    assert fetch(web.url("/a", "rebind.example"), allowed_hosts=["rebind.example"], resolve=resolve) == BODY
    assert asked == ["rebind.example"]
    assert "rebind.example" not in looked_up


def test_second_address_is_tried(web: Any) -> None:
    web.serve("/a", BODY)
    options = {"allowed_hosts": ["two.example"], "resolve": names({"two.example": ["127.0.0.9", "127.0.0.1"]})}
    # nothing listens at 127.0.0.9
    assert fetch(web.url("/a", "two.example"), **options) == BODY


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed(web: Any, status: int) -> None:
    web.serve("/b", BODY)
    assert fetch(web.serve("/a", b"", status, Location="b"), allowed_hosts=["127.0.0.1"]) == BODY


@pytest.mark.parametrize(
    "target",
    ["http://localhost:{port}/b", "http://127.0.0.2:{port}/b", "http://[::1]:{port}/b", "http://169.254.169.254/latest/",
     "file:///etc/passwd", "//2130706434:{port}/b", "http://u:p@127.0.0.1:{port}/b", "gopher://127.0.0.1:{port}/"],
)  # fmt: skip
def test_redirects_are_checked_again(web: Any, target: str) -> None:
    web.serve("/b", BODY)
    url = web.serve("/a", b"", 302, Location=target.format(port=web.port))
    assert refused(url, allowed_hosts=["127.0.0.1"]).kind is ErrorKind.INVALID_REQUEST
    assert [path for path, _ in web.seen] == ["/a"]


def test_redirect_limit(web: Any) -> None:
    for k in range(7):
        web.serve(f"/{k}", b"", 302, Location=f"/{k + 1}")
    web.serve("/7", BODY)
    assert fetch(web.url("/2"), allowed_hosts=["127.0.0.1"]) == BODY
    assert "5 redirects" in refused(web.url("/1"), allowed_hosts=["127.0.0.1"]).message
    web.serve("/loop", b"", 302, Location="/loop")
    assert "5 redirects" in refused(web.url("/loop"), allowed_hosts=["127.0.0.1"]).message
    web.serve("/lost", b"", 302)
    assert "302" in refused(web.url("/lost"), allowed_hosts=["127.0.0.1"]).message


@pytest.mark.parametrize("status", [201, 204, 206, 304, 400, 401, 404, 500, 503])
def test_other_status(web: Any, status: int) -> None:
    error = refused(web.serve("/a", b"" if status in (204, 304) else BODY, status), allowed_hosts=["127.0.0.1"])
    assert error.kind is ErrorKind.INVALID_MEDIA
    assert str(status) in error.message


def test_size_limit(web: Any) -> None:
    url = web.serve("/a", BODY)
    assert fetch(url, allowed_hosts=["127.0.0.1"], max_bytes=len(BODY)) == BODY
    error = refused(url, allowed_hosts=["127.0.0.1"], max_bytes=len(BODY) - 1)
    assert error.kind is ErrorKind.TOO_LARGE
    assert str(len(BODY) - 1) in error.message


def test_size_limit_while_streaming(web: Any) -> None:
    """A server that does not say how much it sends, and never stops."""

    def endless(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        while not web.release.is_set():
            handler.wfile.write(bytes(65536))

    web.routes["/a"] = endless
    assert refused(web.url("/a"), allowed_hosts=["127.0.0.1"]).kind is ErrorKind.TOO_LARGE


def test_content_length_is_believed_only_one_way(web: Any) -> None:
    error = refused(web.serve("/a", b"x", Content_Length=str(10**12)), allowed_hosts=["127.0.0.1"])
    assert error.kind is ErrorKind.TOO_LARGE
    error = refused(web.serve("/b", b"x", Content_Length="100"), allowed_hosts=["127.0.0.1"])
    assert "broke the connection after 1 bytes" in error.message


def test_compressed_answers_are_refused(web: Any) -> None:
    error = refused(web.serve("/a", BODY, Content_Encoding="gzip"), allowed_hosts=["127.0.0.1"])
    assert "gzip" in error.message
    assert web.seen[0][1]["accept-encoding"] == "identity"


@pytest.mark.parametrize("slow", ["silent", "drip", "redirects"])
def test_deadline(web: Any, slow: str) -> None:
    def drip(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        while not web.release.wait(0.05):
            handler.wfile.write(b"x")

    def wait_and_redirect(handler: http.server.BaseHTTPRequestHandler) -> None:
        web.release.wait(0.3)
        handler.send_response(302)
        handler.send_header("Location", "/a")
        handler.end_headers()

    if slow == "silent":
        web.stall("/a")
    else:
        web.routes["/a"] = drip if slow == "drip" else wait_and_redirect
    start = time.monotonic()
    error = refused(web.url("/a"), allowed_hosts=["127.0.0.1"], timeout_s=0.5)
    assert error.kind is ErrorKind.TIMEOUT
    assert time.monotonic() - start < 5


def test_slow_lookup_hits_the_deadline() -> None:
    async def never(host: str, port: int) -> Sequence[str]:
        await asyncio.sleep(60)
        return []

    assert refused("http://slow.example/", resolve=never, timeout_s=0.2).kind is ErrorKind.TIMEOUT


def test_environment_proxy_is_not_used(web: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert fetch(web.serve("/a", BODY), allowed_hosts=["127.0.0.1"]) == BODY


def test_not_http(web: Any) -> None:
    web.routes["/a"] = lambda handler: handler.wfile.write(b"\x00\x01 this is no HTTP answer\r\n\r\n")
    assert refused(web.url("/a"), allowed_hosts=["127.0.0.1"]).kind is ErrorKind.INVALID_MEDIA
    error = refused("http://127.0.0.1:9/a", allowed_hosts=["127.0.0.1"])
    assert "cannot be reached" in error.message


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command to make a certificate")
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=media.example",
         "-addext", "subjectAltName=DNS:media.example", "-keyout", path.with_name("key"),
         "-out", path.with_name("crt")],
        check=True, capture_output=True,
    )  # fmt: skip
    path.write_bytes(path.with_name("key").read_bytes() + path.with_name("crt").read_bytes())
    return path


def test_tls_checks_the_name_not_the_address(web: Any, certificate: Path) -> None:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate)
    asked: list[str | None] = []
    server.sni_callback = lambda _socket, name, _context: asked.append(name)
    web._server.socket = server.wrap_socket(web._server.socket, server_side=True)
    # connections that stay open, if the client lets them
    web._server.RequestHandlerClass.protocol_version = "HTTP/1.1"
    web.serve("/a", BODY)
    client = ssl.create_default_context(cafile=str(certificate))
    table = names({"media.example": ["127.0.0.1"], "other.example": ["127.0.0.1"]})
    options: dict[str, Any] = {"allowed_hosts": ["media.example", "other.example"], "resolve": table, "tls": client}
    assert fetch(f"https://media.example:{web.port}/a", **options) == BODY
    assert asked[0] == "media.example"
    assert "certificate" in refused(f"https://other.example:{web.port}/a", **options).message

    async def one_after_the_other() -> None:
        fetcher = Fetcher(10**6, **options)
        assert await fetcher.fetch(f"https://media.example:{web.port}/a", 20) == BODY
        # a connection that was kept would have been checked for the first name only
        with pytest.raises(TriptychError, match="certificate"):
            await fetcher.fetch(f"https://other.example:{web.port}/a", 20)
        await fetcher.close()

    asyncio.run(one_after_the_other())
    # the usual authorities do not know this certificate
    options.pop("tls")
    assert "certificate" in refused(f"https://media.example:{web.port}/a", **options).message
