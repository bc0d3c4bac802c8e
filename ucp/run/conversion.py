"""What is to be converted, from where, into what: a plan that is ready to run."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ucp.catalog import Catalog
from ucp.converter import Target
from ucp.plan import Plan
from ucp.run.destination import State, Wanted
from ucp.run.laying_out import losses_of
from ucp.store import Store


@dataclass(frozen=True, slots=True)
class Conversion:
    """A conversion that is ready to run; nothing has been written.

    `state` is ``new``, ``partial`` (an earlier run was cut short and will be resumed) or ``done``. `wanted` is what
    will be there in the end.
    """

    catalog: Catalog
    target: Target
    plan: Plan
    to: str
    source: Store
    destination: Store
    wanted: Wanted
    state: State

    @property
    def source_url(self) -> str:
        """Where the source lies."""
        return self.catalog.url

    @property
    def destination_url(self) -> str:
        """Where the result will lie."""
        return self.destination.url

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks of the reader, then those of the target, such as what its form cannot hold, then accepted losses."""
        losses = losses_of(self.to, self.catalog, self.target)
        return (*self.catalog.notes, *self.target.notes, *(f"not exact: {loss}" for loss in losses))

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each object that its tasks write, by path."""
        return {task.object: task.size for task in self.target.tasks}

    def placed(self, generation: str) -> Conversion:
        """The same conversion under the names of a generation."""
        if not generation:
            return self
        target = self.wanted.placed(generation)
        return replace(self, target=target, plan=Plan.of(target.tasks))
