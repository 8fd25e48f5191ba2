"""Downloads of published weights: silent servers, interrupted transfers, error pages."""

from __future__ import annotations

import contextlib
import hashlib
import io
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from zoo import outlines, small

import backbones
from backbones import CheckpointError, load_checkpoint
from backbones.common import download
from backbones.core.checkpoint import load_pretrained
from backbones.core.registry import published_weights

Answer = Callable[[BaseHTTPRequestHandler], None]


class Server:
    """On 127.0.0.1; ``answers`` by path, without a query; ``asked`` are the paths in turn."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        self.asked: list[str] = []
        self.over = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(self.path)
                with contextlib.suppress(ConnectionError):  # the client has gone
                    outer.answers[self.path.partition("?")[0]](self)

            def log_message(self, *args: Any) -> None:
                """Nothing."""

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    def send(self, path: str, body: bytes, *, announced: int | None = None, stay: bool = False):
        """Answer with ``body``, having announced another length; ``stay`` keeps the line open."""

        def answer(handler: BaseHTTPRequestHandler) -> None:
            handler.send_response(200)
            if announced is None or announced >= 0:
                handler.send_header("Content-Length", str(announced or len(body)))
            handler.end_headers()
            handler.wfile.write(body)
            handler.wfile.flush()
            if stay:
                self.over.wait(10)

        self.answers[path] = answer


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.over.set()
    server.http.shutdown()
    server.http.server_close()
    thread.join()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    return tmp_path / "checkpoints"


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return {k: v + 1 for k, v in small("van").state_dict().items()}


@pytest.fixture(scope="module")
def body(weights: dict[str, Tensor]) -> bytes:
    return _saved(weights)


def _saved(weights: dict[str, Tensor]) -> bytes:
    buffer = io.BytesIO()
    torch.save({"state_dict": weights}, buffer)
    return buffer.getvalue()


def _gets(weights: dict[str, Tensor], url: str) -> None:
    """Load them from there."""
    model = small("van")
    load_checkpoint(model, url)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


def test_downloads_are_cached(server, cache, weights, body, tmp_path):
    server.send("/van.pth", body)
    url = f"{server.url}/van.pth"
    for _ in range(2):
        _gets(weights, url)
    assert server.asked == ["/van.pth"]
    assert [path.name[10:] for path in cache.iterdir()] == ["-van.pth"]
    overlay = {"pretrained_cfg_overlay": {"url": url}, "cache_dir": tmp_path / "mine"}
    for _ in range(2):
        state = small("van", pretrained=True, **overlay).state_dict()
        assert all(torch.equal(tensor, weights[key]) for key, tensor in state.items())
    assert server.asked == ["/van.pth"] * 2
    (path,) = (tmp_path / "mine").iterdir()
    assert path.name.startswith("van_b0-") and path.name.endswith("-van.pth")


def test_urls_with_the_same_base_name(server, cache, weights, body):
    server.send("/one/van.pth", body)
    other = {k: v * 2 for k, v in weights.items()}
    server.send("/two/van.pth", _saved(other))
    for path, expected in (("one/van.pth", weights), ("two/van.pth", other)):
        _gets(expected, f"{server.url}/{path}")
    for query in ("?id=1", "?id=2"):
        _gets(weights, f"{server.url}/one/van.pth{query}")
    assert len(list(cache.iterdir())) == len(server.asked) == 4


@pytest.mark.timeout(20)
@pytest.mark.parametrize("when", ["answering", "sending"])
def test_a_silent_server(when, server, cache, body, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    server.answers["/van.pth"] = lambda handler: server.over.wait(10)
    if when == "sending":
        server.send("/van.pth", body[: len(body) // 2], announced=len(body), stay=True)
    told = r"sent nothing for 0\.2 s.*save it as .*-van\.pth"
    with pytest.raises(ConnectionError, match=told):
        load_checkpoint(small("van"), f"{server.url}/van.pth")
    assert not list(cache.iterdir())


def test_downloads_that_are_cut_off(server, cache, weights, body):
    """Nothing of them stays, and the next call gets the whole file."""
    url, half = f"{server.url}/van.pth", body[: len(body) // 2]
    stopped = rf"stopped after {len(half)} of {len(body)} bytes"
    for sent, announced, error, told in (
        (half, len(body), ConnectionError, stopped),
        # No length: the file itself must tell.
        (half, -1, CheckpointError, r"truncated.*download from .*van\.pth was deleted"),
        (b"<!DOCTYPE html><title>Log in</title>", None, CheckpointError, "a web page.*was deleted"),
    ):
        server.send("/van.pth", sent, announced=announced)
        with pytest.raises(error, match=told):
            load_checkpoint(small("van"), url)
        assert not list(cache.iterdir())
    server.send("/van.pth", body)
    _gets(weights, url)


def test_a_rejected_file_is_kept(server, cache, body):
    """It would be the same again; and a file of another model is no damage."""
    server.send("/model.pth", _saved({"a": torch.nn.Linear(1, 1)}))  # type: ignore[dict-item]
    server.send("/van.pth", body)
    with pytest.raises(CheckpointError, match="Linear; it was not executed"):
        load_checkpoint(small("van"), f"{server.url}/model.pth")
    with pytest.raises(CheckpointError, match="does not fit SHViT"):
        load_checkpoint(small("shvit"), f"{server.url}/van.pth")
    assert len(list(cache.iterdir())) == 2


def test_checksums_in_names(server, cache, body):
    right = hashlib.sha256(body).hexdigest()
    for digits in (right[:8], right, "20220909"):  # the last is a date
        server.send(f"/van-{digits}.pth", body)
        load_checkpoint(small("van"), f"{server.url}/van-{digits}.pth")
    before = sorted(cache.iterdir())
    server.send("/van-deadbeef.pth", body)
    with pytest.raises(CheckpointError, match=f"discarded.*begins with {right[:8]}, not with dead"):
        load_checkpoint(small("van"), f"{server.url}/van-deadbeef.pth")
    assert sorted(cache.iterdir()) == before


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1/v.pth", "http://[/v.pth", "http://a b/v.pth", "{0}/v.pth"]
)
def test_unreachable_addresses(url, server, cache):
    server.answers["/v.pth"] = lambda handler: handler.send_error(404)
    told = r"could not download http.*save it as .*-v\.pth"
    with pytest.raises(ConnectionError, match=told) as raised:
        load_checkpoint(small("van"), url.replace("{0}", server.url))
    assert "{0}" not in url or "404" in str(raised.value)
    assert not list(cache.iterdir())


def test_published_weights(cache, monkeypatch):
    """They are requested from the cfg's URL, or it is said which ones exist."""

    def fail(request: Any, timeout: float) -> None:
        raise OSError(f"no route to {request.full_url}")

    monkeypatch.setattr(download, "urlopen", fail)
    expected = r"no route to http.*van_tiny_754.*save it as .*van_b0-\w+-van_tiny_754\.pth\.tar"
    with pytest.raises(ConnectionError, match=expected):
        backbones.create_model("van_b0", pretrained=True)
    said = r"van_b5 has no downloadable weights: available: van_b5\.in22k"
    with outlines(), pytest.raises(CheckpointError, match=said):
        backbones.create_model("van_b5", pretrained=True)
    cfg = published_weights("van_b5")["untrained"]
    with pytest.raises(CheckpointError, match="its authors published none"):
        load_pretrained(small("van"), "van_b5", cfg, {})


def test_a_full_disk(server, cache, body, monkeypatch):
    class Full(io.BytesIO):
        def write(self, chunk: Any) -> int:
            raise OSError(28, "No space left on device")

    server.send("/van.pth", body)
    monkeypatch.setattr(download, "open", lambda *_: Full(), raising=False)
    with pytest.raises(OSError, match=r"No space left on device: .*-van\.pth"):
        load_checkpoint(small("van"), f"{server.url}/van.pth")
    assert not list(cache.iterdir())
