"""What torch.save writes: state dicts, dicts around one, checkpoints of Lightning, folders of Accelerate and Trainer.

Only metadata is read and nothing is executed. What is in which file is told in the modules of `ucp.converters._torch`,
each of which names the files of torch, Lightning, Accelerate and transformers that its facts come from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ucp.catalog import Catalog
from ucp.errors import CorruptError, NotFoundError, UsageError
from ucp.store import Store

from ._torch.files import detect
from ._torch.options import Options
from ._torch.read import read_catalog
from ._torch.target import FAMILY, TorchTarget, make_target


class TorchSave:
    """The converter of family ``torch``."""

    family = FAMILY

    def detect(self, store: Store) -> bool:
        """Whether `store` is a file of torch.save, or a folder with one or with what Accelerate or Trainer save."""
        return detect(store)

    def read(
        self,
        store: Store,
        *,
        file: str | None = None,
        model: Sequence[str] | str = (),
        optimizer: Sequence[str] | str = (),
        frozen: Sequence[str] | str = (),
        order: Sequence[str] | str = (),
        **options: Any,
    ) -> Catalog:
        """The catalog of one checkpoint.

        `file` chooses one of several files in a folder. `model` and `optimizer` name the entries of the saved dict that
        hold them, where their keys are unusual; of several models, each gives its name to its tensors.

        Optimizers number their parameters. Where they saved no names beside, those are inferred from shapes and the
        order of parameters, as a remark says. Where these leave more than one possibility, the parameters concerned are
        `undecided` until told, and the states that may be theirs are in ``state["optimizer"]["unnamed"]``. `order`
        tells: patterns of the parameters in the order in which the optimizer got them, or a local text file (``.txt``)
        with one name per line; `frozen` are patterns of those that it did not get. Lists may be given as text with
        blanks between.

        NotFoundError for a file or entry that is not there, FitError where it is not told what is the model and for
        patterns that match nothing, CorruptError for damage, UnsafeError for a malicious file.
        """
        if options:
            raise UsageError(
                f"{FAMILY}: unknown option {next(iter(options))!r}", hint="known: file model optimizer frozen order"
            )
        chosen = Options.of(file=file, model=model, optimizer=optimizer, frozen=frozen, order=order)
        with _with_hint():
            return read_catalog(store, chosen)

    def target(self, catalog: Catalog, store: Store, **options: Any) -> TorchTarget:
        """Lay `catalog` out as ``checkpoint.pt``, a dict that ``torch.load(weights_only=True)`` takes.

        It has ``model`` and, where there is one, ``optimizer``, for `load_state_dict` of these, ``step``, and training
        state under its own names. Nothing of it needs ucp. Of optimizer states that cannot be told apart nothing is
        written, which is a loss; training state that only a class of somebody's could hold is left out, with a note.
        """
        if options:
            raise UsageError(f"{FAMILY}: unknown option {next(iter(options))!r}", hint="its target has no options")
        return make_target(catalog, store)


@contextmanager
def _with_hint() -> Iterator[None]:
    """Say what to do about damaged and missing files, where nothing more exact is said."""
    try:
        yield
    except (CorruptError, NotFoundError) as error:
        error.hint = error.hint or "a file is damaged, missing or foreign: copy it again from where it was written"
        raise


CONVERTER = TorchSave()

__all__ = ["CONVERTER", "TorchSave"]
