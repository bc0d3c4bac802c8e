"""Reading over HTTP. The server is the mock of S3, whose objects anybody may read by their URL."""

from __future__ import annotations

import http.server
import json
import threading

import pytest

import ucp
from tests.servers.endpoint import BUCKET
from ucp.errors import CorruptError, NotFoundError, StorageError, UsageError
from ucp.store import SingleStore, open_source, open_store
from ucp.store.traffic import TRAFFIC


@pytest.fixture
def url(s3, prefix):
    return f"{s3.address}/{BUCKET}/{prefix}"


@pytest.fixture
def publish(bucket, prefix):
    """Lets anybody read what was put so far."""

    def publish():
        for found in bucket.objects.filter(Prefix=prefix):
            found.Acl().put(ACL="public-read")

    return publish


@pytest.fixture
def web(url):
    return open_store(url)


def test_what_was_put_is_read(store, web, publish):
    store.put("a b/ü%", bytes(range(100)))
    publish()
    assert web.read("a b/ü%") == bytes(range(100))
    assert web.read("a b/ü%", 10, 5) == bytes(range(10, 15))
    assert web.child("a b").read("ü%", 90) == bytes(range(90, 100))
    assert web.child("x").sibling("a b").exists("ü%")
    assert web.entry("a b/ü%").size == 100
    with pytest.raises(CorruptError, match="early"):
        web.read("a b/ü%", 99, 2)
    with pytest.raises(NotFoundError):
        web.read("nothing")
    assert not web.exists("nothing")


def test_it_neither_lists_nor_writes(web):
    assert not web.lists
    assert not web.conditional
    for ask in (web.children, lambda: list(web.entries()), lambda: web.put("a", b""), lambda: web.delete("a")):
        with pytest.raises(UsageError, match="HTTP"):
            ask()
    with pytest.raises(UsageError):
        web.create("a", 1)
    for path in ("../a", "/a", "a//b"):
        with pytest.raises(UsageError):
            web.read(path)


def test_a_query_is_sent_and_not_shown(store, url, publish):
    store.put("a", b"1")
    publish()
    web = open_store(f"{url}?signature=hunter2")
    assert web.read("a") == b"1"
    assert "hunter2" not in web.url + web.child("b").url
    with pytest.raises(NotFoundError) as caught:
        web.read("nothing")
    assert "hunter2" not in str(caught.value)


def test_the_url_of_a_file_is_the_file(store, url, publish):
    store.put("x y.bin", b"123")
    publish()
    single = open_source(f"{url}/x%20y.bin?signature=1")
    assert isinstance(single, SingleStore)
    assert single.children() == ["x y.bin"]
    assert single.read("x y.bin") == b"123"


class WithoutRanges(http.server.BaseHTTPRequestHandler):
    """Answers every GET with the whole object, whatever range is asked for."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "20")
        self.end_headers()
        self.wfile.write(b"0123456789abcdefghij")

    def log_message(self, *_):
        """Quiet."""


def test_a_server_without_ranges_is_found_out():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), WithoutRanges)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        web = open_store(f"http://127.0.0.1:{server.server_port}/x")
        for ask in (lambda: web.read("a", 10, 5), lambda: web.read("a"), lambda: web.read_into("a", 0, bytearray(20))):
            with pytest.raises(StorageError, match="ignores ranges"):
                ask()
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A universal checkpoint and its tensors."""
    import torch

    folder = tmp_path_factory.mktemp("saved")
    tensors = {"a.weight": torch.arange(12.0).reshape(3, 4), "b": torch.ones(5)}
    ucp.save(tensors, str(folder / "step1"), form="universal")
    return folder / "step1"


def copied(folder, store):
    for file in folder.rglob("*"):
        if file.is_file():
            store.put(file.relative_to(folder).as_posix(), file.read_bytes())


def same(one, other):
    assert list(one) == list(other)
    for name in one:
        assert one[name]["value"][...].tolist() == other[name]["value"][...].tolist()


def test_a_checkpoint_is_opened_over_http_and_converted_to_s3(saved, store, url, publish):
    from ucp.run.convert import convert

    copied(saved, store)
    publish()
    before = TRAFFIC.snapshot()
    same(ucp.open(url), ucp.open(saved))
    assert TRAFFIC.snapshot().since(before).requests["http", "get"].count
    convert(url, f"{store.url}/copy")
    same(ucp.open(f"{store.url}/copy"), ucp.open(saved))


def test_files_of_hugging_face_are_found_by_their_usual_names(store, url, publish, tmp_path):
    import torch
    from safetensors.torch import save_file

    save_file({"x": torch.ones(3)}, tmp_path / "model-00001-of-00002.safetensors", {"format": "pt"})
    save_file({"y": torch.zeros(2)}, tmp_path / "model-00002-of-00002.safetensors", {"format": "pt"})
    held = {"x": "model-00001-of-00002.safetensors", "y": "model-00002-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": held}))
    (tmp_path / "config.json").write_text('{"model_type": "none"}')
    copied(tmp_path, store)
    publish()
    found = ucp.open(url)
    assert found.catalog.source.family == "hf"
    same(found, ucp.open(tmp_path))


def test_what_needs_a_list_is_told(store, url, publish):
    store.put("latest", b"global_step1")
    publish()
    with pytest.raises(NotFoundError, match="over HTTP") as caught:
        ucp.open(url)
    assert "copy" in caught.value.hint
    with pytest.raises(UsageError, match="over HTTP"):
        ucp.open(url, family="deepspeed")
