"""Define the errors that a user can act on: what, where, seen, wanted, next. Entry points print no traceback."""


def counted(count: int, noun: str) -> str:
    """Return a count with its noun, as in `1 file`, `2 files`."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def reason_of(error: Exception) -> str:
    """Return the text of an error, without the number and the path that an OSError adds."""
    return str(getattr(error, "strerror", None) or error)


class StreamtrainError(Exception):
    """Report a user's mistake or a fault outside the program; all errors of this package are of this class.

    Args:
        message: What, where, seen, wanted.
        hint: What to do next.

    Example:
        >>> try: open_shards("nowhere")
        ... except StreamtrainError as error: print(error.message, error.hint)
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message, hint)  # both stay in `args`, so the error survives pickling between processes
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\nhint: {self.hint}"


class ManifestError(StreamtrainError):
    """Report a transcripts file that cannot be read."""


class AudioError(StreamtrainError):
    """Report audio that cannot be used; the message is the reason written to the ledger."""


class ShardError(StreamtrainError):
    """Report a shard or an index with unexpected bytes."""


class StoreError(StreamtrainError):
    """Report that bytes could not be read from or written to a file or an object."""


class MissingError(StoreError):
    """Report that nothing exists under a name."""


class UnreachableError(StoreError):
    """Report a server that does not answer or denies access, so that the state of its objects is unknown."""
