"""Everything ucp raises on purpose, one class per way a caller would handle it.

    UcpError                  exit 1    internal; please report
    ├── UsageError            exit 2    the call or its options are off
    ├── NotFoundError         exit 3    nothing there, or not a checkpoint
    ├── ProgramError          exit 4    a conversion program is invalid
    ├── FitError              exit 5    source and target do not fit each other
    ├── ContentError          exit 6    content differs, is damaged or not trusted
    │   ├── CorruptError                damaged, truncated or inconsistent bytes
    │   ├── ConflictError               two copies of the same thing disagree
    │   └── UnsafeError                 the file asks for something we never do
    ├── StorageError          exit 7    storage failed; running again resumes
    └── InterruptedRunError   exit 130  stopped by the user, or a worker died; running again resumes

Each class has a stable machine-readable ``code``. Codes are only ever added.
"""

from __future__ import annotations

from typing import ClassVar


class UcpError(Exception):
    """Base of all errors of ucp.

    ``str(error)`` says what is wrong and where; ``hint``, where there is one, is the remedy: the next command to run or
    the option to give.
    """

    exit_code: ClassVar[int] = 1
    code: ClassVar[str] = "internal"

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if hint:
            self.add_note(f"hint: {hint}")

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle with the hint, so that errors cross process boundaries whole."""
        return (_rebuild, (type(self), self.message, self.hint))


def _rebuild(cls: type[UcpError], message: str, hint: str | None) -> UcpError:
    return cls(message, hint=hint)


class UsageError(UcpError, ValueError):
    """The call or its options are off."""

    exit_code = 2
    code = "usage"


class NotFoundError(UcpError, LookupError):
    """Nothing is there, or what is there is not a complete checkpoint."""

    exit_code = 3
    code = "not-found"


class ProgramError(UcpError, ValueError):
    """A conversion program is invalid."""

    exit_code = 4
    code = "program"


class FitError(UcpError, ValueError):
    """Source and target do not fit: missing or unexpected tensors, other shapes, a layout that cannot be served."""

    exit_code = 5
    code = "fit"


class ContentError(UcpError):
    """Content differs from what it should be."""

    exit_code = 6
    code = "content"


class CorruptError(ContentError):
    """Bytes are damaged, truncated or contradict their own metadata."""

    code = "corrupt"


class ConflictError(ContentError):
    """Two copies of the same thing disagree."""

    code = "conflict"


class UnsafeError(ContentError):
    """A file asks for something that ucp never does, such as running code."""

    code = "unsafe"


class StorageError(UcpError, OSError):
    """Storage failed (full, unreachable, refused); running the same command again resumes."""

    exit_code = 7
    code = "storage"


class InterruptedRunError(UcpError):
    """The user stopped a run, or one of its processes died; running the same command again resumes."""

    exit_code = 130
    code = "interrupted"


__all__ = [
    "ConflictError",
    "ContentError",
    "CorruptError",
    "FitError",
    "InterruptedRunError",
    "NotFoundError",
    "ProgramError",
    "StorageError",
    "UcpError",
    "UnsafeError",
    "UsageError",
]
