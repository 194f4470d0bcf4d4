"""The HTTP side: paths, limits, access, answers.

    POST /score        {"conversations": [...]} or {"prompts": [...], "responses": [[...], ...]}
    POST /get_reward   OpenRLHF's remote reward model
    POST /classify     vLLM's, to which verl posts
    GET  /health, /contract, /metrics, and / for people

Bodies are read in one thread and scored in another; the event loop only moves bytes.
"""

import asyncio
import base64
import binascii
import hmac
import json
import logging
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from rm.scoring.scorer import Scorer
from rm.serve.batching import Batcher
from rm.serve.bodies import Reader, Request
from rm.serve.metrics import Metrics

PAGE = Path(__file__).with_name("page.html")
# The page runs its own script, posts to this server, and loads nothing from elsewhere.
PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
log = logging.getLogger("rm.serve")


@dataclass(frozen=True)
class Limits:
    """What one client may ask of the server."""

    max_queue: int = 256  # requests that are not answered yet; more are refused
    max_body_bytes: int = 16 * 10**6
    request_timeout: float = 60.0  # seconds for one request, from its header to its answer


class Refused(Exception):
    """A request that is not answered with rewards."""

    def __init__(self, status: int, reason: str, **headers: str):
        super().__init__(reason)
        self.status, self.headers = status, {name.replace("_", "-"): value for name, value in headers.items()}


