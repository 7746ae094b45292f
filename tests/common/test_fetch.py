"""URLs that clients name: listed hosts only, public addresses only, whatever names and redirects say."""

import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from llave_jax.common import fetch
from llave_jax.common.fetch import Fetcher, FetchError, is_public


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        path, _, target = self.path.partition("?to=")
        self.server.asked.append((self.path, self.headers["Host"]))
        if path == "/redirect":
            self.send_response(302)
            self.send_header("Location", target)
            self.end_headers()
        elif path == "/missing":
            self.send_error(404)
        elif path == "/endless":
            self.send_response(200)
            self.end_headers()
            with_no_end = b"x" * 1000
            for _ in range(10_000):
                self.wfile.write(with_no_end)
        else:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"content of " + path.encode())

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def host():
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture
def names(monkeypatch, host):
    """Names that lead to 127.0.0.1, where the server is, and to others."""
    addresses = {
        "images.test": ["127.0.0.1"],
        "a.below.test": ["127.0.0.1"],
        "intern.test": ["10.1.2.3"],
        "both.test": ["127.0.0.1", "169.254.169.254"],
    }

    def look_up(name, port, *args, **kwargs):
        if name in addresses:
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in addresses[name]]
        return real(name, port, *args, **kwargs)

    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return addresses


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        *(
            (address, False)
            for address in (
                *(
                    "127.0.0.1",
                    "10.0.0.1",
                    "172.16.0.1",
                    "192.168.1.1",
                    "169.254.169.254",
                    "0.0.0.0",
                ),
                *(
                    "100.64.0.1",
                    "224.0.0.1",
                    "255.255.255.255",
                    "::1",
                    "::",
                    "fe80::1%eth0",
                    "fc00::1",
                ),
                *(
                    "ff02::1",
                    "::ffff:127.0.0.1",
                    "::ffff:10.0.0.1",
                    "64:ff9b::10.0.0.1",
                    "2002:0a00:0001::",
                ),
            )
        ),
    ],
)
def test_which_addresses_are_public(address, public):
    assert is_public(address) is public


def test_a_listed_host_is_read(host, names):
    port = host.server_address[1]
    fetcher = Fetcher(
        [f"http://images.test:{port}", f"http://*.below.test:{port}"],
        may_connect="127.0.0.1".__eq__,
    )
    url = f"http://images.test:{port}"
    assert fetcher(f"{url}/a.png?x=1", 100) == b"content of /a.png?x=1"
    assert host.asked[-1] == ("/a.png?x=1", f"images.test:{port}")
    assert fetcher(f"http://a.below.test:{port}/b", 100) == b"content of /b"
    # Below the host, not the host itself, nor one whose name ends alike.
    for name in ("below.test", "notbelow.test"):
        with pytest.raises(FetchError, match="not among the hosts"):
            fetcher(f"http://{name}:{port}/b", 100)
    with pytest.raises(FetchError, match="answers 404"):
        fetcher(f"{url}/missing", 100)
    with pytest.raises(FetchError, match="has more than 100000 bytes"):
        fetcher(f"{url}/endless", 100_000)
    assert fetcher(f"{url}/redirect?to=/c", 100) == b"content of /c"
    with pytest.raises(FetchError, match="more than 3 redirects"):
        fetcher(f"{url}/redirect?to=/redirect?to=/redirect?to=/redirect?to=/redirect?to=/a", 100)


@pytest.mark.parametrize(
    "target",
    [
        "http://127.0.0.1:{port}/secret",
        "http://intern.test:{port}/secret",
        "https://images.test:{port}/secret",
        "http://images.test:1/secret",
        "file:///etc/passwd",
        "ftp://images.test/secret",
        "//intern.test/secret",
        "",
    ],
)
def test_redirects_are_checked(host, names, target):
    port = host.server_address[1]
    fetcher = Fetcher([f"http://images.test:{port}"], may_connect="127.0.0.1".__eq__)
    host.asked.clear()
    with pytest.raises(FetchError):
        fetcher(f"http://images.test:{port}/redirect?to={target.format(port=port)}", 100)
    assert not [path for path, _ in host.asked if path.startswith("/secret")]


def test_private_addresses_are_never_read(host, names):
    port = host.server_address[1]
    host.asked.clear()
    urls = [
        f"http://{name}:{port}" for name in ("images.test", "intern.test", "127.0.0.1", "localhost")
    ]
    fetcher = Fetcher([*urls, f"http://both.test:{port}"])
    for url in (*urls, f"http://both.test:{port}"):
        with pytest.raises(FetchError, match="is not on the public internet"):
            fetcher(f"{url}/secret", 100)
    # Two addresses of which one is private: refused, whichever comes first.
    fetcher = Fetcher([f"http://both.test:{port}"], may_connect="127.0.0.1".__eq__)
    with pytest.raises(FetchError, match="is not on the public internet"):
        fetcher(f"http://both.test:{port}/secret", 100)
    assert not host.asked


def test_a_name_that_changes_its_address(host, names):
    """The name is looked up once; the connection goes to what was checked."""
    port = host.server_address[1]
    looked_up = []

    def may_connect(address):
        looked_up.append(address)
        names["images.test"] = ["10.1.2.3"]
        return True

    fetcher = Fetcher([f"http://images.test:{port}"], may_connect=may_connect)
    assert fetcher(f"http://images.test:{port}/a", 100) == b"content of /a"
    assert looked_up == ["127.0.0.1"]


@pytest.mark.parametrize(
    "url",
    [
        "http://images.test@intern.test/a",
        "http://user:password@images.test/a",
        "http://images.test\\@intern.test/a",
        "http://images.test\r\nX: y/a",
        "http://images.test/a b",
        "http://images.test:99999/a",
        "http://[::1/a",
        "http:///a",
        "http://ımages.test/a",
        "gopher://images.test/a",
    ],
)
def test_urls_that_are_not_plain(names, url):
    fetcher = Fetcher(["http://images.test"], may_connect=lambda _: True)
    with pytest.raises(FetchError):
        fetcher(url, 100)


def test_a_host_that_does_not_answer(monkeypatch):
    monkeypatch.setattr(fetch, "SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(FetchError, match="cannot be read"):
            Fetcher([url], may_connect=lambda _: True)(f"{url}/a", 100)


@pytest.mark.parametrize(
    "host",
    ["", "*", "*.", "a*.test", "images.test/path", "ftp://images.test", "a.test:x", "u@a.test"],
)
def test_lists_that_are_refused(host):
    with pytest.raises(ValueError, match="--allow-url"):
        Fetcher([host])
