"""rm.hf.hub against a server on this machine that speaks the hub's protocol, in forked processes."""

import hashlib
import json
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import eval_rm
import train_rm
import train_sft
from rm import cli, export
from rm.config import compose, flags, flatten
from rm.data.tokenizer import Tokenizer
from rm.distributed import process_group as dist
from rm.hf import hub
from tests import commands
from tests.text_fixtures import byte_level

COMMIT = "c" * 40


class Hub(ThreadingHTTPServer):
    """A server of repositories.

    Attributes:
        repositories: {"models/o/n": {path: bytes}}.
        requests: (method, path, headers) of all that were received.
        cut: the number of connections that will be cut in the middle of a large file.
        damaged: paths of files that are sent as zeros.
        unavailable: paths of files that are refused.
    """

    def __init__(self, repositories: dict):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.requests = repositories, []
        self.cut, self.damaged, self.unavailable = 0, (), ()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def run(self, tmp_path, code: str, processes: int = 0, **env) -> subprocess.CompletedProcess:
        """Run `code`, which can use `hub` and `dist`, in a process, or in a group, whose hub is this server."""

        def program() -> None:
            for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
                del sys.modules[name]  # it reads the environment when it is imported
            with cli.one_line_errors(), dist.session(0):
                exec(code, {"hub": hub, "dist": dist})

        variables = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": f"http://127.0.0.1:{self.server_port}"}
        return commands.call(program, processes, variables | {"HF_TOKEN": "secret"} | env)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_): ...

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body: bool):
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.requests.append((self.command, self.path, headers))
        words = self.path.partition("?")[0].strip("/").split("/")
        if words[0] == "api":
            return self.describe("/".join(words[1:4]), "".join(words[4:5]))
        kind, words = ("datasets", words[1:]) if words[0] == "datasets" else ("models", words)
        files = self.server.repositories.get(f"{kind}/{'/'.join(words[:2])}", {})
        self.send_file("/".join(words[4:]), files.get("/".join(words[4:])), body)

    def describe(self, repository: str, what: str):
        files = self.server.repositories.get(repository)
        if files is None:
            return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        tree = [{"type": "file", "path": path, "size": len(x), "oid": git_hash(x)} | large(path, x)
                for path, x in files.items()]  # fmt: skip
        answer = tree if what == "tree" else {"id": repository.partition("/")[2], "sha": COMMIT, "siblings": []}
        self.send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def send_file(self, path: str, content: bytes | None, body: bool):
        if content is None:
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
        if path in self.server.unavailable:
            return self.send(403, b"", {})  # a 503 would be tried again for 20 seconds
        etag = hashlib.sha256(content).hexdigest() if large(path, content) else git_hash(content)
        if path in self.server.damaged:
            content = bytes(len(content))
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.send(206 if start else 200, content[start:], headers, body)

    def send(self, status: int, content: bytes, headers: dict, body: bool = True):
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if body and len(content) > 1000 and self.server.cut:
            self.server.cut -= 1
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        elif body:
            self.wfile.write(content)


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def large(path: str, content: bytes) -> dict:
    lfs = {"size": len(content), "oid": hashlib.sha256(content).hexdigest(), "pointerSize": 100}
    return {"lfs": lfs} if path.endswith(".safetensors") else {}


WEIGHTS = bytes(range(256)) * 400
MODEL = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"a pickle",
    "original/consolidated.safetensors": b"again",
    "README.md": b"words",
}


@pytest.fixture
def server():
    hub = Hub({"models/o/n": MODEL, "datasets/o/d": {"a.jsonl": b'{"text": "a"}', "b.jsonl": b"{}"}})
    yield hub
    hub.shutdown()
    hub.server_close()


