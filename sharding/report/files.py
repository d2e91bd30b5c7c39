"""The report beside a shard set: ledger, summary, orphans, a picture of the durations, and the sums of them all.

No byte of it is in the index, which is the identity of the set; the sums name the index that the report is of.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from sharding.errors import MissingError, ShardError
from sharding.files.document import LARGE_BYTES, DocumentError
from sharding.report.ledger import LEDGER_NAME, LedgerPart, LedgerRow, Tally, join_parts, parse_ledger
from sharding.report.summary import ORPHANS_NAME, Summary, parse_summary, summarize
from sharding.shardset.index import ShardIndex
from sharding.shardset.store import Store

SUMMARY_NAME = "report/summary.json"
PLOT_NAME = "report/durations.png"
FILES = (LEDGER_NAME, SUMMARY_NAME, ORPHANS_NAME, PLOT_NAME)
CHECKSUMS_NAME = "report/SHA256SUMS"  # of these, and of which index they are
COPY_HINT = "without it the report cannot grow; copy it again"


def publish(
    store: Store,
    parts: Sequence[LedgerPart],
    tally: Tally,
    index: ShardIndex,
    orphans: Sequence[str],
    ignored_fields: Iterable[str],
) -> Summary:
    """Write the ledger, which adds up to the tally, the summary, the plot, and their sums; returns the summary."""
    from sharding.report.plots import plot_durations  # matplotlib takes a second to import

    summary = summarize(tally, index, orphans, ignored_fields)
    files = {
        LEDGER_NAME: join_parts([part.lines for part in parts]),
        SUMMARY_NAME: json.dumps(summary, ensure_ascii=False, indent=1).encode(),
        ORPHANS_NAME: "".join(f"{name}\n" for name in orphans).encode(),
        PLOT_NAME: plot_durations(index),
    }
    for name, data in (files | {CHECKSUMS_NAME: _pack_sums(index, files)}).items():
        store.write(name, data)
    return summary


def read_summary(store: Store, index: ShardIndex) -> Summary | None:
    """The summary of a shard set, or None where its report was left behind."""
    try:
        return parse_summary(_read(store, index, SUMMARY_NAME))
    except MissingError:
        return None
    except DocumentError as error:
        raise ShardError(f"{store.url}/{SUMMARY_NAME}: damaged ({error})", "the shards may still be well") from error


def check_report(store: Store, index: ShardIndex) -> list[str]:
    """Return what is wrong with the report. Nothing is if all of it is missing, as from a copy of the shards alone."""
    place = _place(store, index)
    seen = {name: _read_if_there(store, place(name)) for name in (*FILES, CHECKSUMS_NAME)}
    if not any(data is not None for data in seen.values()):
        return []
    faults = [f"{store.url}/{place(name)}: is missing" for name, data in seen.items() if data is None]
    sums = seen.pop(CHECKSUMS_NAME)
    if sums is None:
        return faults
    where, lines = f"{store.url}/{place(CHECKSUMS_NAME)}", [_sum(name, data or b"") for name, data in seen.items()]
    said = sums.decode(errors="replace").split("\n")
    faults += [f"{store.url}/{place(name)}: its checksum is {line[:16]}…, {where} has another"
               for (name, data), line in zip(seen.items(), lines, strict=True)
               if data is not None and line not in said]  # fmt: skip
    if _head(index) not in said:
        faults.append(f"{where}: is not of the index {index.digest[:16]}…, which is here")
    return faults or [f"{where}: says more than the sums"] * (said != [_head(index), *lines, ""])


# --- while a set is appended to -------------------------------------------------------------------------------------


def is_archived(store: Store, index: ShardIndex) -> bool:
    """Tell whether an append to this index has begun and not ended: what is in report/ may be of the next one."""
    return store.exists(_archived_name(index, CHECKSUMS_NAME))


def archive_report(store: Store, index: ShardIndex) -> tuple[list[LedgerRow], list[str]]:
    """Return the ledger and the orphans of an index that is about to be appended to, and keep its report aside.

    It is the report of the index until the next one is there, also if this build is killed before. Raises ShardError
    if the ledger or the orphans are damaged or missing.
    """
    try:
        ledger, orphans = (_read(store, index, name) for name in (LEDGER_NAME, ORPHANS_NAME))
        rows, names = parse_ledger(ledger), orphans.decode().splitlines()
    except MissingError as error:
        hint = "without it the report of what is added cannot be whole; build into another --out"
        raise ShardError(error.message, hint) from error
    except ValueError as error:
        raise ShardError(f"{store.url}/{LEDGER_NAME}: damaged ({error})", COPY_HINT) from error
    if not is_archived(store, index):
        files = {name: data for name in FILES if (data := _read_if_there(store, name)) is not None}
        sums = _read_if_there(store, CHECKSUMS_NAME) or _pack_sums(index, files)  # a set older than its sums has none
        for name, data in (files | {CHECKSUMS_NAME: sums}).items():  # last: they vouch for the others
            store.write(_archived_name(index, name), data)
    return rows, names


def restore_archived(store: Store, index: ShardIndex) -> None:
    """Undo `keep_old`, and what was published since then: no next index comes."""
    if is_archived(store, index):
        for name in (*FILES, CHECKSUMS_NAME):
            if (data := _read_if_there(store, _archived_name(index, name))) is not None:
                store.write(name, data)
        drop_archived(store, index)


def drop_archived(store: Store, index: ShardIndex) -> None:
    """Delete the report of an index that was kept while it was appended to."""
    for name in (CHECKSUMS_NAME, *FILES):
        store.delete(_archived_name(index, name))


def _archived_name(index: ShardIndex, name: str) -> str:
    return name.replace("/", f"/{index.digest}-", 1)


def _place(store: Store, index: ShardIndex) -> Callable[[str], str]:
    """Return under which name a file of the report of an index lies."""
    return partial(_archived_name, index) if is_archived(store, index) else str


def _read(store: Store, index: ShardIndex, name: str) -> bytes:
    """Read a file of the report of an index. Raises MissingError, and ShardError if its sum is another."""
    place = _place(store, index)
    data, sums = store.read(place(name), LARGE_BYTES), _read_if_there(store, place(CHECKSUMS_NAME))
    if sums is not None:  # of a set older than they are, there are none
        lines = sums.decode(errors="replace").split("\n")
        if _sum(name, data) not in lines or _head(index) not in lines:
            where = f"{store.url}/{place(name)}"
            raise ShardError(f"{where}: damaged: its checksum or its index differs from {CHECKSUMS_NAME}", COPY_HINT)
    return data


def _read_if_there(store: Store, name: str) -> bytes | None:
    try:
        return store.read(name, LARGE_BYTES)
    except MissingError:
        return None


def _pack_sums(index: ShardIndex, files: Mapping[str, bytes]) -> bytes:
    return "\n".join([_head(index), *(_sum(name, data) for name, data in files.items()), ""]).encode()


def _head(index: ShardIndex) -> str:
    return f"# report of the shard set whose index has the digest {index.digest}"  # to sha256sum, a comment


def _sum(name: str, data: bytes) -> str:
    """A line of what `sha256sum --check` reads."""
    return f"{hashlib.sha256(data).hexdigest()}  {name.rpartition('/')[2]}"
