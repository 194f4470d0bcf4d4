"""Rewards from a server (`python -m rm.serve`), for code that trains elsewhere: as `Scorer`, and as a reward function.

from rm.scoring import remote
trainer = GRPOTrainer(model=policy, reward_funcs=remote("http://node7:8000"), ...)
"""

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence

from rm.data.messages import Text
from rm.scoring.trl import score_completions

AGAIN = (429, 502, 503, 504)  # statuses of a server, or of a proxy before it, that is busy or not there at the moment


class Remote:
    """A reward model behind a URL. Calling it scores completions, as TRL's trainers ask of a reward function."""

    def __init__(self, url: str, token: str | None = None, timeout: float = 600.0):
        """
        Raises:
            ValueError: for a URL that is none of HTTP, or where something else than `rm.serve` answers.
            OSError: where nothing answers within `timeout` seconds.
        """
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"{url}: expected the URL of a server, such as http://localhost:8000")
        self.url, self.timeout = url.rstrip("/"), timeout
        self.token = token if token is not None else os.environ.get("RM_SERVE_TOKEN")
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        about = self._ask("contract")
        if "special_tokens" not in about:
            raise ValueError(f"{self.url} is not a server of rewards (rm.serve): /contract answers something else")
        self.contract: dict | None = about["contract"]
        self._special = tuple(about["special_tokens"])
        self.__name__ = "/".join(about["model"].split("/")[-2:])  # TRL's name for the metric, such as rm/model

    def score(self, conversations: Sequence[Text], normalized: bool = False) -> list[float]:
        """The reward of each full conversation, as `Scorer.score`."""
        body = {"conversations": list(conversations), "normalized": normalized}
        return self._ask("score", body)["rewards"]

    def score_responses(
        self, prompts: Sequence[Text], responses: Sequence[Sequence[Text]], normalized: bool = False
    ) -> list[list[float]]:
        """The rewards of any number of responses to each prompt, as `Scorer.score_responses`."""
        body = {"prompts": list(prompts), "responses": [list(texts) for texts in responses], "normalized": normalized}
        return self._ask("score", body)["rewards"]

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **columns) -> list[float]:
        """The reward of each completion of the prompt beside it. Columns of the data set are not used."""
        return score_completions(self.score_responses, self._special, prompts, completions)

    def _ask(self, path: str, body: dict | None = None) -> dict:
        """The server's answer. One that is busy or away is asked again, until the time is over."""
        headers = {"Content-Type": "application/json"}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/{path}", data, headers)
        deadline, pause = time.monotonic() + self.timeout, 0.1
        while True:
            left = deadline - time.monotonic()
            try:
                with self._opener.open(request, timeout=max(left, 1.0)) as response:
                    return json.loads(response.read())
            except urllib.error.HTTPError as error:
                reason = _reason(error)
                if error.code not in AGAIN or left < pause:
                    kind = ValueError if error.code in (400, 404, 413, 415, 422) else OSError
                    raise kind(f"{self.url}/{path} answers {error.code}: {reason}") from None
            except OSError as error:  # refused, reset, timed out
                if left < pause:
                    raise OSError(f"{self.url}/{path} does not answer ({getattr(error, 'reason', error)})") from None
            except ValueError as error:
                raise ValueError(f"{self.url}/{path} does not answer with JSON: {error}") from None
            time.sleep(pause)
            pause = min(2 * pause, 5.0)


def remote(url: str, token: str | None = None, timeout: float = 600.0) -> Remote:
    """A reward model that `python -m rm.serve` serves, for a trainer.

    Args:
        url: such as http://node7:8000. Proxies that the environment names are not used.
        token: of the server; None: $RM_SERVE_TOKEN, where it is set.
        timeout: seconds in which a request has to be answered; a server that is busy or starts again is waited for.
    """
    return Remote(url, token, timeout)


def _reason(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.loads(error.read())["error"])
    except (ValueError, KeyError, TypeError, OSError):
        return error.reason
