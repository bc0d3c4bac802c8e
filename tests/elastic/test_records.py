"""What a run tells in storage of what its nodes hold."""

from __future__ import annotations

import threading

from ucp.elastic.records import Records


def test_a_promise_that_comes_late_is_not_made_any_more(tmp_path, monkeypatch):
    """It is put in the background, and must not stay when the run has ended and removed what it was about."""
    records = Records(str(tmp_path))
    records.promise(1, ["a", "b"], 5)
    assert Records(str(tmp_path)).past().nodes == ("a", "b")
    put, under_way, go_on = records._store.put, threading.Event(), threading.Event()

    def slow(name, data, **options):
        under_way.set()
        assert go_on.wait(60)
        return put(name, data, **options)

    monkeypatch.setattr(records._store, "put", slow)
    late = threading.Thread(target=records.promise, args=(1, ["a", "b"], 10))
    late.start()
    assert under_way.wait(60)
    ending = threading.Thread(target=records.forget, args=(1,))
    ending.start()
    go_on.set()
    for one in (late, ending):
        one.join(60)
        assert not one.is_alive()
    records.promise(1, ["a", "b"], 15)
    assert Records(str(tmp_path)).past().nodes == ()
