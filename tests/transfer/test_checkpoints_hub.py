# SPDX-License-Identifier: Apache-2.0
"""Hugging Face ids: the local cache, and downloads from a small hub that is served here."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest
import torch
from safetensors.torch import save, save_file

from lorax_transfer.checkpoints import open_checkpoint
from lorax_transfer.errors import CheckpointError

constants = pytest.importorskip("huggingface_hub.constants")
hf_api = pytest.importorskip("huggingface_hub.hf_api")

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "org/name"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and no network."""
    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return folder


def fill(cache, files, revision="main"):
    """Lays files ({name: bytes}) out as the cache does: blobs by hash, links, a ref."""
    repo = cache / "models--org--name"
    snapshot = repo / "snapshots" / COMMIT
    for folder in (repo / "blobs", repo / "refs", snapshot):
        folder.mkdir(parents=True, exist_ok=True)
    (repo / "refs" / revision).write_text(COMMIT)
    for name, content in files.items():
        blob = repo / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        (snapshot / name).symlink_to(blob)
    return snapshot


def model(value=1.0):
    return save({"w": torch.full((2, 3), value)})


def error_of(spec, **options):
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(spec, **options)
    return str(caught.value)


class TestCache:
    def test_id_is_read_from_the_cache(self, cache):
        snapshot = fill(cache, {"model.safetensors": model(), "config.json": b'{"a": 1}'})
        with open_checkpoint(REPO) as checkpoint:
            assert checkpoint.read("w").tolist() == [[1.0] * 3] * 2
            assert checkpoint.config() == {"a": 1}
            assert checkpoint.location == REPO
            assert checkpoint.revision == COMMIT
            assert checkpoint.files() == [snapshot / "model.safetensors"]

    @pytest.mark.parametrize(
        ("spec", "revision"),
        [(f"{REPO}@v2", None), (REPO, "v2"), (f"{REPO}@v2", "v2"), (f"{REPO}@{COMMIT}", None)],
        ids=["in-the-id", "argument", "both", "commit"],
    )
    def test_revision(self, cache, spec, revision):
        fill(cache, {"model.safetensors": model()}, revision="v2")
        assert open_checkpoint(spec, revision=revision).location == REPO
        assert "cannot be reached" in error_of(REPO)

    def test_snapshot_folder_by_path(self, cache):
        snapshot = fill(cache, {"model.safetensors": model(), "config.json": b"{}"})
        assert open_checkpoint(snapshot).read("w").shape == (2, 3)

    def test_hash_of_a_blob_is_its_name(self, cache):
        snapshot = fill(cache, {"model.safetensors": model()})
        expected = f"sha256:{hashlib.sha256(model()).hexdigest()}"
        assert open_checkpoint(REPO).content_hash() == expected
        # Only a changed blob tells whether its bytes were read again.
        checkpoint = open_checkpoint(REPO)
        (snapshot / "model.safetensors").resolve().write_bytes(model(2.0))
        assert checkpoint.content_hash() == expected

    def test_a_path_wins_over_an_id(self, cache, tmp_path, monkeypatch):
        fill(cache, {"model.safetensors": model(1.0)})
        monkeypatch.chdir(tmp_path)
        (tmp_path / REPO).mkdir(parents=True)
        save_file({"w": torch.zeros(1)}, tmp_path / REPO / "model.safetensors")
        assert open_checkpoint(REPO).read("w").tolist() == [0.0]

    def test_two_revisions(self, cache):
        assert "names revision 'a' and revision 'b'" in error_of(f"{REPO}@a", revision="b")

    def test_malformed_id(self, cache):
        assert "'org/na--me' is not a valid Hugging Face id" in error_of("org/na--me")


