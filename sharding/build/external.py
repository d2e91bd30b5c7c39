"""Index WebDataset tars from other tools, which stay unchanged: no bucketing, no splitting, no conversion."""

import io
import sys
import tarfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import islice

import numpy as np
import numpy.typing as npt
import xxhash

from sharding.audio.codec import SAMPLE_RATE, Decoded, decode_native, frame_count, is_constant
from sharding.build.alphabet import MAX_RARE, WantedSymbols, too_many_rare
from sharding.build.place import has_index
from sharding.errors import AudioError, ShardError, counted
from sharding.files.names import canonical_name, nfc
from sharding.labels.policy import LabelPolicy, SymbolCounts, check_alphabet, check_size, count_foreign
from sharding.pool import Workers
from sharding.report import files as report
from sharding.report.ledger import LedgerPart, ledger_row, sum_tallies, write_ledger
from sharding.report.summary import Summary
from sharding.shardset.index import (
    END_OF_ARCHIVE,
    INDEX_NAME,
    SAMPLE_DTYPE,
    ShardIndex,
    ShardRecord,
    SpeakerInfo,
    join_samples,
    pack_index,
    read_shard_index,
    write_index,
    write_shard_index,
)
from sharding.shardset.sample import BLOCK, Sample, check_member, sample_from_bytes, split_name
from sharding.shardset.schema import EXTERNAL, ShardEntry
from sharding.shardset.store import Store, open_store
from sharding.sources.manifest import Utterance, printable

MAX_TAR_BYTES = 2**34  # a tar is held in memory
COUNT_DTYPE = np.dtype([("sample", "<u4"), ("symbol", "<u4"), ("count", "<u4")])
USUAL_NAMES = {
    "valid": ["*val*", "*dev*"],
    "test": ["test[-_./0-9]*", "*[-_./]test[-_./0-9]*"],
}  # of tars, by their split


@dataclass(frozen=True, slots=True)
class TarJob:
    url: str
    name: str
    split: str
    labels: LabelPolicy
    max_duration: float


@dataclass(frozen=True)
class TarResult:
    shard: ShardRecord | None  # None if no sample is usable
    ledger: LedgerPart
    symbols: SymbolCounts  # of the labels
    ids: tuple[str, ...] = ()  # utterance ids of the samples


def index_tars(
    url: str,
    labels: LabelPolicy,
    held_out: Mapping[str, Sequence[str]],
    max_duration: float,
    workers: int,
    wanted: WantedSymbols,
) -> tuple[ShardIndex, Summary, float]:
    """Write the index of all tars below a folder or URL. Returns it, its summary, and the share of rejected samples.

    Tars that match a pattern of `held_out` form its split, "valid" or "test"; of a split without patterns, those of
    usual names. If the policy has no alphabet, it is that of the training labels. Raises ShardError if there is no
    tar, an index exists, a pattern matches no tar, or a key is duplicated; ManifestError if the labels use another
    alphabet.
    """
    store = open_store(url)
    names = _list_tars(store, url)
    patterns = {split: list(held_out.get(split, ())) or usual for split, usual in USUAL_NAMES.items()}
    splits = _choose_splits(url, names, held_out)
    _warn_of_names(names, splits)
    if "train" not in splits and not labels.symbols:
        hint = "--alphabet FILE, or a --profile that has one; or name fewer tars with --valid and --test"
        raise ShardError(f"{url}: no tar is trained on, whose labels would make the alphabet", hint)
    with Workers(workers) as pool:
        if not labels.symbols:
            trained = [name for name, split in zip(names, splits, strict=True) if split == "train"]
            labels = _find_alphabet(url, trained, labels, wanted, pool)
        jobs = [TarJob(url, name, split, labels, max_duration) for name, split in zip(names, splits, strict=True)]
        results = pool.map(index_tar, jobs, [1] * len(jobs), "indexing", unit="tar")
    shards = [result.shard for result in results if result.shard]
    ledger = [result.ledger for result in results]
    _check_names(url, "key", [(shard.entry.name, shard.keys) for shard in shards])
    _check_names(url, "utterance_id", [(name, result.ids) for name, result in zip(names, results, strict=True)])
    for split, side in (("train", "training"), ("valid", "validation"), ("test", "test")):
        counts = (result.symbols for result, job in zip(results, jobs, strict=True) if job.split == split)
        check_alphabet(sum(counts, SymbolCounts()), side, labels)
    tally = sum_tallies(ledger)
    settings = {"profile": labels.profile, "max_duration": max_duration, **patterns, EXTERNAL: True}
    samples = join_samples([shard.samples for shard in shards])
    index = ShardIndex(
        duration_bins=(float(samples["samples"].max(initial=0)) / SAMPLE_RATE,),
        settings=settings,
        settings_hash="",
        sources_hash=xxhash.xxh3_128_hexdigest("".join(shard.entry.checksum for shard in shards).encode()),
        labels=labels,
        notes=tally.notes(_is_disjoint(shards), None, []),
        shards=tuple(shard.entry for shard in shards),
        samples=samples,
    )
    packed = pack_index(index)
    summary = report.publish(store, ledger, tally, packed.index, [], [])
    return write_index(store, packed), summary, tally.clips["rejected"] / max(sum(tally.clips.values()), 1)


