"""Downloads of published weights: silent servers, interrupted transfers, error pages."""

from __future__ import annotations

import contextlib
import hashlib
import io
import socket
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


def _saved(weights: dict[str, Tensor], **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save({"state_dict": weights}, buffer, **options)
    return buffer.getvalue()


def _holds(model: Any, weights: dict[str, Tensor]) -> bool:
    return all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


def test_downloads_are_cached(server, cache, weights, body, tmp_path):
    server.send("/van.pth", body)
    url = f"{server.url}/van.pth"
    for _ in range(2):
        model = small("van")
        load_checkpoint(model, url)
        assert _holds(model, weights)
    assert server.asked == ["/van.pth"]
    assert [path.name[10:] for path in cache.iterdir()] == ["-van.pth"]
    overlay = {"pretrained_cfg_overlay": {"url": url}, "cache_dir": tmp_path / "mine"}
    for _ in range(2):
        assert _holds(small("van", pretrained=True, **overlay), weights)
    assert server.asked == ["/van.pth"] * 2
    (path,) = (tmp_path / "mine").iterdir()
    assert path.name.startswith("van_b0-") and path.name.endswith("-van.pth")


def test_urls_with_the_same_base_name(server, cache, weights, body):
    server.send("/one/van.pth", body)
    other = {k: v * 2 for k, v in weights.items()}
    server.send("/two/van.pth", _saved(other))
    for path, expected in (("one/van.pth", weights), ("two/van.pth", other)):
        model = small("van")
        load_checkpoint(model, f"{server.url}/{path}")
        assert _holds(model, expected)
    for query in ("?id=1", "?id=2"):
        load_checkpoint(small("van"), f"{server.url}/one/van.pth{query}")
    assert len(list(cache.iterdir())) == len(server.asked) == 4


@pytest.mark.timeout(20)
@pytest.mark.parametrize("share", [None, 0.5])
def test_a_silent_server(share, server, cache, body, monkeypatch):
    """Before its answer, or in the middle of it."""
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    if share is None:
        server.answers["/van.pth"] = lambda handler: server.over.wait(10)
    else:
        server.send("/van.pth", body[: len(body) // 2], announced=len(body), stay=True)
    with pytest.raises(ConnectionError, match=r"sent nothing for 0\.2 s.*save it as .*-van\.pth"):
        load_checkpoint(small("van"), f"{server.url}/van.pth")
    assert not list(cache.iterdir())


@pytest.mark.timeout(20)
def test_a_server_that_never_accepts(cache, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/van.pth"
        for _ in range(3):  # the queue of those who wait is full after the first ones
            with pytest.raises(ConnectionError, match=r"sent nothing for 0\.2 s"):
                load_checkpoint(small("van"), url)


def test_downloads_that_are_cut_off(server, cache, weights, body):
    """Nothing of them stays, and the next call gets the whole file."""
    url = f"{server.url}/van.pth"
    half = body[: len(body) // 2]
    server.send("/van.pth", half, announced=len(body))
    with pytest.raises(ConnectionError, match=rf"stopped after {len(half)} of {len(body)} bytes"):
        load_checkpoint(small("van"), url)
    assert not list(cache.iterdir())
    server.send("/van.pth", half, announced=-1)  # no length: the file itself must tell
    with pytest.raises(CheckpointError, match=r"truncated.*download from .*van\.pth was deleted"):
        load_checkpoint(small("van"), url)
    assert not list(cache.iterdir())
    server.send("/van.pth", body)
    model = small("van")
    load_checkpoint(model, url)
    assert _holds(model, weights)


def test_html_instead_of_weights(server, cache, body):
    server.send("/van.pth", b"<!DOCTYPE html><title>Log in</title>")
    overlay = {"pretrained_cfg_overlay": {"url": f"{server.url}/van.pth"}}
    with pytest.raises(CheckpointError, match="a web page.*was deleted"):
        small("van", pretrained=True, **overlay)
    assert not list(cache.iterdir())
    server.send("/van.pth", body)
    small("van", pretrained=True, **overlay)


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


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/v.pth", "http://[/v.pth", "http://a b/v.pth"])
def test_unreachable_addresses(url, cache):
    with pytest.raises(ConnectionError, match=r"could not download http.*save it as .*-v\.pth"):
        load_checkpoint(small("van"), url)
    assert not list(cache.iterdir())


def test_errors_of_the_server(server, cache):
    server.answers["/van.pth"] = lambda handler: handler.send_error(404)
    with pytest.raises(ConnectionError, match="404"):
        load_checkpoint(small("van"), f"{server.url}/van.pth")
    assert not list(cache.iterdir())


def test_a_full_disk(server, cache, body, monkeypatch):
    class Full(io.BytesIO):
        def write(self, chunk: Any) -> int:
            raise OSError(28, "No space left on device")

    server.send("/van.pth", body)
    monkeypatch.setattr(download, "open", lambda *_: Full(), raising=False)
    with pytest.raises(OSError, match=r"No space left on device: .*-van\.pth"):
        load_checkpoint(small("van"), f"{server.url}/van.pth")
    assert not list(cache.iterdir())


def test_no_published_weights_says_what_exists():
    said = r"van_b5 has no downloadable weights: available: van_b5\.in22k"
    with outlines(), pytest.raises(CheckpointError, match=said):
        backbones.create_model("van_b5", pretrained=True)
    cfg = published_weights("van_b5")["untrained"]
    with pytest.raises(CheckpointError, match="its authors published none"):
        load_pretrained(small("van"), "van_b5", cfg, {})


def test_published_weights_are_requested_from_the_cfgs_url(cache, monkeypatch):
    def fail(request: Any, timeout: float) -> None:
        raise OSError(f"no route to {request.full_url}")

    monkeypatch.setattr(download, "urlopen", fail)
    expected = r"no route to http.*van_tiny_754.*save it as .*van_b0-\w+-van_tiny_754\.pth\.tar"
    with pytest.raises(ConnectionError, match=expected):
        backbones.create_model("van_b0", pretrained=True)
