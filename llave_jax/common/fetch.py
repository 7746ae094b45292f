"""Files behind URLs that others name: from listed hosts or public ones, and never from a private network.

Owns every outgoing connection for items. The server has no `Fetcher` without `--allow-url`.

A host's addresses are looked up once, all of them must be public, and the connection goes to an address that was
checked: a name that leads elsewhere a moment later (DNS rebinding) changes nothing. Each redirect is checked like
the first URL. Proxies of the environment are not used, as they would choose the address themselves.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from urllib.parse import urljoin, urlsplit

REDIRECTS = 3
SECONDS = 20.0
_PORTS = {"http": 80, "https": 443}
_PIECE = 1 << 16


class FetchError(ValueError):
    """A URL that is not allowed or cannot be fetched; the message is meant for the client."""


def is_public(address: str) -> bool:
    """Whether an address belongs to the public internet.

    Args:
      address: IPv4 or IPv6.

    Returns:
      False for private, loopback, link-local, multicast and reserved ones, and for IPv6 forms that hold such an
      IPv4 address.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        # 64:ff9b::/96 and ::/96 translate to the IPv4 address in their last four bytes.
        if ip in _NAT64 or ip in _COMPATIBLE:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not ip.is_multicast


_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_COMPATIBLE = ipaddress.IPv6Network("::/96")


class Fetcher:
    """`fetcher(url, most_bytes) -> bytes`, for listed hosts. It may be called by several threads.

    Args:
      hosts: as the operator lists them: `example.com` (https, its usual port), `example.com:8443`,
        `http://example.com`, `*.example.com` for every host below it. None: any host.
      may_connect: whether an address may be connected to. Tests connect to their own machine, and a program may
        trust its own network: `lambda address: True`.
      context: of TLS; None: certificates of the system.

    Raises:
      ValueError: a host is not written like that.
    """

    def __init__(
        self,
        hosts: Sequence[str] | None,
        *,
        may_connect: Callable[[str], bool] = is_public,
        context: ssl.SSLContext | None = None,
    ):
        self._allowed = None if hosts is None else {_listed(host) for host in hosts}
        self._may_connect = may_connect
        self._context = context or ssl.create_default_context()

    def __call__(self, url: str, most: int) -> bytes:
        """Fetches a file.

        Args:
          url: http or https.
          most: bytes of the largest file.

        Returns:
          Its content.

        Raises:
          FetchError: the URL or a redirect is not allowed, or it cannot be fetched.
        """
        end = time.monotonic() + SECONDS
        for _ in range(REDIRECTS + 1):
            answer = self._get(url, most, end)
            if isinstance(answer, bytes):
                return answer
            url = answer
        raise FetchError(f"the URL has more than {REDIRECTS} redirects")

    def _get(self, url: str, most: int, end: float) -> bytes | str:
        """The content, or the URL that it is redirected to."""
        scheme, host, port, target = self._checked(url)
        address = self._address(host, port)
        connection = _Pinned(host, port, address, self._context if scheme == "https" else None, end)
        try:
            connection.request(
                "GET", target, headers={"Accept": "image/*,video/*", "User-Agent": "llave_jax"}
            )
            response = connection.getresponse()
            if response.status in (301, 302, 303, 307, 308):
                return urljoin(url, response.getheader("Location") or "")
            if response.status != 200:
                raise FetchError(f"{host} answers {response.status}")
            return _content(response, connection, most, end, host)
        except FetchError:
            raise
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise FetchError(f"{host} cannot be read ({type(error).__name__})") from error
        finally:
            connection.close()

    def _checked(self, url: str) -> tuple[str, str, int, str]:
        """(scheme, host, port, path with query) of a URL that is allowed."""
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise FetchError("the URL is not valid") from error
        scheme = parts.scheme.lower()
        if scheme not in _PORTS or not host or "@" in parts.netloc or not url.isascii():
            raise FetchError("the URL is not valid; expected https://host/path")
        if any(ord(character) <= 32 or ord(character) == 127 for character in url):
            raise FetchError("the URL has white space or control characters")
        port = port or _PORTS[scheme]
        names = [host, *("*" + host[at:] for at, letter in enumerate(host) if letter == ".")]
        allowed = self._allowed
        if allowed is not None and not any((scheme, name, port) in allowed for name in names):
            raise FetchError(
                f"{scheme}://{host[:100]}:{port} is not among the hosts that are fetched from"
            )
        target = parts.path or "/"
        return scheme, host, port, f"{target}?{parts.query}" if parts.query else target

    def _address(self, host: str, port: int) -> str:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise FetchError(f"{host} has no address") from error
        addresses = [str(entry[4][0]) for entry in found]
        if not addresses or not all(map(self._may_connect, addresses)):
            raise FetchError(f"{host} is not on the public internet")
        return addresses[0]


def _listed(host: str) -> tuple[str, str, int]:
    """(scheme, name or *.name, port) of an entry of the operator's list."""
    parts = urlsplit(host if "://" in host else f"https://{host}")
    try:
        port = parts.port
    except ValueError:
        port = None
        parts = parts._replace(scheme="")
    name = (parts.hostname or "").lower()
    plain = not (parts.path.strip("/") or parts.query or parts.username)
    if parts.scheme not in _PORTS or not name.strip("*.") or not plain or "*" in name[1:]:
        raise ValueError(
            f"--allow-url {host}: expected a host, such as images.example.com, *.example.com or "
            "http://example.com:8080"
        )
    return parts.scheme, name, port or _PORTS[parts.scheme]


def _content(
    response: http.client.HTTPResponse, connection: _Pinned, most: int, end: float, host: str
) -> bytes:
    pieces, size = [], 0
    while True:
        connection.set_timeout(end)
        piece = response.read1(_PIECE)
        if not piece:
            return b"".join(pieces)
        pieces.append(piece)
        size += len(piece)
        if size > most:
            raise FetchError(f"the file at {host} has more than {most} bytes")


class _Pinned(http.client.HTTPConnection):
    """A connection to a checked address, in the name of its host."""

    def __init__(
        self, host: str, port: int, address: str, context: ssl.SSLContext | None, end: float
    ):
        super().__init__(host, port)
        if context is not None and port == 443:
            self.default_port = 443  # keeps the port out of the Host header
        self._address, self._tls, self._end = address, context, end

    def connect(self) -> None:
        """Connects to the address, whatever the name leads to now."""
        self.sock = socket.create_connection(
            (self._address, self.port), max(0.1, self._end - time.monotonic())
        )
        if self._tls is not None:
            self.sock = self._tls.wrap_socket(self.sock, server_hostname=self.host)

    def set_timeout(self, end: float) -> None:
        """No read lasts longer than to `end`."""
        left = end - time.monotonic()
        if left <= 0:
            raise FetchError(f"{self.host} is too slow")
        if self.sock is not None:
            self.sock.settimeout(left)