def _list_tars(store: Store, url: str) -> list[str]:
    """Return the names of the tars, sorted. Raises ShardError if there is none, or an index or report is in the way."""
    if store.exists(INDEX_NAME):
        hint = "remove it to index again" if has_index(store) else "it belongs to something else: move the tars"
        raise ShardError(f"{url}: already has an {INDEX_NAME}", hint)
    if (reports := [name for name in report.FILES if store.exists(name)]) and not store.exists(report.CHECKSUMS_NAME):
        raise ShardError(f"{url}/{reports[0]}: exists, but belongs to no index", "keep the tars in a separate folder")
    files = {name for name in store.names() if "/." not in f"/{name}"}  # not hidden
    names = sorted(name for name in files if name.endswith(".tar"))
    if not names:
        raise ShardError(f"{url}: there is no tar", "name the folder or the prefix that contains them")
    for name in names:
        if f"{name.removesuffix('.tar')}.idx.zst" in files and (shard := _name_in_set(store, name)) != name:
            raise ShardError(f"{url}/{name}: is the shard {shard} of a shard set, whose indexes would be overwritten",
                             "use that set, or copy the tars alone to another folder")  # fmt: skip
    return names


def _name_in_set(store: Store, name: str) -> str:
    """Return the name that the index of a tar gives it: another one if it lies in a folder of a shard set."""
    try:
        return read_shard_index(store, name).entry.name
    except ShardError:  # of an earlier attempt that was killed
        return name


