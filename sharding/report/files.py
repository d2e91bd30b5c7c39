"""Read and write the report beside a shard set: ledger, summary, orphans, a plot of the durations, and checksums.

The index, which identifies the set, covers no byte of the report; the checksums name the index that they belong to.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from sharding.errors import MissingError, ShardError
from sharding.files.document import LARGE_BYTES
from sharding.report.ledger import LEDGER_NAME, LedgerPart, LedgerRow, Tally, join_parts, parse_ledger
from sharding.report.summary import ORPHANS_NAME, Summary, summarize
from sharding.shardset.index import ShardIndex
from sharding.shardset.store import Store

SUMMARY_NAME = "report/summary.json"
PLOT_NAME = "report/durations.png"
FILES = (LEDGER_NAME, SUMMARY_NAME, ORPHANS_NAME, PLOT_NAME)
CHECKSUMS_NAME = "report/SHA256SUMS"  # of FILES, and the digest of their index
COPY_HINT = "the report cannot be extended without it; copy it again"


def publish(
    store: Store,
    parts: Sequence[LedgerPart],
    tally: Tally,
    index: ShardIndex,
    orphans: Sequence[str],
    ignored_fields: Iterable[str],
) -> Summary:
    """Write the ledger, whose rows add up to the tally, the summary, the plot and checksums. Return the summary."""
    from sharding.report.plots import plot_durations  # matplotlib takes a second to import

    summary = summarize(tally, index, orphans, ignored_fields)
    files = {
        LEDGER_NAME: join_parts([part.lines for part in parts]),
        SUMMARY_NAME: json.dumps(summary, ensure_ascii=False, indent=1).encode(),
        ORPHANS_NAME: "".join(f"{name}\n" for name in orphans).encode(),
        PLOT_NAME: plot_durations(index),
    }
    for name, data in (files | {CHECKSUMS_NAME: _pack_checksums(index, files)}).items():
        store.write(name, data)
    return summary


def read_summary(store: Store, index: ShardIndex) -> Summary | None:
    """Return the summary of a shard set, counted from its ledger, or None if its report is missing."""
    tally = Tally()
    try:
        orphans = _read_ledger(store, index, tally.count)
    except MissingError:
        return None
    return summarize(tally, index, orphans, [])


def check_report(store: Store, index: ShardIndex) -> list[str]:
    """Return the faults of the report: none if all of it is missing, as in a copy of the shards alone."""
    stored_name = _stored_names(store, index)
    contents = {name: _read_if_exists(store, stored_name(name)) for name in (*FILES, CHECKSUMS_NAME)}
    if not any(data is not None for data in contents.values()):
        return []
    faults = [f"{store.url}/{stored_name(name)}: is missing" for name, data in contents.items() if data is None]
    checksums = contents.pop(CHECKSUMS_NAME)
    if checksums is None:
        return faults
    path, listed = f"{store.url}/{stored_name(CHECKSUMS_NAME)}", checksums.decode(errors="replace").split("\n")
    expected = [_checksum_line(name, data or b"") for name, data in contents.items()]
    faults += [f"{store.url}/{stored_name(name)}: its checksum is {line[:16]}…, {path} lists another"
               for (name, data), line in zip(contents.items(), expected, strict=True)
               if data is not None and line not in listed]  # fmt: skip
    if _header(index) not in listed:
        faults.append(f"{path}: belongs to another index, this set has the index {index.digest[:16]}…")
    return faults or [f"{path}: has lines besides the checksums"] * (listed != [_header(index), *expected, ""])


# --- while a set is appended to -------------------------------------------------------------------------------------


def is_archived(store: Store, index: ShardIndex) -> bool:
    """Return whether an append to this index is unfinished: files in report/ may belong to the next index."""
    return store.exists(_archived_name(index, CHECKSUMS_NAME))


def archive_report(store: Store, index: ShardIndex) -> tuple[list[LedgerRow], list[str]]:
    """Archive the report before an append and return its ledger rows and orphans.

    The archive remains this index's report until the next index is written, even if the build is killed before then.
    Raises ShardError if the ledger or the orphans are damaged or missing.
    """
    rows: list[LedgerRow] = []
    try:
        names = _read_ledger(store, index, rows.append)
    except MissingError as error:
        hint = "without it the report of the extended set would be incomplete; build into another --out"
        raise ShardError(error.message, hint) from error
    if not is_archived(store, index):
        files = {name: data for name in FILES if (data := _read_if_exists(store, name)) is not None}
        checksums = _read_if_exists(store, CHECKSUMS_NAME) or _pack_checksums(index, files)  # older sets have none
        for name, data in (files | {CHECKSUMS_NAME: checksums}).items():  # last: they vouch for the others
            store.write(_archived_name(index, name), data)
    return rows, names


def restore_archived(store: Store, index: ShardIndex) -> None:
    """Undo `archive_report` and what was published since then, if the append was given up."""
    if is_archived(store, index):
        for name in (*FILES, CHECKSUMS_NAME):
            if (data := _read_if_exists(store, _archived_name(index, name))) is not None:
                store.write(name, data)
        drop_archived(store, index)


def drop_archived(store: Store, index: ShardIndex) -> None:
    """Delete the archived report of an index."""
    for name in (CHECKSUMS_NAME, *FILES):
        store.delete(_archived_name(index, name))


def _archived_name(index: ShardIndex, name: str) -> str:
    return name.replace("/", f"/{index.digest}-", 1)


def _stored_names(store: Store, index: ShardIndex) -> Callable[[str], str]:
    """Return the function from a report file's name to its current name, which differs while it is archived."""
    return partial(_archived_name, index) if is_archived(store, index) else str


