"""A Hub in this process: the part of the Hugging Face Hub's HTTP API that huggingface_hub 1.18 to 2.4 calls for models.

Repositories, preupload, large files in one part or several (git LFS), commits, pull requests, branches, tags, trees and
downloads with ETag, Range, redirects to another host for large files, and errors by code. Large files come and go by
Xet's storage protocol too (`storage.py`), which is the client's way unless it is switched off.
"""
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from .faults import Fault, corrupted, take
from .store import HubError, Store, User

PART = 1 << 16  # large files above this come in parts of this size


class Reply(NamedTuple):
    status: int = 200
    body: bytes = b''
    headers: dict[str, str] = {}


class Request(NamedTuple):
    method: str
    path: str
    query: dict[str, str]
    headers: Any
    body: bytes
    user: User | None

    def json(self) -> Any:
        return json.loads(self.body or b'{}')


class TestHub:
    """The server and what tests ask of it; it listens from the start and answers from `start` on.

    Attributes:
        store: What it holds; `reset` makes a new one.
        faults: Faults to come.
        log: ``(method, path)`` of the requests since the last reset.
        cdn_tokens: Tokens that were sent to the host of large files, which must not get any.
    """
    __test__ = False

    def __init__(self) -> None:
        hub = self

        class BoundHandler(Handler):
            def setup(self) -> None:
                self.hub = hub
                super().setup()

        self.http = ThreadingHTTPServer(('127.0.0.1', 0), BoundHandler)
        self.http.daemon_threads = True
        self.port = self.http.server_address[1]
        self.url, self.cdn = f'http://127.0.0.1:{self.port}', f'http://localhost:{self.port}'
        self.thread: threading.Thread | None = None
        self.lock = threading.RLock()
        self.reset()

    def start(self) -> None:
        if self.thread is None:
            self.thread = threading.Thread(target=self.http.serve_forever, kwargs=dict(poll_interval=0.05), daemon=True)
            self.thread.start()

    def reset(self) -> None:
        self.store = Store()
        self.faults: list[Fault] = []
        self.log: list[tuple[str, str]] = []
        self.cdn_tokens: list[str] = []

    def fail(self, kind: str, method: str, path: str, **kwargs: Any) -> Fault:
        """Let the next matching requests fail; see `faults`."""
        self.faults.append(Fault(kind, method, path, **kwargs))
        return self.faults[-1]

    def count(self, method: str, path: str) -> int:
        """Requests so far."""
        return sum(m == method and re.search(path, p) is not None for m, p in self.log)


class Handler(BaseHTTPRequestHandler):
    """One connection; the routes are in `routes.py`."""
    hub: TestHub
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True  # a reply is several writes, and each would wait 40 ms for the client's ACK

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def handle_any(self) -> None:
        from .routes import answer
        url = urlsplit(self.path)
        query = {k: v[0] for k, v in parse_qs(url.query).items()}
        token = self.headers.get('Authorization', '').removeprefix('Bearer ')
        path = url.path
        body = self._read_body()
        with self.hub.lock:
            self.hub.log.append((self.command, unquote(path)))
            fault = take(self.hub.faults, self.command, unquote(path))
            elsewhere = self.headers.get('Host', '').startswith('localhost')
            if elsewhere and token and not path.startswith('/cas/'):
                self.hub.cdn_tokens.append(token)
            if fault and fault.kind == 'cut':
                return self._cut()
            if fault and fault.kind == 'status':
                return self._send(Reply(fault.status, fault.body, fault.headers), None)
            user = self.hub.store.users.get(token)
            if token and user is None and not elsewhere:
                reply = error_reply(HubError(401, 'Invalid credentials in Authorization header'))
            else:
                try:
                    reply = answer(self.hub, Request(self.command, path, query, self.headers, body, user))
                except HubError as e:
                    reply = error_reply(e)
        if fault and fault.kind == 'cut_after':
            return self._cut()
        self._send(reply, fault)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any  # noqa: N815

    def _read_body(self) -> bytes:
        if self.headers.get('Transfer-Encoding', '').lower() != 'chunked':
            return self.rfile.read(int(self.headers.get('Content-Length') or 0))
        body = b''
        while size := int(self.rfile.readline().split(b';')[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _cut(self) -> None:
        self.close_connection = True
        self.connection.shutdown(2)

    def _send(self, reply: Reply, fault: Fault | None) -> None:
        kind = fault.kind if fault else ''
        body = corrupted(reply.body, is_xorb=self.path.startswith('/xorbs/')) if kind == 'corrupt' else reply.body
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        if 'Content-Length' not in reply.headers:
            self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        if self.command == 'HEAD':
            return
        half = len(body) // 2
        try:
            self.wfile.write(body[:half])
            self.wfile.flush()
            if kind == 'cut_body':
                return self._cut()
            if kind == 'slow' and fault:
                time.sleep(fault.seconds)
            self.wfile.write(body[half:])
        except (BrokenPipeError, ConnectionResetError):  # the client went away
            self.close_connection = True


def error_reply(error: HubError) -> Reply:
    headers = {'X-Error-Message': str(error), 'Content-Type': 'application/json'}
    if error.code:
        headers['X-Error-Code'] = error.code
    return Reply(error.status, json.dumps(dict(error=str(error))).encode(), headers)


def json_reply(value: Any, status: int = 200) -> Reply:
    return Reply(status, json.dumps(value).encode(), {'Content-Type': 'application/json'})