def _choose_splits(url: str, names: Sequence[str], held_out: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the split of each tar. A pattern that the user gave goes before a usual name."""
    splits = dict.fromkeys(names, "train")
    for split, usual in USUAL_NAMES.items():
        splits |= dict.fromkeys(_match_usual(names, usual), split) if not held_out.get(split) else {}
    given: dict[str, str] = {}
    for split, patterns in held_out.items():
        for pattern in patterns:
            matches = _match(names, [pattern])
            if not matches:
                raise ShardError(f"{url}: no tar matches --{split} {pattern!r}", f"there are {', '.join(names[:5])}")
            if twice := [name for name in matches if given.get(name, split) != split]:
                raise ShardError(f"{url}/{min(twice)}: matches --valid and --test", "a tar is in one split")
            given |= dict.fromkeys(matches, split)
    return [given.get(name, splits[name]) for name in names]


def _match(names: Sequence[str], patterns: Sequence[str]) -> set[str]:
    """Return the tars that match a pattern; a pattern equal to a tar's name matches that tar alone."""
    chosen: set[str] = set()
    for pattern in map(nfc, patterns):
        exact = {name for name in names if nfc(name) == pattern}
        chosen |= exact or {name for name in names if fnmatchcase(nfc(name), pattern)}
    return chosen


def _warn_of_names(names: Sequence[str], splits: Sequence[str]) -> None:
    """Warn of tars that are trained on although they are named like those of another split."""
    for split, usual in USUAL_NAMES.items():
        alike = _match_usual(names, usual)
        trained = [name for name, chosen in zip(names, splits, strict=True) if chosen == "train" and name in alike]
        if trained:
            print(f"{counted(len(trained), 'tar')} named like {split} will be trained on, such as {trained[0]}: "
                  f"--{split} PATTERN names those that must not", file=sys.stderr)  # fmt: skip


def _match_usual(names: Sequence[str], patterns: Sequence[str]) -> set[str]:
    """Return the tars that match usual names, in any case."""
    return {name for name in names if any(fnmatchcase(nfc(name).lower(), pattern) for pattern in patterns)}


def _find_alphabet(
    url: str, names: Sequence[str], labels: LabelPolicy, wanted: WantedSymbols, pool: Workers
) -> LabelPolicy:
    """Return the policy with the symbols of the labels of these tars but the rare ones, whose samples are rejected.

    What is left is counted again: without these samples, other symbols may be rare. Raises ManifestError if more than
    half would be rejected.
    """
    numbers, parts, ends = dict[str, int](), [np.zeros(0, COUNT_DTYPE)], [0]
    jobs = ((url, name, labels) for name in names)
    for symbols, part, count in pool.stream(_count_symbols, jobs, [1] * len(names), "counting", unit="tar"):
        part["symbol"] = np.array([numbers.setdefault(symbol, len(numbers)) for symbol in symbols], int)[part["symbol"]]
        part["sample"] += ends[-1]
        parts.append(part)
        ends.append(ends[-1] + count)
    table, kept, known = np.concatenate(parts), np.ones(ends[-1], bool), [*numbers]
    while True:
        left = table[kept[table["sample"]]]
        counts = np.bincount(left["symbol"], left["count"], len(known)).astype(int)
        check_size([known[number] for number in np.flatnonzero(counts >= wanted.min_count)], labels, wanted.alphabet)
        rare = (counts > 0) & (counts < wanted.min_count)
        if not rare.any():
            break
        dropped = left["sample"][rare[left["symbol"]]]
        kept[dropped] = False
        if (refused := int((~kept).sum())) > MAX_RARE * len(kept):
            tar = bisect_right(ends, dropped[0]) - 1
            key, text = _read_label(url, names[tar], int(dropped[0]) - ends[tar], labels)
            few = [known[number] for number in np.flatnonzero(rare)]
            share = f"{refused:,} of {len(kept):,}"
            raise too_many_rare(f"{url}/{names[tar]}: {key}", text, share, few, labels, wanted.min_count)
    found = dict(sorted((known[number], int(counts[number])) for number in np.flatnonzero(counts)))
    return replace(labels, symbols=tuple(found), counts=tuple(found.values()))


def _count_symbols(job: tuple[str, str, LabelPolicy]) -> tuple[list[str], npt.NDArray[np.void], int]:
    """Return the symbols of a tar's labels but the blank, how often each sample has each, and the number of samples."""
    url, name, labels = job
    numbers, rows, sample = dict[str, int](), list[tuple[int, int, int]](), -1
    for sample, (_, text) in enumerate(_read_labels(url, name, labels)):
        counts = Counter(labels.symbols_of(text))
        rows += [(sample, numbers.setdefault(symbol, len(numbers)), count)
                 for symbol, count in counts.items() if symbol != " "]  # fmt: skip
    return [*numbers], np.array(rows, COUNT_DTYPE), sample + 1


def _read_labels(url: str, name: str, labels: LabelPolicy) -> Iterator[tuple[str, str]]:
    """Yield the key and the normalised label of each sample of a tar; no text if it cannot be read."""
    data = open_store(url).read(name, MAX_TAR_BYTES)
    for key, start, end in _find_samples(data, f"{url}/{name}"):
        text = ""
        with suppress(ShardError):  # reported when the tar is indexed
            text = sample_from_bytes(data[start:end], labels).text
        yield key, text


def _read_label(url: str, name: str, number: int, labels: LabelPolicy) -> tuple[str, str]:
    return next(islice(_read_labels(url, name, labels), number, None))


def index_tar(job: TarJob) -> TarResult:
    """Decode every sample of a tar and write the tar's `.idx.zst`. Raises ShardError if the tar has no sample."""
    store = open_store(job.url)
    data = store.read(job.name, MAX_TAR_BYTES)
    rows, keys, ids, speakers, ledger, symbols = [], [], [], [], [], SymbolCounts()
    for key, start, end in _find_samples(data, f"{job.url}/{job.name}"):
        raw = data[start:end]
        sample, seconds, reason = None, 0.0, None
        remarks: tuple[str, ...] = ()
        try:
            sample = sample_from_bytes(raw, job.labels)
            symbols += count_foreign(sample.text, f"{job.url}/{job.name}: {key}", job.labels)
            decoded = _decode(sample, job)
            samples, remarks = len(decoded.sound), (*decoded.remarks, *sample.remarks)
            seconds = samples / SAMPLE_RATE
            length = len(job.labels.symbols_of(sample.text))
            rows.append((0, start, len(raw), samples, length, xxhash.xxh3_64_intdigest(raw)))
            keys.append(sample.key)
            ids.append(sample.utterance_id)
            speakers.append(SpeakerInfo(sample.corpus, sample.age_bucket, sample.child_id))
        except (AudioError, ShardError) as error:
            reason = printable(error.message)  # a member name may be any bytes
        fate = "rejected" if reason else "written"
        ledger.append(ledger_row(_utterance(key, job, sample), job.split, fate, seconds, reason, key, remarks=remarks))
    if not ledger:
        raise ShardError(f"{job.url}/{job.name}: there is no sample in it", "copy it again, or remove it")
    if not rows:
        return TarResult(None, write_ledger(ledger), symbols)
    table = np.array(rows, SAMPLE_DTYPE)
    checksum, length = xxhash.xxh3_64_hexdigest(data), int(table["samples"].sum())
    entry = ShardEntry(job.name, job.split, 0, len(rows), len(data), length, checksum)
    shard = write_shard_index(store, ShardRecord(entry, tuple(keys), tuple(speakers), table))
    return TarResult(shard, write_ledger(ledger), symbols, tuple(ids))


def _decode(sample: Sample, job: TarJob) -> Decoded:
    """Decode a sample. Raises AudioError if it cannot be trained on."""
    decoded = decode_native(sample.audio, prove=True)
    if len(decoded.sound) > job.max_duration * SAMPLE_RATE:
        raise AudioError(f"longer than {job.max_duration:g} s: `build` splits long recordings")
    if job.split == "train":
        if not sample.text:
            raise AudioError("no label")
        if foreign := job.labels.why_foreign(sample.text):
            raise AudioError(foreign)
        if job.labels.frames_needed(sample.text) > frame_count(len(decoded.sound)):
            raise AudioError("label needs more frames than the clip has")
        if is_constant(decoded.pcm):
            raise AudioError("constant signal with a label")
    return decoded


def _find_samples(data: bytes, location: str) -> Iterator[tuple[str, int, int]]:
    """Yield each sample's key and byte range, from its first header to the end of its last member's padding."""
    key, start, end = "", 0, 0
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:", encoding="utf-8") as tar:
            for info in tar:
                check_member(info, len(data))
                name, _ = split_name(info.name) if info.isfile() else ("", "")
                if not name:
                    continue
                if name != key and key:
                    yield key, start, end
                if name != key:
                    key, start = name, info.offset
                end = info.offset_data + info.size + -info.size % BLOCK
            rest = data[tar.offset :]  # after the last readable header: the end mark, or a damaged header
    except (tarfile.TarError, EOFError, ValueError, RecursionError) as error:
        raise ShardError(f"{location}: not a whole tar: {error}", "copy it again") from error
    if rest.strip(b"\0"):
        raise ShardError(f"{location}: there is no header at byte {len(data) - len(rest)}",
                         "copy it again; it may be several tars joined together")  # fmt: skip
    if len(rest) < len(END_OF_ARCHIVE):
        raise ShardError(f"{location}: the end-of-archive block is missing", "copy it again")
    if key:
        yield key, start, end


def _utterance(key: str, job: TarJob, sample: Sample | None) -> Utterance:
    """Return the utterance of a sample for the ledger; of an unreadable `sample`, only its key is known."""
    sample = sample or Sample(key, b"", "", "", key)
    corpus = sample.corpus or job.url.rstrip("/").rpartition("/")[2]
    return Utterance(sample.utterance_id, sample.child_id, sample.session_id, "", corpus, f"{job.name}/{key}", None,
                     sample.age_bucket, "", None, sample.text)  # fmt: skip


def _check_names(url: str, kind: str, names: Iterable[tuple[str, Sequence[str]]]) -> None:
    """Raise ShardError if two samples have the same name. `names` are pairs of a tar and the names in it."""
    tar_of: dict[str, str] = {}
    for tar, names_in_tar in names:
        for name in names_in_tar:
            if (first := tar_of.get(canonical_name(name))) is not None:
                message = f"{url}: the {kind} {name!r} is in {first} and in {tar}"
                raise ShardError(message, f"every sample needs a unique {kind}")
            tar_of[canonical_name(name)] = tar


def _is_disjoint(shards: Sequence[ShardRecord]) -> bool:
    """Return whether every sample has a child id, and no child is in several splits."""
    pairs = {(info.child_id, shard.entry.split) for shard in shards for info in shard.speakers}
    children = [child for child, _ in pairs]
    return "" not in children and len(set(children)) == len(children)
