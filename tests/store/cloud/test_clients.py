"""What the services are told: settings of the client for each of them."""

from __future__ import annotations

import sys

import pytest

from tests.servers.proxy import Proxy
from tests.store.cloud.waiting import seen
from ucp.errors import UsageError
from ucp.store import open_store


def config(store):
    return {"_".join(name.split("_")): value for name, value in store.client.once.config.items()}


@pytest.fixture
def no_profiles(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))


class TestAws:
    @pytest.fixture(autouse=True)
    def home(self, no_profiles):
        """No shared configuration."""

    def test_options_reach_the_client(self):
        store = open_store(
            "s3://bucket",
            endpoint="https://s3.example",
            region="eu-north-1",
            requester_pays=True,
            anonymous=True,
            sse="aws:kms",
            sse_kms_key="key-1",
        )
        found = str(sorted(config(store).items()))
        for told in ("https://s3.example", "eu-north-1", "aws:kms", "key-1"):
            assert told in found
        assert store.client.once.config["request_payer"] in (True, "true")
        assert store.client.once.config["skip_signature"] in (True, "true")

    def test_a_key_of_the_customer_means_sse_c(self):
        key = "MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE="
        found = str(open_store("s3://bucket", sse_customer_key=key, anonymous=True).client.once.config)
        assert "sse-c" in found

    def test_a_profile_gives_credentials_endpoint_and_region(self, served, monkeypatch, tmp_path):
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
        (tmp_path / "credentials").write_text("[mine]\naws_access_key_id=AKIDMINE\naws_secret_access_key=secret\n")
        endpoint = served("moto")
        with Proxy(endpoint.port) as proxy:
            address = endpoint.through(proxy.port).address
            (tmp_path / "config").write_text(f"[profile mine]\nregion=eu-west-3\nendpoint_url={address}\n")
            assert not open_store(endpoint.url("a"), profile="mine").exists("b")
            monkeypatch.setenv("AWS_PROFILE", "mine")
            assert not open_store(endpoint.url("a")).exists("b")
            signed = [exchange.authorization for exchange in seen(proxy, 2)]
        assert len(signed) == 2
        assert all("AKIDMINE" in text and "eu-west-3" in text for text in signed)

    def test_a_profile_that_is_none(self):
        with pytest.raises(UsageError, match="nonesuch"):
            open_store("s3://bucket", profile="nonesuch").exists("a")

    def test_a_profile_without_the_package_that_reads_it(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "botocore", None)
        monkeypatch.setitem(sys.modules, "botocore.session", None)
        monkeypatch.setitem(sys.modules, "botocore.exceptions", None)
        with pytest.raises(UsageError, match="botocore") as caught:
            open_store("s3://bucket", profile="mine").exists("a")
        assert "universal-checkpoint[aws]" in caught.value.hint

    def test_anonymous_requests_are_not_signed(self, served):
        endpoint = served("moto")
        with Proxy(endpoint.port) as proxy:
            store = open_store(endpoint.url("a"), anonymous=True, endpoint=endpoint.through(proxy.port).address)
            store.exists("b")
            assert not seen(proxy, 1)[0].authorization


class TestAzure:
    def test_a_connection_string_says_all(self, monkeypatch):
        text = "AccountName=mine;AccountKey=c2VjcmV0;BlobEndpoint=http://127.0.0.1:1/mine"
        monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", text)
        found = config(open_store("az://box"))
        assert "mine" in found.values()
        assert "http://127.0.0.1:1/mine" in found.values()

    def test_the_emulator(self, monkeypatch):
        monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", "UseDevelopmentStorage=true")
        assert open_store("az://box").client.family == "az"

    def test_the_account_may_be_in_the_url(self):
        store = open_store("abfss://box@mine.dfs.core.windows.net/a", anonymous=True)
        assert "mine" in config(store).values()

    def test_without_an_account_the_remedy_is_told(self):
        with pytest.raises(UsageError, match="az://box") as caught:
            open_store("az://box").exists("a")
        assert "docs/storage.md" in caught.value.hint

    def test_options_of_s3_are_refused(self):
        with pytest.raises(UsageError, match="encryption"):
            open_store("abfss://box@mine.x", sse="AES256").exists("a")


def test_options_of_s3_are_refused_by_google():
    with pytest.raises(UsageError, match="encryption"):
        open_store("gs://bucket", sse="AES256", anonymous=True).exists("a")
