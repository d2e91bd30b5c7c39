"""The errors a user can act on: what, where, seen, wanted, next. Entry points print them without a traceback."""


def counted(count: int, noun: str) -> str:
    """Return `1 file`, `2 files`."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


class StreamtrainError(Exception):
    """A mistake or a fault outside the program, told in one message and, where there is one, a hint."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message, hint)  # both stay in `args`, so the error survives pickling between processes
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\nhint: {self.hint}"


class ManifestError(StreamtrainError):
    """A transcripts file that cannot be read as one."""


class AudioError(StreamtrainError):
    """Audio that cannot be used; the message is the reason written to the ledger."""


class ShardError(StreamtrainError):
    """A shard or an index whose bytes are not what they should be."""


class StoreError(StreamtrainError):
    """Bytes that could not be read from or written to where they live."""


class MissingError(StoreError):
    """There is nothing under that name."""


class UnreachableError(StoreError):
    """A server that does not answer, or lets nobody in: nothing is known of what lies there."""
