"""A server in a thread of the test's own process, and what is posted to it."""

import contextlib
import json
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator

import uvicorn

from rm.serve.app import App


@contextlib.contextmanager
def serving(app: App) -> Iterator[str]:
    """The URL of a running server."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app.asgi(), log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        app.close()


def ask(url: str, body=None, data: bytes | None = None, **headers: str) -> tuple[int, object, dict]:
    """(status, answer, headers) of a GET, or of a POST where there is a body; JSON is parsed."""
    if body is not None:
        data = json.dumps(body).encode()
    headers = {"Content-Type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=30) as response:
            status, content, given = response.status, response.read(), response.headers
    except urllib.error.HTTPError as error:
        status, content, given = error.code, error.read(), error.headers
    is_json = given.get("content-type") == "application/json"
    return status, json.loads(content) if is_json else content.decode(), dict(given)