def _read_ledger(store: Store, index: ShardIndex, take: Callable[[LedgerRow], object]) -> list[str]:
    """Hand each ledger row of an index over, one at a time, and return the orphans.

    Raises MissingError if they are missing, ShardError if they are damaged.
    """
    ledger, orphans = (_read(store, index, name) for name in (LEDGER_NAME, ORPHANS_NAME))
    try:
        for row in parse_ledger(ledger):
            take(row)
        return orphans.decode().splitlines()
    except ValueError as error:
        raise ShardError(f"{store.url}/{LEDGER_NAME}: damaged ({error})", COPY_HINT) from error


def _read(store: Store, index: ShardIndex, name: str) -> bytes:
    """Return a file of an index's report. Raises MissingError, and ShardError if its checksum differs."""
    stored_name = _stored_names(store, index)
    data, checksums = store.read(stored_name(name), LARGE_BYTES), _read_if_exists(store, stored_name(CHECKSUMS_NAME))
    if checksums is not None:  # sets older than the checksums have none
        lines = checksums.decode(errors="replace").split("\n")
        if _checksum_line(name, data) not in lines or _header(index) not in lines:
            path = f"{store.url}/{stored_name(name)}"
            raise ShardError(f"{path}: damaged: its checksum or its index differs from {CHECKSUMS_NAME}", COPY_HINT)
    return data


def _read_if_exists(store: Store, name: str) -> bytes | None:
    try:
        return store.read(name, LARGE_BYTES)
    except MissingError:
        return None


def _pack_checksums(index: ShardIndex, files: Mapping[str, bytes]) -> bytes:
    return "\n".join([_header(index), *(_checksum_line(name, data) for name, data in files.items()), ""]).encode()


def _header(index: ShardIndex) -> str:
    return f"# report of the shard set whose index has the digest {index.digest}"  # sha256sum reads it as a comment


def _checksum_line(name: str, data: bytes) -> str:
    """Return a file's line in the format of `sha256sum --check`."""
    return f"{hashlib.sha256(data).hexdigest()}  {name.rpartition('/')[2]}"
