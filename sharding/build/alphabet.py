"""Settle what labels are made of: the profile of the sources, and the alphabet, named or found in training labels."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from sharding.build.scan import CHUNK, Refusal, ScanResult
from sharding.errors import ManifestError, StreamtrainError
from sharding.files.document import LARGE_BYTES, DocumentError, read_document
from sharding.labels.policy import LabelPolicy, SymbolCounts, check_alphabet, check_size, policy_of
from sharding.pool import Workers, count_done
from sharding.shardset.build_config import BuildConfig
from sharding.sources.manifest import Layout, Source

RARE = "label has symbols that occur fewer than"  # so many times
MAX_RARE = 0.5  # share of the training clips that may be left out for rare symbols

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class WantedSymbols:
    """Hold which symbols of the training labels the user wants in their alphabet."""

    min_count: int  # times that a symbol must occur
    alphabet: str = ""  # --alphabet, as it was given


def settle_policy(config: BuildConfig, sources: Sequence[Source]) -> tuple[BuildConfig, LabelPolicy]:
    """Return the settings with all of profile, units and alphabet, and the policy, open if its alphabet is to be found.

    Raises ManifestError if the sources have different profiles, and StreamtrainError as `choose_alphabet` does.
    """
    usual = {source.layout.profile: source.layout.transcripts for source in sources}
    if not config.profile and len(usual) > 1:
        found = ", ".join(f"{profile} in {place}" for profile, place in usual.items())
        raise ManifestError(f"the sources have labels of different profiles: {found}",
                            "name one that suits them all with --profile, or build a shard set of each")  # fmt: skip
    profile = config.profile or next(iter(usual))
    policy, alphabet = choose_alphabet(policy_of(profile, config.units), config.alphabet)
    return replace(config, profile=profile, units=policy.units, alphabet=alphabet), policy


def choose_alphabet(policy: LabelPolicy, asked: str) -> tuple[LabelPolicy, str]:
    """Return a policy with its alphabet, open if it is to be found in the data, and a name of the alphabet.

    Raises StreamtrainError for a profile without an alphabet and for a file that is none.
    """
    alphabet = asked or ("profile" if policy.symbols else "data")
    if alphabet == "profile" and not policy.symbols:
        raise StreamtrainError(f"--alphabet profile: profile {policy.profile!r} has no alphabet of {policy.units}",
                               "--alphabet data takes the symbols of the training labels")  # fmt: skip
    if alphabet == "data":
        policy = replace(policy, symbols=())
    elif alphabet != "profile":
        policy = replace(policy, symbols=_read_alphabet(Path(alphabet), policy))
        alphabet = f"file of {len(policy.symbols)} symbols, {_digest(policy.symbols)}"  # settings name no path
    return policy, alphabet


def _digest(symbols: Sequence[str]) -> str:
    return xxhash.xxh3_64_hexdigest("\n".join(symbols).encode())


def _read_alphabet(path: Path, policy: LabelPolicy) -> tuple[str, ...]:
    """Return the symbols that a file lists, one a line. Raises StreamtrainError."""
    try:
        text = read_document(path, LARGE_BYTES).decode("utf-8-sig")
    except (OSError, DocumentError, UnicodeDecodeError) as error:
        message = f"--alphabet {path}: cannot be read ({getattr(error, 'strerror', None) or error})"
        raise StreamtrainError(message, "profile, data, or a file with one symbol a line is expected") from error
    lines = {number: symbol for number, line in enumerate(text.splitlines(), 1) if (symbol := line.strip())}
    symbols = [*lines.values()]
    for number, symbol in lines.items():
        if list(policy.symbols_of(symbol)) != [symbol]:
            raise StreamtrainError(f"{path}:{number}: {symbol!r} is not one symbol of {policy.units}",
                                   "one symbol a line is expected; --units says what a symbol is")  # fmt: skip
    if repeated := [symbol for symbol, count in Counter(symbols).items() if count > 1]:
        raise StreamtrainError(f"{path}: {repeated[0]!r} is listed twice")
    if not symbols:
        raise StreamtrainError(f"{path}: lists no symbol", "one symbol a line is expected")
    return tuple(symbols)


def settle_alphabet(
    scanned: ScanResult, training: Mask, held_out: Mask, policy: LabelPolicy, wanted: WantedSymbols, pool: Workers
) -> tuple[ScanResult, LabelPolicy]:
    """Return the policy with its alphabet, and the clips with those refused whose symbols are too rare to be in it.

    Raises ManifestError if the training or the validation labels are of another alphabet.
    """
    if not policy.symbols:
        scanned, policy = _find_alphabet(scanned, training, held_out, policy, wanted, pool)
    clips = scanned.clips
    for side, members in (("training", training), ("validation and test", held_out)):
        symbols, foreign = (int(clips[name][members].sum()) for name in ("symbols", "foreign"))
        if foreign and policy.symbols:
            place, utterance = scanned.find(int(np.argmax(np.where(members, clips["foreign"], 0))))
            worst = (foreign, place, policy.normalize(utterance.text))
            check_alphabet(SymbolCounts(symbols, foreign, worst), side, policy)
    return scanned, policy


@dataclass
class SymbolTable:
    """Hold the symbols of some labels: how often each occurs, and in which clips, while these are few."""

    counts: Counter[str] = field(default_factory=Counter)
    clips: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))  # by symbol, `few` at most


Tables = dict[bool, SymbolTable]  # of training (False) and of what is held out (True)
# layouts, policy, `few`, and of each clip its row, whether it is held out, its source, its line, its place
CountJob = tuple[tuple[Layout, ...], LabelPolicy, int, list[tuple[int, bool, int, bytes, str]]]


def _count_symbols(
    scanned: ScanResult, training: Mask, held_out: Mask, policy: LabelPolicy, few: int, pool: Workers
) -> Tables:
    """Count the symbols of all labels but refused clips'; a symbol that occurs up to `few` times has all its clips."""
    rows = np.flatnonzero(~scanned.clips["refused"] & (training | held_out))
    chunks = [rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK)]

    def jobs() -> Iterator[CountJob]:
        layouts = tuple(source.layout for source in scanned.sources)
        for chunk in chunks:
            places = scanned.clips[["source", "row"]][chunk].tolist()
            lines = []
            for clip, (number, row) in zip(chunk.tolist(), places, strict=True):
                source = scanned.sources[number]
                lines.append((clip, bool(held_out[clip]), number, source.line(row), source.place(row)))
            yield layouts, policy, few, lines

    total: Tables = {False: SymbolTable(), True: SymbolTable()}
    for part in pool.map(_count_chunk, jobs(), list(map(len, chunks)), "counting"):
        for side, table in part.items():
            total[side].counts.update(table.counts)
            for symbol, clips in table.clips.items():
                total[side].clips[symbol] += clips[: few - len(total[side].clips[symbol])]
    return total


