"""Serve a reward model over HTTP.

    python -m rm.serve runs/rm/model --port 8000
    curl http://127.0.0.1:8000/score -H "Content-Type: application/json" \\
        -d '{"prompts": ["Is 7 prime?"], "responses": [["Yes.", "No."]]}'

Texts are written, and rewards read, as the model's scoring.json says; a model whose probe texts score otherwise is not
served. At http://127.0.0.1:8000 is a page on which to try replies. Clients: docs/serving.md. Needs the extra `serve`.
"""

import os
import signal
import socket
import sys
from dataclasses import dataclass

from rm import cli
from rm.config import SettingsGroup, parse, require_positive, setting
from rm.distributed import process_group as dist
from rm.hf import hub
from rm.hf.build import ModelSettings
from rm.scoring.scorer import Scorer
from rm.scoring.settings import ScoringTextSettings

TOKEN = "RM_SERVE_TOKEN"  # an environment variable, as a command line can be read by every user of a machine
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, kw_only=True)
class ServeSettings(SettingsGroup):
    """Server"""

    host: str = setting(
        "127.0.0.1", f"address to listen on; clients of any other have to send the token in ${TOKEN}; 0.0.0.0: all"
    )
    port: int = setting(8000, "port to listen on; 0: any that is free")
    dtype: str = setting("auto", "of the computation; auto: as eval_rm.py", ("auto", "float32", "bfloat16"))
    max_tokens: int = setting(4096, "tokens computed at a time; more where one text has more")
    max_queue: int = setting(256, "requests that wait or are computed; further ones are refused with status 429")
    max_body_mb: float = setting(16.0, "largest body of a request in 10^6 bytes; larger ones get status 413")
    request_timeout: float = setting(60.0, "seconds until a request that is not answered gets status 504")

    def check(self) -> None:
        if not 0 <= self.port < 65536:
            raise ValueError(f"--port must be from 0 to 65535, got {self.port}")
        require_positive(
            max_tokens=self.max_tokens,
            max_queue=self.max_queue,
            max_body_mb=self.max_body_mb,
            request_timeout=self.request_timeout,
        )


@dataclass(frozen=True, kw_only=True)
class Settings(SettingsGroup):
    """Settings of a server"""

    model: ModelSettings
    serve: ServeSettings
    text: ScoringTextSettings


def main(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT; requests that have been accepted are answered first."""
    serve = settings.serve
    try:
        import uvicorn

        from rm.serve.app import App, Limits
    except ImportError as error:
        raise ValueError(f"serving needs starlette and uvicorn, the extra `serve` ({error})") from None
    token = os.environ.get(TOKEN) or None
    if serve.host not in LOOPBACK and token is None:
        raise ValueError(f"--host {serve.host}: others can reach it, so set a token that clients send: {TOKEN}=...")

    if dist.world_size() > 1:
        raise ValueError("one process serves one model on one GPU: start it without torchrun, once for each GPU")
    name = settings.model.model_name_or_path
    settings = hub.fetched(settings)
    path, text = settings.model.model_name_or_path, settings.text
    listening = _listen(serve.host, serve.port)  # before the model is loaded, which may take minutes
    scorer = Scorer(
        path,
        dtype=serve.dtype,
        max_length=text.max_length,
        chat_template=text.chat_template,
        dialogue_format=text.dialogue_format,
        max_tokens=serve.max_tokens,
        bare_text=text.bare_text,
        reward_label=settings.model.reward_label,
        reward_weights=settings.model.reward_weights,
        overlong=text.overlong,
        truncation_side=text.truncation_side,
    )
    if scorer.contract is None:
        dist.say(f"{name} has no scoring.json: nothing shows that its rewards are those of its training")
    limits = Limits(serve.max_queue, int(serve.max_body_mb * 10**6), serve.request_timeout)
    app = App(scorer, name, limits, token)
    config = uvicorn.Config(
        app.asgi(),
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=int(serve.request_timeout) + 1,
        server_header=False,
    )
    # uvicorn stops at the first of these signals, answers what it has accepted, and then sends it once more.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    host, port = listening.getsockname()[:2]
    dist.say(f"serving {name} at http://{f'[{host}]' if ':' in host else host}:{port}")
    uvicorn.Server(config).run(sockets=[listening])
    app.close()
    dist.say("stopped: every request that was accepted is answered")


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ValueError(f"--host {host} --port {port}: cannot listen there ({error.strerror or error})") from None


def arguments(argv: list[str]) -> list[str]:
    """The model may be named without its flag: `python -m rm.serve MODEL`."""
    return ["--model_name_or_path", *argv] if argv and not argv[0].startswith("-") else argv


if __name__ == "__main__":
    with cli.one_line_errors():
        settings = parse(Settings, __doc__, arguments(sys.argv[1:]))
        with dist.session(seed=0):
            main(settings)
