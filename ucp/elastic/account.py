"""The account of a start, which is put beside the checkpoints while training goes on."""

from __future__ import annotations

import logging
import threading

from ucp.elastic.holdings import Holdings
from ucp.elastic.report import RunReport
from ucp.errors import UcpError

_log = logging.getLogger("ucp")


class Account:
    """Of the run at `url`, on rank 0. A store that does not take it is no failure."""

    def __init__(self, url: str, held: Holdings) -> None:
        self._url, self._held = url, held
        self._thread: threading.Thread | None = None

    def begun(self, report: RunReport) -> None:
        """The job trains: tell what that took, without waiting for storage."""
        self._thread = threading.Thread(target=self._put, args=(report,), name="ucp-timeline", daemon=True)
        self._thread.start()

    def ended(self, report: RunReport) -> None:
        """The run ended in the ordinary way: tell where, so that the next one does not take its steps for lost."""
        if self._thread is not None:
            self._thread.join()
        self._put(report)

    def _put(self, report: RunReport) -> None:
        try:
            self._held.records.account(report.epoch, report.doc)
        except UcpError as error:
            _log.warning("%s: the times of epoch %d are not recorded: %s", self._url, report.epoch, error)
