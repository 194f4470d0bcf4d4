"""python -m rm.serve: each client gets its own texts' rewards, equal to Scorer's, or an error that says what to do."""

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rm.config import compose, parse
from rm.scoring import Scorer, remote
from tests.reward_positions import DIALOGUES, dialogue, reward_folder, rewards_in, trainer_of
from tests.text_fixtures import byte_level

uvicorn = pytest.importorskip("uvicorn", reason="the extra `serve`")
pytest.importorskip("starlette", reason="the extra `serve`")
transformers = pytest.importorskip("transformers")

from rm.serve import __main__ as serve  # noqa: E402
from rm.serve.app import App, Limits  # noqa: E402
from tests.serve.server import ask, serving  # noqa: E402

ROOT = Path(__file__).parents[2]
PLAIN = ["###Human: hi###Assistant: hello", "a"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny reward model whose template writes a line break behind the token that ends a turn."""
    return reward_folder("Qwen2.5 base", byte_level, tmp_path_factory.mktemp("rm"))


@pytest.fixture(scope="module")
def scorer(folder) -> Scorer:
    return Scorer(folder, max_tokens=600)


@pytest.fixture(scope="module")
def url(scorer):
    with serving(App(scorer, "runs/rm/model", Limits(max_body_bytes=10**5))) as url:
        yield url


def rewards(url: str, path: str, body: dict):
    status, answer, _ = ask(f"{url}/{path}", body)
    assert status == 200, answer
    return answer["rewards"]


def near(expected) -> object:
    return pytest.approx(expected, abs=1e-5)


def test_every_shape_of_request_gets_the_rewards_of_scorer(url, scorer, folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    conversations = [*DIALOGUES, *PLAIN]
    assert rewards(url, "score", {"conversations": conversations}) == near(scorer.score(conversations))
    asked = {"prompts": ["hi", DIALOGUES[1][:3], "x"], "responses": [["a", "b", "a"], DIALOGUES[1][3:], []]}
    answered = rewards(url, "score", asked)
    assert list(map(near, scorer.score_responses(**asked))) == answered

    expected = scorer.score([DIALOGUES[0], PLAIN[0]])
    written = tokenizer.apply_chat_template(DIALOGUES[0], tokenize=False)
    query = [written.removesuffix("\n"), PLAIN[0] + tokenizer.eos_token]
    _, openrlhf, _ = ask(f"{url}/get_reward", {"query": query, "prompts": ["", ""], "labels": [None, "4"]})
    assert openrlhf == {"rewards": near(expected), "scores": near(expected), "extra_logs": {}}

    ids = tokenizer.apply_chat_template(DIALOGUES[0], return_dict=False)
    for one in ({"input": written}, {"input": ids}, {"messages": DIALOGUES[0]}, {"input": [ids]}):
        _, vllm, _ = ask(f"{url}/classify", {"model": "any", "use_activation": False} | one)
        assert vllm["data"][-1]["probs"][-1] == near(expected[0])  # as verl reads it
        assert vllm["usage"]["prompt_tokens"] == len(ids)
    _, vllm, _ = ask(f"{url}/classify", {"input": [written, PLAIN[0]]})
    assert [one["probs"] for one in vllm["data"]] == [[near(reward)] for reward in expected]


def test_the_tokens_that_were_read_are_returned_where_they_are_asked_for(url, folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    _, answer, _ = ask(f"{url}/score", {"conversations": DIALOGUES[:2], "return_tokens": True})
    assert answer["token_ids"] == [tokenizer.apply_chat_template(d, return_dict=False) for d in DIALOGUES[:2]]
    assert answer["tokens"] == [tokenizer.convert_ids_to_tokens(ids) for ids in answer["token_ids"]]


REFUSED = {
    "no JSON": ("score", {"data": b"{"}, 400, "the body is not JSON: Expecting property name"),
    "no object": ("score", {"body": [1]}, 400, "the body is a JSON list; expected an object"),
    "endless lists": ("score", {"data": b"[" * 50_000}, 400, "is not JSON"),
    "another type": ("score", {"body": {}, "Content_Type": "text/plain"}, 415, "expected the header Content-Type"),
    "too large": ("score", {"body": {"conversations": ["a" * 10**5]}}, 413, "more than 100,000 bytes (--max_body_mb)"),
    "no texts": ("score", {"body": {}}, 422, "needs 'conversations', or 'prompts' and 'responses'"),
    "both": ("score", {"body": {"conversations": [], "prompts": []}}, 422, "give the one or the others"),
    "an unknown key": ("score", {"body": {"conversation": []}}, 422, "has the key 'conversation'; known are"),
    "a wrong type": ("score", {"body": {"conversations": [7]}}, 422, "'conversations 0' is 7; expected a list"),
    "no content": (
        "score", {"body": {"conversations": [[{"role": "user"}]]}}, 422,
        "conversations 0: message 0 is {'role': 'user'}; expected an object with 'role' and 'content' only",
    ),
    "a surrogate": ("score", {"data": rb'{"conversations": ["\ud800"]}'}, 422, "half of a surrogate pair"),
    "no reply": ("score", {"body": {"conversations": [DIALOGUES[0][:1]]}}, 422, "not ending with an assistant message"),
    "too long": ("score", {"body": {"conversations": ["a", "b c " * 500]}}, 422, "conversation 1 cannot be encoded"),
    "unequal lists": ("score", {"body": {"prompts": ["a"], "responses": []}}, 422, "1 prompts and 0 lists of resp"),
    "a wrong response": ("score", {"body": {"prompts": ["a"], "responses": [[3]]}}, 422, "prompts 0: 'responses 1' is"),
    "no scale": ("score", {"body": {"conversations": [], "normalized": True}}, 422, "states no mean and standard dev"),
    "a number as flag": ("score", {"body": {"conversations": [], "normalized": 1}}, 422, "expected true or false"),
    "an activation": ("classify", {"body": {"input": "a", "use_activation": True}}, 422, "a reward has none"),
    "an unknown id": ("classify", {"body": {"input": [[5, 480]]}}, 422, "token ids from 0 to 479"),
    "no query": ("get_reward", {"body": {"prompts": []}}, 422, "'query' is None; expected a list"),
}  # fmt: skip


@pytest.mark.parametrize(("path", "posted", "status", "message"), REFUSED.values(), ids=REFUSED)
def test_a_wrong_request_is_refused_with_its_status_and_what_is_wrong(url, path, posted, status, message):
    got, answer, _ = ask(f"{url}/{path}", **posted)
    assert got == status and message in answer["error"]


def test_other_paths_methods_and_host_names_are_refused(url):
    assert ask(f"{url}/nothing")[0] == 404 and ask(f"{url}/score")[0] == 405
    assert ask(f"{url}/contract", Host="evil.example")[0] == 400
    assert ask(f"{url}/contract", Host="localhost:1")[0] == 200


def test_64_clients_at_once_get_each_its_own_rewards(url, scorer):
    """Groups of eight ask about one prompt, one reply each, as RL trainers do."""
    conversations = [dialogue(f"what is {n // 8} and {n // 8}?", f"it is {n}, " * (1 + n % 5)) for n in range(192)]
    expected = scorer.score(conversations)
    with ThreadPoolExecutor(64) as clients:
        answers = list(clients.map(lambda one: rewards(url, "score", {"conversations": [one]}), conversations))
    assert [reward for (reward,) in answers] == near(expected)
    _, metrics, _ = ask(f"{url}/metrics")
    values = dict(re.findall(r"^(rm_\w+) (\d+)$", metrics, flags=re.M))
    assert int(values["rm_computed_tokens_total"]) < int(values["rm_tokens_total"])
    assert int(values["rm_micro_batches_total"]) < int(values["rm_texts_total"])
    assert values["rm_requests_in_progress"] == "0"
    assert re.search(r'^rm_requests_total\{path="/score",status="200"\} \d+$', metrics, flags=re.M)


def held_up(app: App) -> threading.Event:
    """Let the app's model wait until the event is set."""
    go, compute = threading.Event(), app.batcher.rewards_of

    def wait(examples):
        go.wait(20)
        return compute(examples)

    app.batcher.rewards_of = wait
    return go


def test_more_requests_than_the_queue_holds_are_refused_and_those_in_it_are_answered(scorer):
    app = App(scorer, "rm", Limits(max_queue=2))
    with serving(app) as url, ThreadPoolExecutor(2) as clients:
        go = held_up(app)
        waiting = [clients.submit(rewards, url, "score", {"conversations": [text]}) for text in PLAIN]
        while app.in_progress < 2:
            time.sleep(0.001)
        status, answer, headers = ask(f"{url}/score", {"conversations": ["a"]})
        assert (status, answer) == (429, {"error": "2 requests are waiting: try again later"})
        assert headers["retry-after"] == "1" and ask(f"{url}/health")[0] == 200
        # A client of ours tries again.
        client = remote(url)
        again = threading.Timer(0.3, go.set)
        again.start()
        assert client.score(PLAIN) == near(scorer.score(PLAIN))
        assert [one.result() for one in waiting] == [[near(reward)] for reward in scorer.score(PLAIN)]


def test_a_request_that_takes_too_long_gets_504_and_the_next_one_is_answered(scorer):
    app = App(scorer, "rm", Limits(request_timeout=0.2))
    with serving(app) as url:
        go = held_up(app)
        status, answer, _ = ask(f"{url}/score", {"conversations": ["a"]})
        assert status == 504 and "not answered within 0.2 s (--request_timeout)" in answer["error"]
        go.set()
        assert rewards(url, "score", {"conversations": ["a"]}) == near(scorer.score(["a"]))


def test_a_failure_of_the_model_is_status_500_and_the_server_goes_on(scorer):
    app = App(scorer, "rm", Limits())
    with serving(app) as url:
        compute = app.batcher.rewards_of
        app.batcher.rewards_of = lambda examples: compute(examples) * float("nan")
        status, answer, _ = ask(f"{url}/score", {"conversations": ["a"]})
        assert (status, answer) == (500, {"error": "the reward of text 0 is nan, not a finite number"})
        app.batcher.rewards_of = lambda examples: 1 / 0
        status, answer, _ = ask(f"{url}/score", {"conversations": ["a"]})
        assert (status, answer) == (500, {"error": "ZeroDivisionError: division by zero"})
        app.batcher.rewards_of = compute
        assert ask(f"{url}/score", {"conversations": ["a"]})[0] == 200


def test_a_server_with_a_token_answers_those_who_send_it(scorer, monkeypatch):
    with serving(App(scorer, "rm", Limits(), token="se:cret")) as url:
        basic = "Basic " + base64.b64encode(b"user:se:cret").decode()
        for right in ("Bearer se:cret", basic):
            assert ask(f"{url}/score", {"conversations": ["a"]}, Authorization=right)[0] == 200
        for wrong in ("", "Bearer secret", "Basic ????", "Basic " + base64.b64encode(b"se:cret").decode(), "Bearer ü"):
            status, _, headers = ask(f"{url}/score", {"conversations": ["a"]}, Authorization=wrong)
            assert status == 401 and headers["www-authenticate"].startswith("Basic")
        assert [ask(f"{url}/{path}")[0] for path in ("health", "", "contract", "metrics")] == [200, 401, 401, 401]
        assert ask(f"{url}/contract", Authorization=basic, Host="node7:8000")[0] == 200
        with pytest.raises(OSError, match="answers 401: needs the server's token"):
            remote(url)
        monkeypatch.setenv("RM_SERVE_TOKEN", "se:cret")
        assert remote(url).score(["a"]) == near(scorer.score(["a"]))


# Clients of ours


def test_a_remote_model_scores_as_scorer_does_and_says_what_is_wrong(url, scorer):
    client = remote(url + "/")
    assert client.contract["bare_text"] == "dialogue" and client.__name__ == "rm/model"
    assert client.score(DIALOGUES) == near(scorer.score(DIALOGUES)) and client.score([]) == []
    prompts, replies = ["hi", "the cat", "hi"], ["hello", "sat", "the mat"]
    expected = scorer.score([dialogue(p, r) for p, r in zip(prompts, replies, strict=True)])
    assert client(prompts=prompts, completions=replies, completion_ids=[[1]] * 3) == near(expected)
    with pytest.raises(ValueError, match=r"/score answers 422: conversation 0 cannot be encoded \(longer than max"):
        client.score(["b c " * 500])
    with pytest.raises(ValueError, match="a chat template has been applied to it already"):
        client(["<|im_start|>user\nhi"], ["a"])
    with pytest.raises(ValueError, match="expected the URL of a server"):
        remote("localhost:8000")
    with pytest.raises(OSError, match="does not answer .*refused"):
        remote("http://127.0.0.1:9", timeout=0.2)


def test_grpo_of_trl_trains_on_the_rewards_of_a_server(url, scorer, tmp_path):
    pytest.importorskip("datasets"), pytest.importorskip("trl")
    prompts = [dialogue("what is the capital of France?"), dialogue("hi")]
    ((prompts, completions, computed),) = rewards_in(trainer_of("GRPO", [remote(url)], prompts, tmp_path))
    expected = scorer.score([prompt + reply for prompt, reply in zip(prompts, completions, strict=True)])
    assert len(expected) == 4 and computed[:, 0].tolist() == near(expected)


# The command


def test_a_server_ends_at_sigterm_when_it_has_answered(folder, scorer):
    command = [sys.executable, "-m", "rm.serve", str(folder), "--port", "0", "--max_tokens", "300"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        url = re.search(r"serving .* at (http://127\.0\.0\.1:\d+)$", process.stdout.readline().strip())[1]
        conversations = [dialogue("the cat " * 20, f"sat {n} " * 12) for n in range(400)]
        with ThreadPoolExecutor(1) as client:
            answer = client.submit(rewards, url, "score", {"conversations": conversations})
            while "rm_requests_in_progress 1" not in ask(f"{url}/metrics")[1]:
                assert not answer.done()
            process.send_signal(signal.SIGTERM)
            assert answer.result() == near(scorer.score(conversations))
        out, err = process.communicate(timeout=20)
        assert (process.returncode, err) == (0, "")
        assert out == "stopped: every request that was accepted is answered\n"
    finally:
        process.kill()


def main(folder: Path, **values) -> None:
    serve.main(compose(serve.Settings, model_name_or_path=str(folder), **{"port": 0} | values))


def test_a_model_whose_probe_texts_score_otherwise_is_not_served(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "rm")
    saved = json.loads((folder / "scoring.json").read_text())
    saved["golden"][1]["score"] += 0.5
    (tmp_path / "rm" / "scoring.json").write_text(json.dumps(saved))
    (tmp_path / "rm" / "SHA256SUMS").unlink()
    with pytest.raises(ValueError, match="probe text 2, .* moved by 0.5, more than 0.001 in float32"):
        main(tmp_path / "rm")


def test_mistakes_on_the_command_line_say_what_to_do(folder, url, monkeypatch):
    monkeypatch.delenv("RM_SERVE_TOKEN", raising=False)
    with pytest.raises(ValueError, match="--host 0.0.0.0: others can reach it, so set a token .* RM_SERVE_TOKEN="):
        main(folder, host="0.0.0.0")
    with pytest.raises(ValueError, match="--port .*: cannot listen there .*in use"):
        main(folder, port=int(url.rpartition(":")[2]))
    with pytest.raises(ValueError, match="--port must be from 0 to 65535, got 65536"):
        main(folder, port=65536)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ValueError, match="serving needs starlette and uvicorn, the extra `serve`"):
        main(folder)


def test_the_model_may_be_named_without_its_flag():
    for argv in (["rm", "--port", "1"], ["--model_name_or_path", "rm", "--port", "1"]):
        assert parse(serve.Settings, "", serve.arguments(argv)).model.model_name_or_path == "rm"


# The page


def test_the_page_loads_nothing_from_elsewhere(url):
    status, page, headers = ask(f"{url}/")
    assert status == 200 and headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in headers["content-security-policy"]
    assert not re.findall(r"""(?:src|href)=|https?:|innerHTML""", page)


def test_a_person_sees_rewards_and_tokens_on_the_page(url, scorer):
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs a browser")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs a browser")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"] * (os.getuid() == 0))
        page = browser.new_page()
        errors = []
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url)
        page.get_by_label("Prompt").fill("what is the capital of France?")
        page.get_by_label("Reply 1").fill("the <b>cat</b>")
        page.get_by_label("Reply 2").fill("Paris.")
        page.get_by_role("button", name="Score").click()
        page.locator(".reply").nth(1).wait_for()
        shown = [float(text) for text in page.locator(".reward").all_inner_texts()]
        replies = [text.partition(": ")[2].split("\n")[0] for text in page.locator(".reply").all_inner_texts()]
        tokens = page.locator(".reply").nth(0).locator(".tokens span").all_text_contents()
        last = page.locator(".reply").nth(0).locator(".tokens .read").all_text_contents()
        page.get_by_label("Reply 1").fill("a " * 600)
        page.get_by_role("button", name="Score").click()
        page.get_by_text("cannot be encoded (longer than max_length 300)").wait_for()
        browser.close()
    typed = ["the <b>cat</b>", "Paris."]
    (of_typed,) = scorer.score_responses(["what is the capital of France?"], [typed])
    expected = dict(zip(typed, of_typed, strict=True))
    assert replies == sorted(expected, key=expected.get, reverse=True)
    assert shown == pytest.approx([expected[reply] for reply in replies], abs=1e-4)
    full = dialogue("what is the capital of France?", replies[0])
    (example,) = scorer.encoder.examples([[full]])
    assert tokens == [scorer.encoder.tokenizer.string_of(i) for i in example.replies[0].tolist()]
    assert last == tokens[-1:] and not [error for error in errors if "status of 422" not in error]
