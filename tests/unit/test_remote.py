"""Pictures over http: never from a private address, never without an end. A server on the loopback
address stands for the internet; no test leaves the machine."""

import io
import shutil
import socket
import ssl
import subprocess
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from titan_vlm.data import sample
from titan_vlm.data.config import Data
from titan_vlm.data.limits import limits
from titan_vlm.data.remote import fetch, is_public
from titan_vlm.data.sources.messages import from_openai, image_ref
from titan_vlm.errors import DataError


class Server(ThreadingHTTPServer):
    """Answers every path with what `answers` says; `asked` are (host header, path)."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.asked = {}, []
        self.port = self.server_address[1]
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def url(self, path, host="pictures.example"):
        return f"http://{host}:{self.port}{path}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append((self.headers["Host"], self.path))
        answer = self.server.answers[self.path]
        try:
            answer(self) if callable(answer) else self.send(200, answer)
        except OSError:
            self.close_connection = True  # the client has hung up, as it should

    def send(self, status, body=b"", **headers):
        self.send_response(status)
        stated = {"Content_Length": str(len(body))} | headers
        for name, value in stated.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words):
        pass


@pytest.fixture
def server():
    with Server() as server:
        yield server
        server.shutdown()


def resolver(**names):
    """As socket.getaddrinfo, for these names (dots as underscores) alone, each with its answers in
    turn."""
    left = {name.replace("_", "."): list(answers) for name, answers in names.items()}

    def resolve(host, port, type):
        return [(socket.AF_INET, type, 6, "", (left[host].pop(0), port))]

    return resolve


def everywhere(address):
    return True


HOME = {"pictures_example": ["127.0.0.1"] * 10}


def get(url, names=HOME, max_bytes=1000, timeout_s=60.0, allowed=everywhere):
    return fetch(url, max_bytes, timeout_s, allowed, resolver(**names))


def test_a_picture_is_fetched_from_the_checked_address_under_its_own_name(server):
    server.answers["/a.png?size=1"] = b"bytes"
    checked = []
    body = get(server.url("/a.png?size=1"), allowed=lambda ip: not checked.append(ip))
    assert body == b"bytes" and checked == ["127.0.0.1"]
    assert server.asked == [(f"pictures.example:{server.port}", "/a.png?size=1")]


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0",
        "100.64.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255", "::1", "::", "fe80::1%eth0",
        "fd00::1", "fec0::1", "ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1",
        "2002:7f00:1::",
    ],
)  # fmt: skip
def test_private_addresses_are_never_connected_to(server, address):
    assert not is_public(address)
    with pytest.raises(DataError, match=r"pictures.example is .*; only public addresses"):
        get(server.url("/"), {"pictures_example": [address]}, allowed=is_public)
    assert server.asked == []


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8"])
def test_public_addresses_are(address):
    assert is_public(address)


def test_one_private_address_among_public_ones_is_enough_to_refuse():
    def resolve(host, port, type):
        return [(2, type, 6, "", (ip, port)) for ip in ("8.8.8.8", "10.0.0.1")]

    with pytest.raises(DataError, match="is 10.0.0.1; only public"):
        fetch("http://x.example/", 10, 1.0, resolve=resolve)


def test_a_name_is_resolved_once_so_that_a_second_answer_gains_nothing(server):
    """DNS rebinding: what is connected to is what was checked, not what the name says later."""
    server.answers["/"] = b"x"
    names = {"pictures_example": ["127.0.0.1", "10.0.0.1"]}
    assert get(server.url("/"), names, allowed=lambda ip: ip == "127.0.0.1") == b"x"


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/",
        "http://[::1]/",
        "http://localhost/",
        "http://0x7f.1/",
        "http://2130706433/",
    ],
)
def test_the_machine_itself_is_refused_with_the_real_resolver(url):
    with pytest.raises(DataError, match="only public addresses are connected to"):
        fetch(url, 10, 1.0)


def test_redirects_are_followed_and_checked_again(server):
    server.answers["/a"] = lambda h: h.send(302, Location="/b")
    server.answers["/b"] = b"there"
    server.answers["/inside"] = lambda h: h.send(302, Location=server.url("/b", "inside.example"))
    names = HOME | {"inside_example": ["127.0.0.2"]}
    assert get(server.url("/a")) == b"there"
    with pytest.raises(DataError, match="inside.example is 127.0.0.2; only public"):
        get(server.url("/inside"), names, allowed=lambda ip: ip == "127.0.0.1")
    for where in ("file:///etc/passwd", "ftp://pictures.example/", ""):
        server.answers["/away"] = lambda h, where=where: h.send(302, Location=where)
        with pytest.raises(DataError, match="expected http|more than 5 redirects"):
            get(server.url("/away"))


def test_redirects_have_an_end(server):
    server.answers["/a"] = lambda h: h.send(302, Location="/a")
    with pytest.raises(DataError, match="more than 5 redirects"):
        get(server.url("/a"))
    assert len(server.asked) == 6


@pytest.mark.parametrize("stated", [True, False])
def test_a_long_answer_is_not_read(server, stated):
    sent = []

    def endless(handler):
        headers = {"Content-Length": str(10**12)} if stated else {}
        handler.send_response(200)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        while True:
            handler.wfile.write(b"x" * 1000)
            sent.append(1000)

    server.answers["/"] = endless
    with pytest.raises(DataError, match=r"an answer of \d+ bytes or more, at most data.max_samp"):
        get(server.url("/"), max_bytes=100_000)
    time.sleep(0.1)
    assert sum(sent) < 20_000_000  # what the operating system holds, not a terabyte


def drip(handler):
    """A byte now and then, each well within a timeout per read."""
    for byte in b"HTTP/1.1 200 OK\r\nX: " + b"x" * 1000:
        handler.wfile.write(bytes([byte]))
        time.sleep(0.05)


def silent(handler):
    time.sleep(20)


def stuck_body(handler):
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(b"start")
    time.sleep(20)


@pytest.mark.parametrize("answer", [drip, silent, stuck_body])
def test_a_slow_answer_ends_at_the_deadline(server, answer):
    server.answers["/"] = answer
    start = time.monotonic()
    with pytest.raises(DataError, match="not there within data.remote_timeout_s = 0.5"):
        get(server.url("/"), timeout_s=0.5)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://", "expected http"),
        ("http://[x", "Invalid IPv6"),
        ("http://a:99999/", "[Pp]ort"),
        ("http://user:word@pictures.example/", "user name"),
        ("gopher://pictures.example/", "expected http"),
        ("http://" + "a" * 300 + "/", "."),
        ("http://\ud800/", "."),
    ],
)
def test_odd_urls_are_refused(url, said):
    with pytest.raises(DataError, match=said):
        fetch(url, 10, 1.0)


def test_a_path_with_a_line_end_is_no_second_request(server):
    with pytest.raises(DataError):
        get(server.url("/a HTTP/1.1\r\nX: y"))
    assert server.asked == []


def test_other_answers_are_refused(server):
    server.answers["/no"] = lambda h: h.send(404)
    server.answers["/gzip"] = lambda h: h.send(200, b"x", Content_Encoding="gzip")
    server.answers["/short"] = lambda h: h.send(200, b"x", Content_Length="10")
    for path, said in (
        ("/no", "status 404"),
        ("/gzip", "encoded"),
        ("/short", "ends after 1 of 10 "),
    ):
        with pytest.raises(DataError, match=said):
            get(server.url(path))


def test_a_failure_that_passes_is_tried_again_within_the_time_and_others_are_not(server):
    def failing(times):
        left = iter([503, None][:times])

        def answer(handler):
            status = next(left, 200)
            return handler.send(status, b"there") if status else handler.connection.close()

        return answer

    for times in (1, 2):  # a status of 503; then also a connection that is cut
        server.answers["/"] = failing(times)
        server.asked.clear()
        assert get(server.url("/")) == b"there" and len(server.asked) == times + 1
    server.answers["/"] = lambda h: h.send(503)
    server.asked.clear()
    with pytest.raises(DataError, match="status 503"):
        get(server.url("/"))
    assert len(server.asked) == 3
    server.answers["/"] = lambda h: h.send(404)
    server.asked.clear()
    with pytest.raises(DataError, match="status 404"):
        get(server.url("/"))
    assert len(server.asked) == 1


def test_nothing_is_fetched_unless_it_is_allowed(server, monkeypatch):
    content = [{"type": "image_url", "image_url": {"url": server.url("/", "127.0.0.1")}}]
    messages = [{"role": "user", "content": content}]
    with pytest.raises(DataError, match="remote files are not fetched.*data.allow_remote = true"):
        from_openai(messages, "")
    allowed = limits(Data(allow_remote=True))
    (message,) = from_openai(messages, "", limits=allowed)
    with pytest.raises(DataError, match="is 127.0.0.1; only public addresses"):
        message["content"][0]["image"].header_size()
    assert server.asked == []

    buffer = io.BytesIO()
    Image.new("RGB", (40, 20)).save(buffer, "PNG")
    server.answers["/a.png"] = buffer.getvalue()
    monkeypatch.setattr(sample, "fetch", partial(fetch, allowed=everywhere))
    ref = image_ref(server.url("/a.png", "127.0.0.1"), "", allowed)
    assert ref.header_size() == ref.load_rgb().size == (40, 20)


@pytest.fixture
def certificate(tmp_path, monkeypatch):
    """Of pictures.example, made for the test, and trusted by it."""
    if not shutil.which("openssl"):
        pytest.skip("needs openssl to make a certificate")
    key, path = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=pictures.example"
    names = ["-addext", "subjectAltName=DNS:pictures.example"]
    where = ["-keyout", str(key), "-out", str(path)]
    subprocess.run([*command.split(), *names, *where], check=True, capture_output=True)
    trusting = ssl.create_default_context(cafile=path)
    monkeypatch.setattr(ssl, "create_default_context", lambda: trusting)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path, key)
    return context


def test_https_asks_for_the_hosts_own_certificate_and_ends_at_the_deadline(server, certificate):
    server.socket = certificate.wrap_socket(server.socket, server_side=True)
    server.answers |= {"/": b"secret", "/slow": drip}
    names = HOME | {"other_example": ["127.0.0.1"]}
    url = server.url("/").replace("http:", "https:")
    assert get(url, names) == b"secret"
    with pytest.raises(DataError, match="certificate verify failed"):
        get(url.replace("pictures", "other"), names)
    with pytest.raises(DataError, match="not there within data.remote_timeout_s = 0.5"):
        get(url + "slow", names, timeout_s=0.5)


def test_https_to_a_server_without_it_is_refused(server):
    with pytest.raises(DataError, match="SSL"):
        get(server.url("/").replace("http:", "https:"))
