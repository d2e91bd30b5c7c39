"""Names as disks, archives and people spell them: one name is one child and one file, two names are two."""

import io
import json
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from unicodedata import normalize

import pytest
import webdataset

from sharding.audio.codec import encode
from sharding.build.alphabet import WantedSymbols
from sharding.build.external import index_tars
from sharding.build.scan import speaker_hash
from sharding.cli import _find_sources, main
from sharding.files.names import age_order, canonical_name, name_of
from sharding.shardset.index import ShardIndex, read_index, read_keys, read_sample
from sharding.shardset.store import open_store
from sharding.sources.manifest import Utterance, read_source
from sharding.sources.options import ManifestOptions
from streamtrain.infer.inputs import find_recordings
from tests.tools.corpus import MANIFEST, PHONES, Row, describe, make_corpus, read_manifest, say, write_manifest
from tests.tools.shard_sets import assert_balanced, digest_of, read_all, read_ledger, read_summary

NFC, NFD = "Zo\u00eb", "Zoe\u0308"
FLAC = encode(say("kæt"))
Sizes = Mapping[str, bytes]


def build(*sources: object, out: Path, code: int = 0) -> dict[str, str | None]:
    """Build in this process; returns the reason of each clip's rejection, None of one that was taken."""
    command = ["build", *sources, "--out", out, "--workers", 1, "--valid-fraction", 0, "--max-reject-rate", 1]
    assert main([str(part) for part in command]) == code
    assert_balanced(out)
    return {row["utterance_id"]: row["reason"] for row in read_ledger(out)}


def parse(folder: Path, rows: list[Row], group_by: str = "") -> list[Utterance]:
    source = read_source(write_manifest(folder, rows), ManifestOptions(group_by=group_by))
    return [source.parse(row) for row in range(len(source))]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return make_corpus(tmp_path / "corpus", clips=4, children=2, seconds=(0.3, 0.4), symbols="ɑeiostkm")


# --- whose a clip is --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["child_id", "session_id", "school", "utterance_id"])
@pytest.mark.parametrize(("one", "other"), [(NFC, NFD), ("c1", "c1 "), ("c1", "\tc1"), (7, "7"), (0, 0.0), (7, 7.0)])
def test_two_spellings_of_a_name_are_one_speaker(column: str, one: object, other: object, corpus: Path) -> None:
    """By whichever column clips are kept together."""
    rows = [row | {"child_id": "", "session_id": "", "school": ""} | {column: name}
            for row, name in zip(read_manifest(corpus), (one, other), strict=False)]  # fmt: skip
    first, second = parse(corpus, rows, "school")
    assert speaker_hash(first.speaker) == speaker_hash(second.speaker)
    assert first.speaker == canonical_name(str(name_of(one)))


@pytest.mark.parametrize("other", ["anna", "An na", "Anna\u0308", "Ann"])
def test_names_that_differ_by_more_are_two_speakers(other: str, corpus: Path) -> None:
    rows = [row | {"child_id": name} for row, name in zip(read_manifest(corpus), ("Anna", other), strict=False)]
    first, second = parse(corpus, rows)
    assert first.speaker != second.speaker


def test_a_child_of_two_spellings_is_on_one_side_of_validation(tmp_path: Path) -> None:
    folder = make_corpus(tmp_path / "corpus", clips=32, children=16, seconds=(0.3, 0.4), symbols="ɑeiostkm")
    names = [f"{NFC}{number}" for number in range(16)]
    spellings = (lambda name: normalize("NFD", name), lambda name: f" {name} ")
    rows = read_manifest(folder)
    for number, row in enumerate(rows):
        name = names[number % 16]
        row["child_id"] = name if number < 16 else spellings[number % 2](name)
    write_manifest(folder, rows)
    out = tmp_path / "out"
    assert main(["build", str(folder), "--out", str(out), "--valid-fraction", "0.5", "--workers", "1"]) == 0
    sides = {(sample.child_id, split == "valid") for split, sample in read_all(out).values()}
    assert sorted(name for name, _ in sides) == sorted(names)
    assert {side for _, side in sides} == {True, False}