class App:
    """The routes of a server, and what they share."""

    def __init__(self, scorer: Scorer, name: str, limits: Limits, token: str | None = None):
        """
        Args:
            name: of the model, in answers.
            token: that clients have to send; None: they need none, and have to call the server by a loopback name.
        """
        self.scorer, self.name, self.limits, self.token = scorer, name, limits, token
        self.reader, self.metrics = Reader(scorer, name), Metrics()
        self.reading = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reader")  # a tokenizer uses all cores
        self.batcher = Batcher(scorer.rewards, scorer.max_tokens, self.metrics.computed)
        self.in_progress = 0

    def asgi(self) -> Starlette:
        """The application for an ASGI server."""
        routes = [
            Route("/health", self._health),
            Route("/", self._allowed(self._page)),
            Route("/contract", self._allowed(self._contract)),
            Route("/metrics", self._allowed(self._metrics)),
            Route("/score", self._scored(self.reader.score), methods=["POST"]),
            Route("/get_reward", self._scored(self.reader.openrlhf), methods=["POST"]),
            Route("/classify", self._scored(self.reader.classify), methods=["POST"]),
        ]
        middleware = []
        if self.token is None:  # a page from elsewhere, whose name resolves to this machine, is not served
            names = ["localhost", "127.0.0.1", "[::1]"]
            middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=names, www_redirect=False)]
        return Starlette(routes=routes, middleware=middleware)

    def close(self) -> None:
        """Compute what has been accepted, and end the threads."""
        self.reading.shutdown()
        self.batcher.close()

    async def _health(self, request: HttpRequest) -> Response:
        return JSONResponse({"status": "ok", "model": self.name})

    async def _page(self, request: HttpRequest) -> Response:
        page = PAGE.read_text(encoding="utf-8")
        return HTMLResponse(page, headers={"Content-Security-Policy": PAGE_POLICY})

    async def _contract(self, request: HttpRequest) -> Response:
        """How texts are written: scoring.json, with what its reader has to know beyond it."""
        encoder, agreed = self.scorer.encoder, self.scorer.contract
        return JSONResponse(
            {
                "model": self.name,
                "contract": None if agreed is None else asdict(agreed),
                "max_length": encoder.max_length,
                "overlong": "filter" if encoder.cut is None else "truncate",
                "special_tokens": sorted(encoder.tokenizer.special),
            }
        )

    async def _metrics(self, request: HttpRequest) -> Response:
        return PlainTextResponse(self.metrics.text(self.in_progress), media_type="text/plain; version=0.0.4")

    def _allowed(self, respond: Callable[[HttpRequest], Awaitable[Response]]) -> Callable:
        async def endpoint(request: HttpRequest) -> Response:
            try:
                self._check_access(request)
                return await respond(request)
            except Refused as refused:
                return _error(refused)

        return endpoint

    def _scored(self, read: Callable[[dict], Request]) -> Callable:
        """The endpoint of a shape of requests, which `read` reads."""

        async def endpoint(request: HttpRequest) -> Response:
            began = time.perf_counter()
            try:
                self._check_access(request)
                response = JSONResponse(await self._rewards(request, read))
                self.metrics.answered(time.perf_counter() - began)
            except Refused as refused:
                response = _error(refused)
            except ClientDisconnect:
                response = Response(status_code=499)  # which nobody reads
            except Exception as error:
                log.exception("a request failed")
                response = _error(Refused(500, f"{type(error).__name__}: {error}"))
            labels = f'{{path="{request.url.path}",status="{response.status_code}"}}'
            self.metrics.count("rm_requests_total", labels)
            return response

        return endpoint

    async def _rewards(self, request: HttpRequest, read: Callable[[dict], Request]) -> dict:
        """The answer to a request, within the limits."""
        if self.in_progress >= self.limits.max_queue:
            raise Refused(429, f"{self.in_progress} requests are waiting: try again later", Retry_After="1")
        self.in_progress += 1
        try:
            return await asyncio.wait_for(self._answer(request, read), self.limits.request_timeout)
        except asyncio.TimeoutError:
            raise Refused(
                504, f"not answered within {self.limits.request_timeout:g} s (--request_timeout); post fewer texts"
            ) from None
        finally:
            self.in_progress -= 1

    async def _answer(self, request: HttpRequest, read: Callable[[dict], Request]) -> dict:
        # Another site's page can post other types without asking this server first.
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise Refused(415, "expected the header Content-Type: application/json")
        body = await self._body(request)
        loop = asyncio.get_running_loop()
        asked, future = await loop.run_in_executor(self.reading, self._submit, body, read)
        rewards = await asyncio.wrap_future(future)
        if not np.isfinite(rewards).all():
            bad = int(np.flatnonzero(~np.isfinite(rewards))[0])
            raise Refused(500, f"the reward of text {bad} is {rewards[bad]}, not a finite number")
        return asked.answer(rewards)

    def _submit(self, body: bytes, read: Callable[[dict], Request]) -> tuple[Request, Future]:
        asked = _read(body, read)
        return asked, self.batcher.submit(asked.texts)

    async def _body(self, request: HttpRequest) -> bytes:
        limit, received = self.limits.max_body_bytes, bytearray()
        declared = request.headers.get("content-length", "0")
        too_large = Refused(413, f"the body has more than {limit:,} bytes (--max_body_mb): post fewer texts at a time")
        if declared.isdecimal() and int(declared) > limit:
            raise too_large
        async for chunk in request.stream():
            received += chunk
            if len(received) > limit:
                raise too_large
        return bytes(received)

    def _check_access(self, request: HttpRequest) -> None:
        """Raise Refused where a token is needed and the request has another one or none."""
        if self.token is None:
            return
        given = _token_in(request.headers.get("authorization", ""))
        if not hmac.compare_digest(given.encode(), self.token.encode()):
            ask = 'Basic realm="reward model", charset="UTF-8"'  # a browser asks for it
            raise Refused(401, "needs the server's token, as a bearer token or as a password", WWW_Authenticate=ask)


def _read(body: bytes, read: Callable[[dict], Request]) -> Request:
    """Parse a body. Raises Refused where it is not JSON, or cannot be scored."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:  # the latter for lists in lists without end
        raise Refused(400, f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise Refused(400, f"the body is a JSON {type(value).__name__}; expected an object")
    try:
        return read(value)
    except ValueError as error:
        raise Refused(422, str(error)) from None


def _token_in(authorization: str) -> str:
    """The token of `Bearer TOKEN`, or the password of `Basic ...`, which has the form user:password in base64."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value).decode().partition(":")[2]
        except (binascii.Error, ValueError):
            return ""
    return ""


def _error(refused: Refused) -> Response:
    return JSONResponse({"error": str(refused)}, refused.status, headers=refused.headers)