def test_a_model_is_fetched_once_a_machine_and_found_without_a_network(server, tmp_path):
    code = "folder = hub.model('o/n@main'); dist.is_main() and print(folder)"
    done = server.run(tmp_path, code, processes=2)
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    assert sorted(f.name for f in folder.rglob("*")) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS and COMMIT in str(folder)
    fetches = [path for method, path, _ in server.requests if method == "GET" and "resolve" in path]
    assert len(fetches) == len(set(fetches)) == 3
    assert {headers.get("authorization") for _, path, headers in server.requests if "tree" in path} == {"Bearer secret"}
    again = server.run(tmp_path, code, HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:1")
    assert again.stdout.split() == [str(folder)], again.stderr


def test_a_download_continues_where_the_connection_was_cut(server, tmp_path):
    weights, chunk = WEIGHTS * 240, 10 * 2**20  # huggingface_hub writes 10 MiB at a time
    server.repositories["models/o/n"] = {"config.json": b"{}", "model.safetensors": weights}
    server.cut = 1  # after half of it, 12 MB
    done = server.run(tmp_path, "print(hub.model('o/n'))")
    assert done.returncode == 0, done.stderr
    assert (Path(done.stdout.strip()) / "model.safetensors").read_bytes() == weights
    requests = [(path, headers) for method, path, headers in server.requests if method == "GET"]
    assert [headers.get("range") for path, headers in requests if "model.s" in path] == [None, f"bytes={chunk}-"]


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_file_with_another_hash_than_the_hubs_is_deleted_and_downloaded_again(server, tmp_path, file):
    server.damaged = (file,)
    done = server.run(tmp_path, "hub.model('o/n')")
    assert done.returncode == 2 and f"{file} was damaged on the way and is deleted" in done.stderr
    server.damaged = ()
    done = server.run(tmp_path, "print(hub.model('o/n'))")
    assert (Path(done.stdout.strip()) / file).read_bytes() == MODEL[file], done.stderr


def test_a_snapshot_whose_download_broke_is_refused_with_one_line(server, tmp_path):
    server.repositories["models/o/n"] = MODEL | {"tokenizer_config.json": b"{}"}
    server.unavailable = ("tokenizer_config.json",)

    def error(**env) -> str:
        done = server.run(tmp_path, "print(hub.model('o/n'))", **env)
        assert done.returncode == 2 and not done.stdout and "Traceback" not in done.stderr
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
        return line

    refused = "error: o/n: is not on this machine and could not be downloaded"
    assert error().startswith(refused)
    (weights,) = (tmp_path / "home").rglob("snapshots/*/model.safetensors")
    assert {"config.json", "tokenizer.json"} <= {file.name for file in weights.parent.iterdir()}
    assert not (weights.parent / "tokenizer_config.json").exists()
    assert error(HF_ENDPOINT="http://127.0.0.1:1").startswith(refused)  # the hub is down
    assert error(HF_HUB_OFFLINE="1").startswith(refused)

    server.unavailable = ()
    done = server.run(tmp_path, "print(hub.model('o/n'))")
    assert (Path(done.stdout.strip()) / "tokenizer_config.json").read_bytes() == b"{}", done.stderr


def test_what_the_hub_does_not_have_is_one_line(server, tmp_path):
    code = """
for call, name in ((hub.model, 'o/none'), (hub.data, 'hub:o/d/c.jsonl'), (hub.data, 'o/d:test')):
    try:
        call(name)
    except ValueError as error:
        print(error)"""
    none, absent, split = server.run(tmp_path, code).stdout.splitlines()
    assert "o/none: is not on this machine and could not be downloaded" in none and "hf download o/none" in none
    assert absent == "o/d: has no c.jsonl at main"
    assert split.startswith("o/d:test: has no data files of split 'test'; splits: 'train'")
    assert split.endswith("files: a.jsonl, b.jsonl")


def test_the_error_without_a_network_says_what_to_fetch(server, tmp_path):
    done = server.run(tmp_path, "hub.model('o/n@v2')", HF_HUB_OFFLINE="1")
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert "hf download o/n --revision v2" in line and not server.requests


def test_an_adapters_base_is_fetched_with_it_and_found_without_a_network(server, tmp_path):
    config = {"base_model_name_or_path": "o/n", "revision": "v1"}
    files = {"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": WEIGHTS[:1000]}
    server.repositories["models/o/a"] = files
    code = "folder = hub.model('o/a'); dist.is_main() and print(folder, hub.base_of(folder))"
    done = server.run(tmp_path, code, processes=2)
    assert done.returncode == 0, done.stderr
    folder, base = map(Path, done.stdout.split())
    assert (base / "model.safetensors").read_bytes() == WEIGHTS and hub.base_of(base) is None
    assert (folder / "adapter_model.safetensors").exists()
    again = server.run(tmp_path, code, HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:1")
    assert again.stdout.split() == [str(folder), str(base)], again.stderr
    local = str(tmp_path / "local")  # an adapter in a folder, whose base is on the hub
    Path(local).mkdir()
    Path(local, "adapter_config.json").write_text(json.dumps(config))
    code = f"hub.model({local!r}); print(hub.base_of({local!r}))"
    assert server.run(tmp_path, code).stdout.split() == [str(base)]


def test_data_files_are_fetched_by_name_and_a_plan_fetches_no_weights(server, tmp_path):
    code = "print(*hub.data('test=hub:o/d/a.jsonl')); print(hub.model('o/n', weights=False))"
    named, model = server.run(tmp_path, code).stdout.split()
    assert named.startswith("test=/") and Path(named.partition("=")[2]).read_bytes() == b'{"text": "a"}'
    assert sorted(f.name for f in Path(model).iterdir()) == ["config.json", "tokenizer.json"]


CARD = b"""---
configs:
- config_name: edit
  data_files: edit.jsonl
- config_name: preference
  default: true
  data_files:
  - {split: train, path: "preference/train*"}
  - {split: validation, path: preference/validation.jsonl}
---
Words"""


def test_the_files_of_a_split_are_fetched_and_found_without_a_network(server, tmp_path):
    names = ["preference/train2.jsonl", "preference/train1.jsonl", "preference/validation.jsonl", "edit.jsonl"]
    server.repositories["datasets/o/p"] = {"README.md": CARD} | {name: name.encode() for name in names}
    code = "print(*hub.data('hub:o/p'))"
    done = server.run(tmp_path, code)
    said, files = done.stdout.splitlines()
    assert said == "hub:o/p: split train: preference/train1.jsonl, preference/train2.jsonl", done.stderr
    first, second = map(Path, files.split())
    assert (first.read_text(), second.read_text()) == ("preference/train1.jsonl", "preference/train2.jsonl")
    fetches = [path for method, path, _ in server.requests if method == "GET" and "resolve" in path]
    assert len(fetches) == len(set(fetches)) == 3  # README.md and the files of the split
    # Without a network, the other split is known, but not on this machine.
    code += "; hub.data('hub:o/p:validation')"
    again = server.run(tmp_path, code, HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:1")
    assert again.stdout.startswith(done.stdout) and again.returncode == 2
    assert "o/p: is not on this machine and could not be downloaded" in again.stderr


def test_a_name_means_a_split_a_configuration_a_folder_or_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    # As an older version of huggingface_hub left it, without a list of what the repository has.
    snapshot = cached(tmp_path, "datasets--o--p")
    names = ["edit.jsonl", "pairs", "preference/train.jsonl", "preference/validation.jsonl", "raw/a.csv", "raw/b.csv"]
    for name in names:
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).touch()
    (snapshot / "README.md").write_bytes(CARD)

    def found(text: str, **how) -> list[str]:
        return [path.replace(f"{snapshot}/", "") for path in hub.data(text, **how)]

    assert found("o/p") == ["preference/train.jsonl"]
    assert found("hub:o/p:validation") == found("o/p@main", split="validation") == ["preference/validation.jsonl"]
    assert found("hub:o/p/edit@main") == found("hub:o/p/edit.jsonl", split="validation") == ["edit.jsonl"]
    assert found("hub:o/p/raw") == ["raw/a.csv", "raw/b.csv"] and found("hub:o/p/pairs") == ["pairs"]
    assert found("hub:o/p/raw/:train@main", named=True) == [f"o/p/raw/:train@main=raw/{x}.csv" for x in "ab"]
    assert found("x=hub:o/p/raw", named=True) == ["x=raw/a.csv", "x=raw/b.csv"]
    assert found("hub:o/p/edit.jsonl", named=True) == ["edit.jsonl"]
    for text, problem in {
        "hub:o/p:test": "hub:o/p:test: has no data files of split 'test'; splits: 'train', 'validation'",
        "hub:o/p/edit.jsonl:train": "a file has no splits: leave out :train",
        "hub:o/p/other.jsonl": "hub:o/p/other.jsonl: has no other.jsonl at main",
    }.items():
        with pytest.raises(ValueError, match=problem):
            hub.data(text)
    (snapshot / "README.md").write_text("---\n[\n---\n")
    with pytest.raises(ValueError, match="o/p: the front matter of its README.md is not YAML"):
        hub.data("o/p")


def test_a_weight_is_that_of_every_file_of_a_split(monkeypatch):
    files = {"a.json": ["a.json"], "hub:o/n": ["/1", "/2"], "hub:o/n:test": ["/3"]}
    splits = []
    monkeypatch.setattr(hub, "data", lambda text, split, named: splits.append(split) or files[text])
    given = {"model_name_or_path": "/m", "output_dir": "out", "dataset_split": "train_prefs"}
    settings = compose(train_rm.Settings, dataset_path=tuple(files), dataset_weights=(1.0, 2.0, 3.0), **given)
    fetched = hub.fetched(settings, weights=False)
    assert fetched.data.dataset_path == ("a.json", "/1", "/2", "/3") and splits == ["train_prefs"] * 3
    assert fetched.mixture.dataset_weights == (1.0, 2.0, 2.0, 3.0)


@pytest.mark.parametrize("script", [train_sft, train_rm, eval_rm, export], ids=lambda script: script.__name__)
def test_every_setting_declared_for_the_hub_is_replaced_by_a_local_path(script, tmp_path, monkeypatch):
    def snapshot(name, kind, patterns):
        folder = tmp_path / kind / name.repo / name.revision
        folder.mkdir(parents=True, exist_ok=True)
        for file in ("model.safetensors", "a.json", "b.json"):
            (folder / file).touch()
        return folder

    monkeypatch.setattr(hub, "_snapshot", snapshot)
    on_hub = {name: flag.hub for name, flag in flags(script.Settings).items() if flag.hub}
    # All that name a model or data, whoever declares them.
    others = {"chat_template", "resume_from_checkpoint", "average"} & flags(script.Settings).keys()
    assert on_hub.keys() == others | {name for name in flags(script.Settings) if name.endswith("_path")}
    if script is export:  # a model, or several with data
        del on_hub["model_name_or_path"]
    given, expected = {"output_dir": "out"}, {}
    for name, kind in on_hub.items():
        if kind == "model" and flags(script.Settings)[name].many:
            given[name] = (f"o/{name}@v1", "here")
            expected[name] = (f"{tmp_path}/model/o/{name}/v1", "here")
        elif kind == "model":
            given[name], expected[name] = f"o/{name}@v1", f"{tmp_path}/model/o/{name}/v1"
        elif kind != "data":
            given[name], expected[name] = f"hub:o/{name}@v1", f"{tmp_path}/model/o/{name}/v1"
        else:
            given[name] = (f"one=hub:o/{name}/a.json", "set=hub:o/d/b.json@v1", "two=here.json")
            first, second = f"one={tmp_path}/dataset/o/{name}/main/a.json", f"set={tmp_path}/dataset/o/d/v1/b.json"
            expected[name] = (first, second, "two=here.json")
    settings = compose(script.Settings, **given)
    fetched = hub.fetched(settings)
    assert type(fetched) is script.Settings and flatten(fetched) == flatten(settings) | expected
    assert hub.names(settings, fetched) == {name: given[name] for name in expected}


def test_an_existing_path_or_what_can_only_be_a_path_is_not_fetched(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("o/n").mkdir(parents=True)
    assert hub.model("o/n") == "o/n"
    for path in ("runs/sft/model", "/a/b", "./a/b", "../a"):
        assert hub.model(path) == path
        assert hub.template(path) == hub.checkpoint(path) == path
    assert hub.template("templates/mine.jinja") == "templates/mine.jinja"
    for word in ("auto", "none", "o/step_5"):
        assert hub.checkpoint(word) == word
    for path in ("data/train.jsonl", "data/train.json.gz", "data/train.csv", "sets=data/a.jsonl"):
        assert hub.data(path) == [path]
    with pytest.raises(ValueError, match="expected hub:org/name"):
        hub.model("hub:o")
    with pytest.raises(ValueError, match="a model is a repository, not a file"):
        hub.model("hub:o/m/file")
    with pytest.raises(ValueError, match="a model is a repository, not a file"):
        hub.model("hub:o/m:main")
    with pytest.raises(ValueError, match="a checkpoint is a repository, not a file"):
        hub.checkpoint("hub:o/m/file")


def adapter(folder: Path, base: str) -> Path:
    """A PEFT folder without a tokenizer, as PEFT saves it."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base, "revision": None}))
    return folder


def test_tokenizer_folder_is_the_folder_itself_if_it_has_a_tokenizer(tmp_path):
    for name in ("tokenizer.json", "tokenizer.model"):
        folder = adapter(tmp_path / name.replace(".", "_"), str(tmp_path))
        (folder / name).touch()
        assert hub.tokenizer_folder(folder) == hub.tokenizer_folder(str(folder)) == folder


def test_tokenizer_folder_of_an_adapter_is_that_of_its_base(tmp_path):
    base = byte_level(tmp_path / "base")
    outer = adapter(tmp_path / "outer", str(adapter(tmp_path / "inner", str(base))))
    assert hub.tokenizer_folder(outer) == base  # an adapter on an adapter on a base
    byte_level(tmp_path / "inner")
    assert hub.tokenizer_folder(outer) == tmp_path / "inner"


def cached(cache: Path, repository: str) -> Path:
    """A snapshot in the hub's cache, as a download leaves it."""
    folder = cache / repository
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    return folder / "snapshots" / COMMIT


def test_a_template_a_checkpoint_and_a_model_of_the_cache_are_found_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    snapshot = byte_level(cached(tmp_path, "models--o--n"))
    (snapshot / "templates").mkdir()
    (snapshot / "templates" / "chatml.jinja").write_text("{{ messages }}")
    assert hub.template("hub:o/n") == hub.template("o/n") == hub.checkpoint("hub:o/n") == str(snapshot)
    assert hub.template("hub:o/n/templates/chatml.jinja") == str(snapshot / "templates" / "chatml.jinja")
    with pytest.raises(ValueError, match="hub:o/n/other.jinja: has no other.jinja at main"):
        hub.template("hub:o/n/other.jinja")


def test_tokenizer_folder_finds_a_base_in_the_local_hub_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    base = byte_level(cached(tmp_path, "models--o--n"))
    folder = hub.tokenizer_folder(adapter(tmp_path / "adapter", "o/n"))
    assert folder == base and Tokenizer(folder).fingerprint == Tokenizer(base).fingerprint


@pytest.mark.parametrize("bases", [("a", "a"), ("a", "b")])
def test_adapters_that_are_each_others_base_are_refused(tmp_path, bases):
    first, second = (tmp_path / name for name in bases)
    adapter(first, str(second))
    if second != first:
        adapter(second, str(first))
    for resolve in (hub.base_of, hub.tokenizer_folder, lambda folder: hub.model(str(folder))):
        with pytest.raises(ValueError, match="is an adapter whose base is, in the end, itself: correct"):
            resolve(first)


def test_tokenizer_folder_of_an_adapter_without_its_base_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    for base in ("o/n", str(tmp_path / "missing")):
        folder = adapter(tmp_path / f"adapter_{len(base)}", base)
        with pytest.raises(ValueError, match=f"names '{base}' as base_model_name_or_path"):
            hub.tokenizer_folder(folder)


def test_tokenizer_folder_of_a_model_without_a_tokenizer_is_the_model_itself(tmp_path):
    assert hub.tokenizer_folder(tmp_path) == tmp_path  # Tokenizer raises the error
    assert hub.tokenizer_folder(tmp_path / "missing") == tmp_path / "missing"