def _count_chunk(job: CountJob) -> dict[bool, SymbolTable]:
    layouts, policy, few, lines = job
    tables: Tables = {False: SymbolTable(), True: SymbolTable()}
    for clip, side, source, line, place in lines:
        symbols = policy.symbols_of(policy.normalize(layouts[source].parse(line, place)[0].text))
        table = tables[side]
        table.counts.update(symbols)
        for symbol in set(symbols):
            if len(table.clips[symbol]) < few:
                table.clips[symbol].append(clip)
        count_done()
    return {side: SymbolTable(table.counts, dict(table.clips)) for side, table in tables.items()}


def _find_alphabet(
    scanned: ScanResult, training: Mask, held_out: Mask, policy: LabelPolicy, wanted: WantedSymbols, pool: Workers
) -> tuple[ScanResult, LabelPolicy]:
    """Return the policy with the symbols of the training labels but the rare ones, whose clips are refused.

    What is left is counted again: without these clips, other symbols may be rare.
    """
    left, min_count = training & ~scanned.clips["refused"], wanted.min_count
    clips = int(left.sum())
    while True:
        tables = _count_symbols(scanned, left, held_out, policy, min_count, pool)
        counts = {symbol: count for symbol, count in sorted(tables[False].counts.items()) if symbol != " "}
        check_size([symbol for symbol, count in counts.items() if count >= min_count], policy, wanted.alphabet)
        rare = {symbol: count for symbol, count in counts.items() if count < min_count}
        if not rare:
            break
        rows = sorted({row for symbol in rare for row in tables[False].clips[symbol]})
        left[rows] = False
        if clips - left.sum() > MAX_RARE * clips:
            place, utterance = scanned.find(rows[0])
            raise too_many_rare(place, utterance.text, f"{clips - left.sum():,} of {clips:,}", rare, policy, min_count)
        scanned = replace(scanned, refusals=_refuse(scanned, rows, rare, policy, min_count) | scanned.refusals)
    policy = replace(policy, symbols=tuple(counts), counts=tuple(counts.values()))
    for symbol in tables[True].counts.keys() - policy.alphabet:  # of the clips held out, for their share
        scanned.clips["foreign"][tables[True].clips[symbol][0]] += tables[True].counts[symbol]
    return scanned, policy


def _refuse(
    scanned: ScanResult, rows: Sequence[int], rare: Mapping[str, int], policy: LabelPolicy, min_count: int
) -> dict[int, Refusal]:
    """Return why clips with rare symbols are refused, and count these symbols in the table of clips."""
    refusals = {}
    for row in rows:
        utterance = scanned.find(row)[1]
        found = [symbol for symbol in policy.symbols_of(policy.normalize(utterance.text)) if symbol in rare]
        scanned.clips["foreign"][row] = len(found)
        named = ", ".join(f"{policy.name([symbol])} ({rare[symbol]})" for symbol in sorted(set(found)))
        refusals[row] = Refusal(utterance, f"{RARE} {min_count} times: {named}", in_training=True)
    return refusals


def too_many_rare(
    place: str, text: str, share: str, rare: Collection[str], policy: LabelPolicy, min_count: int
) -> ManifestError:
    """Return the error for labels of which so large a `share` would be left out; `text` is one of them."""
    return ManifestError(
        f"{place}: {text[:80]!r}: {share} training labels have symbols of {policy.units} that occur fewer "
        f"than {min_count} times: {', '.join(map(repr, sorted(rare)[:5]))}, …",
        "is it the right column (--columns text=COLUMN), and are these the right --units? If the corpus is small, "
        "--min-symbol-count 1",
    )
