"""Published weights are downloaded once, verified, and never used when incomplete."""

import concurrent.futures
import functools
import hashlib
import http.server
import threading

import numpy as np
import pytest

from keras_fpn.weights.published import CLASSIFIERS, DETECTORS, fetch, find_classifier


@pytest.fixture
def server(tmp_path):
    """A folder, the URL that serves it, and the handler that counts its requests."""
    folder = tmp_path / "server"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        requests = 0

        def do_GET(self):
            Handler.requests += 1
            super().do_GET()

        def log_message(self, *arguments):
            pass

    handler = functools.partial(Handler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}", Handler
        server.shutdown()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "keras_fpn"


@pytest.fixture
def published(server):
    """A file with one array, named after its SHA-256 as published files are, and its URL."""
    folder, address, _ = server
    np.savez(folder / "whole.npz", x=np.arange(1000.0))
    content = (folder / "whole.npz").read_bytes()
    name = f"detector-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    (folder / name).write_bytes(content)
    return folder / name, f"{address}/{name}"


def test_a_file_is_downloaded_and_converted_once(published, cache, server):
    _, url = published
    first = fetch("coco", url)
    assert first.parent == cache
    with np.load(first) as arrays:
        np.testing.assert_array_equal(arrays["x"], np.arange(1000.0))
    assert fetch("coco", url) == first
    assert server[2].requests == 1
    assert list(cache.iterdir()) == [first]


def test_the_rest_of_a_killed_download_is_not_mistaken_for_the_file(published, cache):
    file, url = published
    cache.mkdir(parents=True)
    (cache / file.name).write_bytes(file.read_bytes()[:500])
    with np.load(fetch("coco", url)) as arrays:
        assert arrays["x"].shape == (1000,)


def test_concurrent_downloads_do_not_interfere(published, cache):
    _, url = published
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        paths = list(threads.map(lambda _: fetch("coco", url), range(4)))
    assert len(set(paths)) == 1
    assert list(cache.iterdir()) == paths[:1]


def test_a_damaged_conversion_is_repeated(published, cache, server):
    _, url = published
    converted = fetch("coco", url)
    converted.write_bytes(converted.read_bytes()[:500])
    with np.load(fetch("coco", url)) as arrays:
        assert arrays["x"].shape == (1000,)
    assert server[2].requests == 2


def test_a_damaged_file_is_refused_and_not_kept(published, cache):
    file, url = published
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(ConnectionError, match=rf"'coco' from {url} is damaged .*SHA-256"):
        fetch("coco", url)
    assert not list(cache.iterdir())


def test_without_a_connection_the_error_names_the_weights_and_the_url(cache):
    url = "http://127.0.0.1:1/detector-01234567.pth"
    with pytest.raises(ConnectionError, match=rf"'coco' from {url}: .*path"):
        fetch("coco", url)


def test_a_file_that_is_not_there(published, cache):
    file, url = published
    file.unlink()
    with pytest.raises(ConnectionError, match=rf"'coco' from {url}: File not found"):
        fetch("coco", url)


def test_file_names_end_in_8_digits_of_a_sha256():
    for url in (*DETECTORS.values(), *CLASSIFIERS.values()):
        digits = url.removesuffix(".pth").rsplit("-", 1)[1]
        assert len(digits) == 8
        int(digits, 16)


def test_imagenet_weights_of_a_backbone_that_has_none():
    with pytest.raises(ValueError, match=r"imagenet.* resnet18, .* backbone='resnet51'"):
        find_classifier("resnet51", "imagenet")
