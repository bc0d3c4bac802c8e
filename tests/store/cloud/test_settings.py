"""URLs, options and the environment."""

from __future__ import annotations

import pickle

import pytest

from ucp.errors import UsageError
from ucp.store import open_store
from ucp.store.cloud.address import parse
from ucp.store.cloud.options import Options, options_from


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://bucket", "s3://bucket"),
        ("s3a://bucket/a/b/", "s3://bucket/a/b"),
        ("gcs://bucket/a", "gs://bucket/a"),
        ("gs://bucket/100%/a#b", "gs://bucket/100%/a#b"),
        ("azure://box/a", "az://box/a"),
        ("abfs://box/a", "az://box/a"),
        ("abfss://box@account.dfs.core.windows.net/a", "abfss://box@account.dfs.core.windows.net/a"),
    ],
)
def test_urls_have_one_spelling(url, shown):
    assert open_store(url).url == shown
    assert open_store(shown).url == shown


@pytest.mark.parametrize("url", ["s3://", "s3:///a", "gs://", "abfss://@account/x", "https://", "https:///x"])
def test_urls_without_a_bucket_are_refused(url):
    with pytest.raises(UsageError):
        open_store(url)


@pytest.mark.parametrize(
    "url",
    ["s3://me:secret@bucket/a", "az://me:secret@box", "az://box/a?sv=1&sig=secret", "s3://b/a?X-Amz-Signature=secret"],
)
def test_urls_with_credentials_are_refused_and_not_shown(url):
    with pytest.raises(UsageError) as caught:
        open_store(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("path", ["a//b", "a/", "./a", "a/.", "a/../b", "..", "/a", "a\nb", "a\0", "a\x7f"])
def test_paths_that_object_stores_would_change_are_refused(path):
    with pytest.raises(UsageError):
        parse("s3://bucket/x").key(path)


def test_folders_overlap_where_their_names_and_servers_do():
    inner, outer = open_store("s3://bucket/a/b"), open_store("s3a://bucket/a")
    assert inner.overlaps(outer)
    assert outer.overlaps(inner)
    assert not inner.overlaps(open_store("gs://bucket/a"))
    assert not inner.overlaps(open_store("s3://bucket/a", endpoint="http://elsewhere"))


def test_options_are_checked():
    with pytest.raises(UsageError, match="nonesuch"):
        open_store("s3://bucket", nonesuch=1)
    with pytest.raises(UsageError, match="attempts"):
        open_store("s3://bucket", attempts="3")
    assert options_from({"read_timeout": 3}).read_timeout == 3


def test_options_come_from_the_environment_where_none_is_given(monkeypatch):
    monkeypatch.setenv("UCP_STORE_CONCURRENCY", "3")
    monkeypatch.setenv("UCP_STORE_READ_TIMEOUT", "1.5")
    monkeypatch.setenv("UCP_STORE_ANONYMOUS", "yes")
    monkeypatch.setenv("UCP_STORE_ENDPOINT", "http://somewhere")
    found = Options(concurrency=5).resolved()
    assert (found.concurrency, found.read_timeout, found.anonymous) == (5, 1.5, True)
    assert found.endpoint == "http://somewhere"
    assert open_store("s3://bucket").parallel == 3


def test_a_wrong_variable_is_named_and_its_text_is_not(monkeypatch):
    monkeypatch.setenv("UCP_STORE_ATTEMPTS", "hunter2")
    with pytest.raises(UsageError, match="UCP_STORE_ATTEMPTS") as caught:
        Options().resolved()
    assert "hunter2" not in str(caught.value)


def test_keys_are_not_shown():
    options = Options(sse_customer_key="c2VjcmV0")
    assert "c2VjcmV0" not in repr(options)


def test_credentials_of_the_environment_stay_there(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDAKID")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    store = open_store("s3://bucket/a", region="us-east-1")
    assert store.client.concurrency == 16
    assert b"hunter2" not in pickle.dumps(store)
    assert "hunter2" not in repr(store.client)
    assert pickle.loads(pickle.dumps(store)).url == store.url


def test_a_bucket_may_have_variables_of_its_own(monkeypatch):
    """A command that reads one service and writes another is told of both."""
    monkeypatch.setenv("UCP_STORE_ENDPOINT", "https://everywhere")
    monkeypatch.setenv("UCP_STORE__RUNS_2026_EU__ENDPOINT", "https://eu")
    monkeypatch.setenv("UCP_STORE__RUNS_2026_EU__CONCURRENCY", "3")
    assert open_store("s3://runs-2026.eu/x").parallel == 3
    assert Options().resolved("runs-2026.eu").endpoint == "https://eu"
    assert Options().resolved("runs-2026").endpoint == "https://everywhere"
    assert Options(endpoint="https://asked").resolved("runs-2026.eu").endpoint == "https://asked"
    monkeypatch.setenv("UCP_STORE__B__READ_TIMEOUT", "secret")
    with pytest.raises(UsageError, match="UCP_STORE__B__READ_TIMEOUT") as caught:
        Options().resolved("b")
    assert "secret" not in str(caught.value)