@pytest.mark.parametrize("other", [NFD, f"{NFC} "])
def test_ids_that_are_one_name_are_refused_as_seen_twice(
    other: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = read_manifest(corpus)
    rows[0]["utterance_id"], rows[2]["utterance_id"] = NFC, other
    write_manifest(corpus, rows)
    assert main(["build", str(corpus), "--out", str(tmp_path / "out"), "--workers", "1"]) == 1
    said = capsys.readouterr().err
    assert f"{MANIFEST}:3: utterance_id {other!a} was seen before, at {corpus / MANIFEST}:1, as {NFC!a}" in said


@pytest.mark.parametrize("value", [True, [1], float("nan"), float("inf")])
def test_what_is_no_name_stays_what_it_is(value: object) -> None:
    assert name_of(value) is value


# --- patterns ---------------------------------------------------------------------------------------------------


def test_ages_come_by_their_numbers_and_the_unknown_last() -> None:
    ages = [
        "2;6",
        "2;10",
        "3-4",
        "3.5",
        "5",
        "5-7",
        "8-11",
        "10",
        "12+",
        "Teens",
        "twenties",
        "forties",
        "Fifties",
        "grown",
        "unknown",
    ]
    assert sorted(sorted(ages), key=age_order) == ages


def test_what_is_there_is_no_pattern(tmp_path: Path) -> None:
    for name in ("set[1]/a", "set1/a", "set2/a", "what?/a"):
        (tmp_path / name).mkdir(parents=True)

    def found(*patterns: str) -> list[str]:
        paths = _find_sources([f"{tmp_path}/{pattern}" for pattern in patterns])
        return [path.relative_to(tmp_path).as_posix() for path in paths]

    assert found("set[1]", "what?") == ["set[1]", "what?"]
    assert found("set[1]/*") == ["set[1]/a"]
    assert found("set[2]", "set[0-9]/*") == ["set2", "set1/a", "set2/a"]
    assert found("set*") == ["set1", "set2", "set[1]"]
    assert found("none*") == ["none*"]


@pytest.mark.parametrize(
    ("patterns", "valid"),
    [
        (None, ["my-val.tar"]),
        (["set[1].tar"], ["set[1].tar"]),
        (["set[12].tar"], ["set1.tar"]),
        ([f"{NFC}*"], [f"{NFD}.tar"]),
        (["set*", "my-val.tar"], ["my-val.tar", "set1.tar", "set[1].tar"]),
    ],
)
def test_tars_validate_by_their_names(patterns: list[str] | None, valid: list[str], tmp_path: Path) -> None:
    for number, name in enumerate(("my-val.tar", "set1.tar", "set[1].tar", f"{NFD}.tar", "._set1.tar")):
        (tmp_path / name).write_bytes(tar({f"c{number}.flac": FLAC, f"c{number}.txt": b"k"}) if name[0] != "." else b"")
    index, _, _ = index_tars(str(tmp_path), PHONES, {"valid": patterns or []}, 25.0, 1, WantedSymbols(1))
    assert [shard.name for shard in index.shards if shard.split == "valid"] == valid
    assert len(index.shards) == 4  # what macOS leaves beside a file is none


@pytest.mark.parametrize("pattern", [NFC + ".tar", NFD + "*"])
def test_a_pattern_chooses_every_tar_that_fits_it(pattern: str, tmp_path: Path) -> None:
    """Also two whose names look the same: none of them may be trained on unsaid."""
    for number, name in enumerate((NFC, NFD)):
        (tmp_path / f"{name}.tar").write_bytes(tar({f"c{number}.flac": FLAC, f"c{number}.txt": b"k"}))
    index, _, _ = index_tars(str(tmp_path), PHONES, {"valid": [pattern]}, 25.0, 1, WantedSymbols(1))
    assert [shard.split for shard in index.shards] == ["valid", "valid"]


def test_a_pattern_that_no_tar_fits_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Misspelt, it would leave nothing to validate on."""
    (tmp_path / "train.tar").write_bytes(tar({"c0.flac": FLAC, "c0.txt": b"k"}))
    assert main(["index", "--profile", "pasketti", str(tmp_path), "--valid", "*dve*"]) == 1
    assert "no tar matches --valid '*dve*'\nhint: there are train.tar" in capsys.readouterr().err


# --- tars of others ---------------------------------------------------------------------------------------------


def tar(members: Mapping[str, bytes], form: int = tarfile.USTAR_FORMAT, encoding: str = "utf-8") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form, encoding=encoding) as archive:
        for name, body in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(body)
            archive.addfile(info, io.BytesIO(body))
    return buffer.getvalue()


def index_one(folder: Path, data: bytes) -> tuple[ShardIndex, dict[str, str | None]]:
    """Index a tar in this process; with the reason of each sample's rejection."""
    (folder / "train.tar").write_bytes(data)
    assert main(["index", "--profile", "pasketti", str(folder), "--workers", "1", "--max-reject-rate", "1"]) == 0
    index = read_index(open_store(folder))
    return index, {row["utterance_id"]: row["reason"] for row in read_ledger(folder)}


TARS: dict[str, Sizes] = {
    "made on a Mac": {f"./{name}": FLAC if name.endswith(".flac") else b"k" for number in range(3)
                      for name in (f"._c{number}.flac", f"c{number}.flac", f"._c{number}.txt", f"c{number}.txt")},
    "hidden files and files without a dot within a sample": {
        "d0.flac": FLAC, ".nfs1": b"x", "d0.txt": b"k", "READ": b"x", "d1.flac": FLAC, "LICENSE": b"", "d1.txt": b"k"},
    "notes, and names that begin like them": {
        "__note__": b"x", "__meta__/a.txt": b"x", "__a.flac": FLAC, "__a.txt": b"k",
        "a/__b__.flac": FLAC, "a/__b__.txt": b"k"},
    "folders, dots and capitals": {
        "a.b/c.FLAC": FLAC, "a.b/c.seg.TXT": b"x", "a.b/c.txt": b"k", "b/c.flac": FLAC, "b/c.txt": b"k"},
}  # fmt: skip


@pytest.mark.parametrize("members", TARS.values(), ids=TARS)
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_holds_the_samples_that_webdataset_reads(form: int, members: Sizes, tmp_path: Path) -> None:
    index, reasons = index_one(tmp_path, tar(members, form))
    read = webdataset.WebDataset(str(tmp_path / "train.tar"), shardshuffle=False, empty_check=False)
    samples = {sample["__key__"]: sample for sample in read}
    assert reasons == dict.fromkeys(samples)
    found = [read_sample(open_store(tmp_path), index, row) for row in range(len(index.samples))]
    assert {sample.utterance_id: sample.audio for sample in found} == {
        key: sample["flac"] for key, sample in samples.items()
    }
    assert {sample.text for sample in found} == {"k"}


def test_hidden_files_in_folders_are_no_samples(tmp_path: Path) -> None:
    """A pattern of webdataset's takes them for kinds of a sample without a name, which tears theirs apart."""
    _, reasons = index_one(tmp_path, tar({"a/._c.flac": b"x", "a/c.flac": FLAC, "a/._c.txt": b"x", "a/c.txt": b"k"}))
    assert reasons == {"a/c": None}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
def test_a_name_that_is_no_utf8_is_read_and_spelt_out(form: int, tmp_path: Path) -> None:
    names = [name.encode("latin-1").decode("utf-8", "surrogateescape") for name in ("c0", NFC, "ÿ")]
    members = {f"{name}.{kind}": FLAC if kind == "flac" else b"k" for name in names for kind in ("flac", "txt")}
    index, reasons = index_one(tmp_path, tar(members | {f"{names[2]}.txt": b"\xff"}, form))
    assert reasons.keys() == {"c0", r"Zo\xeb", r"\xff"}
    assert {name for name, reason in reasons.items() if reason} == {r"\xff"}  # its label is none either
    assert read_keys(open_store(tmp_path), index).tolist() == ["c0", "Zo%5Cxeb"]
    assert main(["verify", str(tmp_path), "--decode"]) == 0


def test_members_of_one_name_in_two_unicode_forms_are_one_sample(tmp_path: Path) -> None:
    _, reasons = index_one(tmp_path, tar({f"{NFD}.flac": FLAC, f"{NFC}.txt": b"k"}))
    assert reasons == {NFC: None}


@pytest.mark.parametrize("second", ["c.flac", "c.FLAC"])
def test_a_member_that_is_there_twice_is_told(second: str, tmp_path: Path) -> None:
    first, rest = tar({second: FLAC}), tar({"c.flac": FLAC, "c.txt": b"k", "d.flac": FLAC, "d.txt": b"k"})
    member = 512 + len(FLAC) + -len(FLAC) % 512
    _, reasons = index_one(tmp_path, first[:member] + rest)
    assert reasons == {"c": "these bytes are not a sample: c.flac occurs twice", "d": None}


def test_numbers_are_names_in_the_json_of_a_sample(tmp_path: Path) -> None:
    """0 as well, which is no absence; half a character, a list or a truth is told."""
    documents = [{"child_id": 0, "session_id": 7.0, "age_bucket": 5}, {"child_id": f" {NFD}"}, {"child_id": None},
                 {"child_id": [1]}, {"child_id": True}, {"child_id": "\ud800"}, {"text": 0}]  # fmt: skip
    members = {}
    for key, document in zip("abcdefg", documents, strict=True):
        members |= {f"{key}.flac": FLAC, f"{key}.json": json.dumps({"text": "k"} | document).encode()}
    index, reasons = index_one(tmp_path, tar(members))
    found = [read_sample(open_store(tmp_path), index, row) for row in range(len(index.samples))]
    assert [(one.child_id, one.session_id, one.age_bucket) for one in found] == [
        ("0", "7", "5"), (NFC, "", ""), ("", "", "")]  # fmt: skip
    assert {name: str(reason).rpartition(": ")[2] for name, reason in reasons.items() if reason} == {
        "d": "child_id is [1], a string is expected",
        "e": "child_id is True, a string is expected",
        "f": r"child_id is '\ud800', which has a lone surrogate",
        "g": "text is 0, a string is expected",
    }


def test_a_child_of_two_spellings_makes_validation_tars_not_disjoint(tmp_path: Path) -> None:
    for split, name in (("train", NFC), ("val", f"{NFD} ")):
        document = json.dumps({"text": "k", "child_id": name}).encode()
        (tmp_path / f"{split}.tar").write_bytes(tar({f"{split}.flac": FLAC, f"{split}.json": document}))
    index, _, _ = index_tars(str(tmp_path), PHONES, {}, 25.0, 1, WantedSymbols(1))
    assert index.notes["validation"]["disjoint_by_speaker"] is False


# --- files ------------------------------------------------------------------------------------------------------


class Unflagged(zipfile.ZipInfo):
    """A member whose name is UTF-8 without the flag that says so."""

    def _encodeFilenameFlags(self) -> tuple[bytes, int]:  # noqa: N802
        return self.filename.encode(), self.flag_bits


def as_folder(folder: Path, files: Sizes) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def as_zip(folder: Path, files: Sizes, prefix: str = "", member: type[zipfile.ZipInfo] = zipfile.ZipInfo) -> None:
    with zipfile.ZipFile(folder / "audio.zip", "w") as archive:
        for name, data in files.items():
            archive.writestr(member(prefix + name), data)


PLACES: dict[str, Callable[[Path, Sizes], None]] = {
    "folder": as_folder,
    "zip": as_zip,
    "zip without the flag": lambda folder, files: as_zip(folder, files, member=Unflagged),
    "zip with a folder more": lambda folder, files: as_zip(folder, files, "a\u030a/"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("said", "there"), [(NFC, NFD), (NFD, NFC), ("\u1e69", "s\u0307\u0323")])
def test_audio_is_found_under_any_unicode_form_of_its_name(place: str, said: str, there: str, tmp_path: Path) -> None:
    """In folders of such names too, and where all names are of another form; and it is no orphan."""
    data = {name: encode(say("kæt" * count)) for count, name in enumerate(("a", "b"), 1)}
    PLACES[place](tmp_path, {f"audio/{there}/{there}{name}.flac": body for name, body in data.items()})
    rows = [
        {"utterance_id": name, "audio_path": f"audio/{said}/{said}{name}.flac", "phonetic_text": "kæt"} for name in data
    ]
    assert build(write_manifest(tmp_path, rows), out=tmp_path / "out") == {"a": None, "b": None}
    assert {sample.utterance_id: sample.audio for _, sample in read_all(tmp_path / "out").values()} == data
    assert (tmp_path / "out/report/orphans.txt").read_text() == ""
    heard = {one.utterance_id: one.load()[0].audio for one in find_recordings([str(tmp_path / MANIFEST)])}
    assert heard == data


@pytest.mark.parametrize("place", ["folder", "zip"])
def test_of_several_forms_the_exact_one_is_taken_and_others_are_told(place: str, tmp_path: Path) -> None:
    forms = ["s\u0323\u0307", "\u1e63\u0307", "s\u0307\u0323"]  # all canonically equal
    data = {form: encode(say("kæt" * count)) for count, form in enumerate(forms, 1)}
    PLACES[place](tmp_path, {f"audio/{form}.flac": body for form, body in data.items()})
    rows = [{"utterance_id": name, "audio_path": f"audio/{form}.flac", "phonetic_text": "kæt"}
            for name, form in (("exact", forms[1]), ("several", "\u1e69"))]  # fmt: skip
    reasons = build(write_manifest(tmp_path, rows), out=tmp_path / "out")
    assert reasons["exact"] is None
    assert [sample.audio for _, sample in read_all(tmp_path / "out").values()] == [data[forms[1]]]
    assert str(reasons["several"]).startswith("audio_path matches several files that differ only in Unicode form: ")
    assert all(ascii(form)[1:-1] in str(reasons["several"]) for form in forms)
    orphans = (tmp_path / "out/report/orphans.txt").read_text().splitlines()
    assert sorted(orphans) == sorted(f"{tmp_path.name}/audio/{form}.flac" for form in (forms[0], forms[2]))


def test_a_name_in_code_page_437_stays_one(tmp_path: Path) -> None:
    as_zip(tmp_path, {"audio/Zo\u00eb.flac": FLAC, "audio/x.flac": FLAC}, member=Unflagged)
    path = tmp_path / "audio.zip"
    path.write_bytes(path.read_bytes().replace(NFC.encode(), b"Zo\x89z"))
    rows = [{"utterance_id": "a", "audio_path": "audio/Zoëz.flac", "phonetic_text": "k"}]
    assert build(write_manifest(tmp_path, rows), out=tmp_path / "out") == {"a": None}


# --- links ------------------------------------------------------------------------------------------------------


def link_audio(corpus: Path, count: int) -> Path:
    """As git-annex and the Hugging Face cache do: the first files are links to where the data is."""
    blobs = corpus.parent / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted((corpus / "audio").iterdir())[:count]):
        shutil.move(path, blobs / str(number))
        path.symlink_to(f"../../blobs/{number}")
    return corpus


def test_a_corpus_whose_audio_is_all_links_says_so_and_is_read_by_the_switch(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = tmp_path / "plain"
    assert set(build(corpus, out=plain).values()) == {None}
    link_audio(corpus, 4)
    out = tmp_path / "out"
    assert main(["build", str(corpus), "--out", str(out)]) == 1
    said = capsys.readouterr().err
    assert f"all 4 audio files checked are links that lead outside this folder, such as 'audio/corpus-0000.flac' to '{tmp_path}/blobs/0'" in said  # fmt: skip # noqa: E501
    assert "hint: --follow-links reads them" in said
    assert not out.exists()
    assert set(build(corpus, "--follow-links", out=out).values()) == {None}
    assert digest_of(out) == digest_of(plain)
    shard = next(out.glob("train/*.tar"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    assert main(["verify", str(out), "--repair", str(corpus), "--follow-links"]) == 0
    assert shard.read_bytes() == whole
    assert len(find_recordings([str(corpus / MANIFEST)])[0].load()) == 1  # transcribe follows links anyway


def test_single_links_that_lead_outside_or_nowhere_are_told(corpus: Path, tmp_path: Path) -> None:
    link_audio(corpus, 2)
    (tmp_path / "blobs/1").unlink()
    reasons = build(corpus, out=tmp_path / "out")
    assert reasons == {
        "corpus-0000": "audio file is a link that leads outside its folder: --follow-links reads it",
        "corpus-0001": "audio file is a link that leads nowhere",
        "corpus-0002": None,
        "corpus-0003": None,
    }
    followed = build(corpus, "--follow-links", out=tmp_path / "followed")
    assert followed == reasons | {"corpus-0000": None}


def test_links_to_folders_are_listed_once(corpus: Path, tmp_path: Path) -> None:
    """Two that lead back to where they lie make a circle of ever longer paths."""
    link_audio(corpus, 4)
    (tmp_path / "blobs/more").mkdir()
    (tmp_path / "blobs/more/lonely.flac").write_bytes(FLAC)
    for name in ("a", "b"):
        (corpus / "audio" / name).symlink_to(".")
    (corpus / "audio/more").symlink_to(tmp_path / "blobs/more")
    build(corpus, "--follow-links", out=tmp_path / "out")
    assert (tmp_path / "out/report/orphans.txt").read_text() == "corpus/audio/more/lonely.flac\n"


# --- tables -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["csv", "tsv", "CSV"])
def test_blanks_after_commas_are_no_part_of_a_table(suffix: str, corpus: Path, tmp_path: Path) -> None:
    rows = read_manifest(corpus)
    columns = ("utterance_id", "child_id", "audio_path", "phonetic_text")
    (corpus / MANIFEST).unlink()
    between, quote = ("\t", "") if suffix == "tsv" else (", ", '"')
    head = " \t".join(columns) if suffix == "tsv" else " , ".join(columns)
    lines = [head, *(between.join([*(row[name] for name in columns[:3]), f"{quote}k, k{quote}"]) for row in rows)]
    (corpus / f"x.{suffix}").write_text("\n".join(lines))
    build(corpus, out=tmp_path / "out")
    assert {
        (sample.utterance_id, sample.child_id, sample.text) for _, sample in read_all(tmp_path / "out").values()
    } == {(row["utterance_id"], row["child_id"], "k k") for row in rows}
    assert read_summary(tmp_path / "out")["orphan_audio"] == 0


def test_a_key_with_blanks_is_told_by_what_helps(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {(" audio_path" if name == "audio_path" else name): row[name] for name in row} for row in read_manifest(corpus)
    ]
    write_manifest(corpus, rows)
    assert main(["build", str(corpus), "--out", str(corpus / "out")]) == 1
    assert "hint: remove the blanks around ' audio_path'" in capsys.readouterr().err


# --- labels -----------------------------------------------------------------------------------------------------


def test_a_label_in_other_letters_of_its_phones_is_taken_and_a_look_alike_named(tmp_path: Path) -> None:
    (tmp_path / "audio").mkdir()
    rows = []
    labels = {"a": "d\u0254\u0261", "b": "\u01ddp", "c": "\u03b5" + " k" * 20, "d": "k\u200bk", "e": "\uab53"}
    for name, text in labels.items():
        (tmp_path / f"audio/{name}.flac").write_bytes(FLAC)
        rows.append(describe(tmp_path, f"audio/{name}.flac", text))
    reasons = build(write_manifest(tmp_path, rows), out=tmp_path / "out")
    label = "label has symbols outside the alphabet: "
    assert {name: reason for name, reason in reasons.items() if reason} == {
        "c": f"{label}'ε' U+03B5 (looks like 'ɛ' U+025B)",
        "d": f"{label}'\\u200b' U+200B",
    }
    texts = {sample.utterance_id: sample.text for _, sample in read_all(tmp_path / "out").values()}
    assert texts == {"a": "dɔg", "b": "əp", "e": "χ"}


def test_a_child_that_pandas_writes_as_4_0_is_child_4(tmp_path: Path) -> None:
    """Its column becomes one of floats where some row lacks its child."""
    for name, child in (("one", "4"), ("two", "4.0")):
        folder = make_corpus(tmp_path / name, clips=2, children=1)
        rows = "".join(f"{row['utterance_id']},{row['audio_path']},{row['phonetic_text']},{child}\n"
                       for row in read_manifest(folder))  # fmt: skip
        (folder / MANIFEST).unlink()
        (folder / "rows.csv").write_text(f"utterance_id,audio_path,phonetic_text,child_id\n{rows}")
    build(tmp_path / "one", tmp_path / "two", out=tmp_path / "out")
    assert {sample.child_id for _, sample in read_all(tmp_path / "out").values()} == {"4"}


def test_rows_that_share_their_audio_are_rejected_all(tmp_path: Path) -> None:
    """Each label is of a part of it, as NeMo's manifests have them, or one is wrong; both sides might hold it, too."""
    folder = make_corpus(tmp_path / "corpus", clips=3, children=3)
    rows = read_manifest(folder)
    again = {**rows[0], "utterance_id": "again", "audio_path": "./" + str(rows[0]["audio_path"]), "offset": 0.5}
    write_manifest(folder, [*rows, again])
    reasons = build(folder, out=tmp_path / "out")
    assert {name for name, reason in reasons.items() if reason} == {rows[0]["utterance_id"], "again"}
    assert "2 rows name this audio file" in str(reasons["again"])
