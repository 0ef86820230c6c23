"""Pictures over http(s): one GET that cannot be led to a private address, nor held up for ever.

    url -> host -> addresses, all of them public? -> connect to that very address -> 200: the body
     ^                                                                            -> 3xx: again
     +------------------------------ Location --------------------------------------+

The name is resolved once and the connection goes to the address that was checked, so a name server
that answers differently the second time (DNS rebinding) gains nothing. Every redirect goes the
whole way again. Proxies of the environment are not asked.
"""

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from urllib.parse import SplitResult, urljoin, urlsplit

from titan_vlm.data.reading import passes
from titan_vlm.errors import DataError

MAX_REDIRECTS = 5
PAUSES_S = (0.1, 1.0)  # before a failure that may pass is tried again
REDIRECTS = (301, 302, 303, 307, 308)
PIECE = 2**16
PORTS = {"http": 80, "https": 443}


class Unavailable(DataError):
    """The server says that it cannot answer now."""


def is_public(address: str) -> bool:
    """Whether an address belongs to the internet at large: not private, loopback, link-local,
    shared, multicast or reserved, nor an IPv6 form of such an IPv4 address."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 6:
        inner = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        if ip in ipaddress.ip_network("64:ff9b::/96"):  # NAT64
            inner.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
        if not all(is_public(str(v4)) for v4 in inner if v4 is not None):
            return False
        if ip.ipv4_mapped is not None:
            return True
        if ip.is_site_local:
            return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)


def fetch(
    url: str,
    max_bytes: int,
    timeout_s: float,
    allowed: Callable[[str], bool] = is_public,
    resolve: Callable[..., list] = socket.getaddrinfo,
) -> bytes:
    """The body of what `url` names.

    Args:
        max_bytes: of the body; more is refused, as far as possible unread.
        timeout_s: for everything after the name is resolved, redirects included.
        allowed: which addresses may be connected to.
        resolve: as `socket.getaddrinfo`.

    Raises:
        DataError: a URL, address, status, size or time that is not accepted; begins with the URL.
    """
    deadline = time.monotonic() + timeout_s
    for pause in (*PAUSES_S, None):
        try:
            return follow(url, max_bytes, deadline, allowed, resolve)
        except (OSError, ValueError, http.client.HTTPException) as error:
            left = deadline - time.monotonic()
            if pause is None or left <= pause or not may_pass(error):
                late = left <= 0 and not isinstance(error, DataError)
                reason = f"not there within data.remote_timeout_s = {timeout_s}" if late else error
                raise DataError(f"{url:.200}: {reason or type(error).__name__}") from error
        time.sleep(pause)


def may_pass(error: Exception) -> bool:
    if isinstance(error, socket.gaierror):
        return error.errno == socket.EAI_AGAIN
    return isinstance(error, ConnectionError | Unavailable) or passes(error)


def follow(url: str, max_bytes: int, deadline: float, allowed, resolve) -> bytes:
    for _ in range(MAX_REDIRECTS + 1):
        body, location = get(url, max_bytes, deadline, allowed, resolve)
        if body is not None:
            return body
        url = urljoin(url, location)
    raise DataError(f"more than {MAX_REDIRECTS} redirects")


def get(url: str, max_bytes: int, deadline: float, allowed, resolve) -> tuple[bytes | None, str]:
    """(body, "") or (None, where a redirect leads)."""
    parts = urlsplit(url)
    if parts.scheme not in PORTS or not parts.hostname:
        raise DataError(f"{url:.200}: expected http(s)://host/path")
    if parts.username is not None:
        raise DataError("a URL with a user name is not fetched")
    with ExitStack() as stack:
        connection = connect(parts, deadline, allowed, resolve, stack)
        path = parts.path or "/"
        connection.request(
            "GET",
            f"{path}?{parts.query}" if parts.query else path,
            headers={"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "titan_vlm"},
        )
        answer = connection.getresponse()
        if answer.status in REDIRECTS:
            return None, answer.getheader("Location") or ""
        if answer.status >= 500:
            raise Unavailable(f"status {answer.status}")
        if answer.status != 200:
            raise DataError(f"status {answer.status}")
        if answer.getheader("Content-Encoding", "identity") != "identity":
            raise DataError("an encoded answer, though none was asked for")
        try:
            return read(answer, max_bytes), ""
        finally:
            # A connection cut at the deadline looks like the end of an answer.
            if time.monotonic() >= deadline:
                raise TimeoutError


def connect(
    parts: SplitResult, deadline: float, allowed, resolve, stack: ExitStack
) -> http.client.HTTPConnection:
    """A connection to a checked address of the host, cut at the deadline."""
    port = parts.port or PORTS[parts.scheme]
    found = resolve(parts.hostname, port, type=socket.SOCK_STREAM)
    addresses = [where[0] for *_, where in found]
    refused = [address for address in addresses if not allowed(address)]
    if refused or not addresses:
        raise DataError(
            f"{parts.hostname:.100} is {refused[0] if refused else 'nowhere'}; only public "
            "addresses are connected to"
        )
    left = max(deadline - time.monotonic(), 0.001)
    raw = stack.enter_context(socket.create_connection((addresses[0], port), timeout=left))
    # A timeout holds for each read alone, and a server may send a byte at a time: at the deadline
    # the connection is shut from outside. The copy outlives the wrapping in TLS.
    handle = stack.enter_context(raw.dup())
    timer = threading.Timer(max(deadline - time.monotonic(), 0), shut, [handle])
    timer.daemon = True
    timer.start()
    stack.callback(timer.cancel)
    connection = http.client.HTTPConnection(parts.hostname, port)
    connection.sock = raw
    if parts.scheme == "https":
        context = ssl.create_default_context()
        connection.default_port = PORTS["https"]
        connection.sock = stack.enter_context(
            context.wrap_socket(raw, server_hostname=parts.hostname)
        )
    return connection


def shut(handle: socket.socket) -> None:
    try:
        handle.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # it was over already


def read(answer: http.client.HTTPResponse, max_bytes: int) -> bytes:
    """The body, unless it is too long."""
    stated = answer.length or 0
    pieces, size = [], 0
    while stated <= max_bytes and size <= max_bytes:
        piece = answer.read(PIECE)
        if not piece and size < stated:
            raise DataError(f"the answer ends after {size} of {stated} bytes")
        if not piece:
            return b"".join(pieces)
        pieces.append(piece)
        size += len(piece)
    raise DataError(
        f"an answer of {max(stated, size)} bytes or more, at most data.max_sample_bytes = "
        f"{max_bytes}"
    )