class TestOffline:
    def test_nothing_cached(self, cache):
        message = error_of(REPO)
        assert "'org/name' is no path here" in message
        assert "cannot be reached (OfflineModeIsEnabled)" in message

    @pytest.mark.parametrize(
        ("files", "reason"),
        [
            ({"config.json": b"{}"}, "holds config.json, but no"),
            ({"pytorch_model.bin": b"PK\x03\x04"}, "holds pytorch_model.bin only"),
            (
                {"model.safetensors.index.json": b'{"weight_map": {"w": "s.safetensors"}}'},
                "names s.safetensors, which is not beside",
            ),
            ({"model.safetensors": b"abc"}, "is cut off"),
        ],
        ids=["config-only", "pickle-only", "shard-missing", "truncated"],
    )
    def test_cached_copy_that_cannot_be_used(self, cache, files, reason):
        fill(cache, files)
        message = error_of(REPO)
        assert "cannot be reached" in message
        assert reason in message


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's API that a download needs, for one repository."""

    def do_HEAD(self):
        self.respond(body=False)

    def do_GET(self):
        self.respond(body=True)

    def respond(self, body):
        files = self.server.files
        path = unquote(urlsplit(self.path).path)
        status, content, headers = 404, b"{}", {"X-Error-Code": "RepoNotFound"}
        if path.startswith(f"/api/models/{REPO}/tree/"):
            entries = [
                {
                    "type": "file",
                    "path": name,
                    "size": len(data),
                    "oid": "0" * 40,
                    "lfs": {
                        "oid": hashlib.sha256(data).hexdigest(),
                        "size": len(data),
                        "pointerSize": 1,
                    },
                }
                for name, data in files.items()
            ]
            status, content, headers = 200, json.dumps(entries).encode(), {}
        elif path.startswith(f"/api/models/{REPO}"):
            info = {"id": REPO, "sha": COMMIT, "siblings": [{"rfilename": n} for n in files]}
            status, content, headers = 200, json.dumps(info).encode(), {}
        elif path.startswith(f"/{REPO}/resolve/"):
            name = path.split("/", 5)[5]
            if name in files:
                self.server.served.add(name)
                digest = hashlib.sha256(files[name]).hexdigest()
                status, content = 200, files[name]
                headers = {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT}
            else:
                headers = {"X-Error-Code": "EntryNotFound"}
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(cache, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.served = {}, set()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        url + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(hf_api.api, "endpoint", url)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


class TestDownload:
    def test_only_what_is_needed_is_downloaded(self, hub):
        hub.files = {
            "model.safetensors": model(),
            "config.json": b'{"a": 1}',
            "pytorch_model.bin": b"PK\x03\x04",
            "consolidated.safetensors": model(2.0),
            "model.gguf": b"GGUF",
            "onnx/model.onnx": b"x",
        }
        checkpoint = open_checkpoint(REPO)
        assert checkpoint.read("w").tolist() == [[1.0] * 3] * 2
        assert checkpoint.revision == COMMIT
        assert checkpoint.config() == {"a": 1}
        assert hub.served == {"model.safetensors", "config.json"}

    def test_the_second_time_comes_from_the_cache(self, hub):
        hub.files = {"model.safetensors": model()}
        open_checkpoint(REPO)
        hub.served.clear()
        hub.files = {}
        assert open_checkpoint(REPO).read("w").shape == (2, 3)
        assert hub.served == set()

    def test_shards_of_the_index_and_no_others(self, hub):
        index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
        hub.files = {
            "model.safetensors.index.json": json.dumps(index).encode(),
            "model-1.safetensors": save({"a": torch.ones(1)}),
            "model-2.safetensors": save({"b": torch.ones(2)}),
            "model-3.safetensors": save({"c": torch.ones(3)}),
        }
        assert open_checkpoint(REPO).names() == ["a", "b"]
        assert "model-3.safetensors" not in hub.served

    def test_an_index_that_leads_elsewhere(self, hub):
        hub.files = {"model.safetensors.index.json": b'{"weight_map": {"w": "../x"}}'}
        assert "puts 'w' into '../x'" in error_of(REPO)

    def test_an_incomplete_cache_is_completed(self, hub, cache):
        fill(cache, {"config.json": b"{}"})
        hub.files = {"model.safetensors": model(), "config.json": b"{}"}
        assert open_checkpoint(REPO).read("w").shape == (2, 3)

    @pytest.mark.parametrize(
        ("names", "reason"),
        [
            (["pytorch_model.bin"], "holds no safetensors and no GGUF file.*pytorch_model.bin"),
            (["a.gguf", "b.gguf"], "several .gguf files and no index: a.gguf, b.gguf"),
            (["x.safetensors", "y.safetensors"], "several .safetensors files and no index"),
        ],
        ids=["pickle", "ggufs", "safetensors"],
    )
    def test_repositories_that_are_refused(self, hub, names, reason):
        hub.files = dict.fromkeys(names, b"")
        with pytest.raises(CheckpointError, match=reason):
            open_checkpoint(REPO)
        assert hub.served == set()

    def test_unknown_repository(self, hub):
        message = error_of("org/unknown", revision="v1")
        assert "'org/unknown' at revision 'v1' is no path here and no repository" in message
