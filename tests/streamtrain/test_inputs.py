"""Whatever names them, the same clips are found, each with its bytes; what holds nothing says so."""

import codecs
import json
import os
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from sharding.errors import AudioError, StreamtrainError
from sharding.labels.policy import policy_of
from sharding.shardset.index import read_index, read_keys
from sharding.shardset.sample import whole_key
from sharding.shardset.store import open_store
from sharding.sources.manifest import read_source
from sharding.sources.options import ManifestOptions
from streamtrain.infer.inputs import find_recordings
from streamtrain.model.tokenizer import save_vocab
from streamtrain.model.vocab import vocab_of
from tests.tools.commands import run_module
from tests.tools.corpus import make_corpus, read_manifest
from tests.tools.seaweed import Seaweed


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recordings")
    make_corpus(folder / "meadow", clips=9, long_clips=2)
    return folder / "meadow"


@pytest.fixture(scope="module")
def shards(corpus: Path) -> Path:
    out = corpus.parent / "shards"
    done = run_module("sharding", "build", corpus, "--out", out, "--valid-fraction", 0.5)
    assert done.returncode == 0, done.stderr
    return out


def bytes_of(*sources: object) -> dict[str, bytes]:
    return {one.utterance_id: one.load()[0].audio for one in find_recordings([str(source) for source in sources])}


def test_a_corpus_is_the_same_as_files_folder_zip_manifest_and_objects(
    corpus: Path, tmp_path: Path, seaweed: Seaweed, url: str
) -> None:
    files = sorted((corpus / "audio").glob("*.flac"))
    wanted = {path.stem: path.read_bytes() for path in files}
    assert len(wanted) == 11
    with zipfile.ZipFile(tmp_path / "audio.zip", "w") as archive:
        for path in files:
            archive.write(path, f"deep/{path.name}")
    manifest = tmp_path / "rows.csv"
    manifest.write_text("audio_path\n" + "".join(f"{path.name}\n" for path in files))
    (tmp_path / "audio").symlink_to(corpus / "audio")
    store = open_store(f"{url}/loose")
    for path in files:
        store.write(f"a/{path.name}", path.read_bytes())
    store.write("notes.txt", b"no audio")
    for sources in (files, [corpus], [tmp_path / "audio.zip"], [corpus / "train_phon_transcripts.jsonl"], [manifest],
                    [f"{url}/loose"], [f"{url}/loose/a/{path.name}" for path in files]):  # fmt: skip
        assert bytes_of(*sources) == wanted, sources


def test_a_shard_set_holds_each_recording_once_and_whole(corpus: Path, shards: Path) -> None:
    """Also those that the build cut: their pieces come together again, in order."""
    found = find_recordings([str(shards)])
    assert sorted(one.utterance_id for one in found) == sorted(row["utterance_id"] for row in read_manifest(corpus))
    store = open_store(shards)
    keys = read_keys(store, read_index(store)).tolist()
    assert len(keys) > len({whole_key(key) for key in keys}) == len(found)
    for one in found:
        pieces = one.load()
        starts = [piece.start_sec for piece in pieces]
        assert starts == sorted(starts)
        assert starts[0] == 0
        assert {piece.utterance_id for piece in pieces} == {one.utterance_id}
        assert len(pieces) == sum(whole_key(key) == one.utterance_id for key in keys)


def test_a_shard_set_in_a_bucket_is_the_same(shards: Path, seaweed: Seaweed, url: str) -> None:
    store, local = open_store(f"{url}/shards"), open_store(shards)
    for name in local.names():
        store.write(name, local.read(name))
    assert bytes_of(f"{url}/shards") == bytes_of(shards)


def test_tars_of_others_are_taken_clip_by_clip(tmp_path: Path) -> None:
    """Their keys may look like ours of pieces."""
    make_corpus(tmp_path / "theirs", clips=3)
    names = [path.name for path in sorted((tmp_path / "theirs" / "audio").iterdir())]
    for number, name in enumerate(names):
        (tmp_path / "theirs" / "audio" / name).rename(tmp_path / "theirs" / f"clip+{number:03d}.flac")
        (tmp_path / "theirs" / f"clip+{number:03d}.txt").write_text("kæt")
    (tmp_path / "tars").mkdir()
    members = [f"clip+{number:03d}.{kind}" for number in range(3) for kind in ("flac", "txt")]
    subprocess.run(["tar", "-cf", tmp_path / "tars" / "a.tar", *members], cwd=tmp_path / "theirs", check=True)
    assert run_module("sharding", "index", tmp_path / "tars", "--profile", "pasketti").returncode == 0
    assert sorted(bytes_of(tmp_path / "tars")) == [f"clip+{number:03d}" for number in range(3)]


def test_a_clip_that_a_manifest_names_and_nobody_has_is_an_error_of_its_own(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "audio").symlink_to(corpus / "audio")
    name = next((corpus / "audio").iterdir()).name
    rows = [{"audio_path": f"audio/{each}"} for each in (name, "nobody.flac", "../../etc/passwd")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    good, missing, outside = find_recordings([str(tmp_path / "rows.jsonl")])
    assert good.load()[0].audio == (corpus / "audio" / name).read_bytes()
    for one, said in ((missing, "missing"), (outside, "outside")):
        with pytest.raises(AudioError, match=said):
            one.load()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            b'{"audio_path": "a.flac"}\n{"path": "b.flac"}\n',
            r"rows\.jsonl:2: field 'audio_path' is missing; .*\n.*--columns",
        ),
        (b'{"audio_path": "\xff.flac"}\n', r"rows\.jsonl:1: not JSON: .*unicode"),
        (b"[1]\n", r"rows\.jsonl:1: a JSON object is expected, found list"),
        (b'{"audio_path": 3}\n', r"rows\.jsonl:1: 'audio_path' is 3, a string is expected"),
        (b'{"audio_path": "a\\u0000.flac"}\n', r"rows\.jsonl:1: 'audio_path' is .*, which contains NUL"),
        (
            b'{"audio_path": "a.flac", "utterance_id": "\\ud800"}\n',
            r"rows\.jsonl:1: .*, which contains .* a lone surrogate",
        ),
        (b'{"audio_path": "nobody.flac"}\n', "there is no audio"),
        (b"", "the file has no rows"),
        (b'{"audio_path": "a.flac", "utterance_id": null}\n', r"rows\.jsonl:1: .* must not be empty"),
        (b'{"audio_path": "a.flac", "utterence_id": "a"}\n', "did you mean 'utterance_id'"),
    ],
)
def test_a_manifest_that_is_none_is_told_with_its_line(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(StreamtrainError, match=said):
        find_recordings([str(tmp_path / "rows.jsonl")])


@pytest.mark.parametrize("bom", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize(("number", "name"), [("7", "7"), ("7.0", "7"), ('"a"', "a")])
def test_a_manifest_is_read_as_a_build_reads_it(bom: bytes, number: str, name: str, tmp_path: Path) -> None:
    """With the mark that Windows tools begin a file with, and numbers for names."""
    (tmp_path / "clip.flac").write_bytes(b"sound")
    row = f'{{"audio_path": "clip.flac", "utterance_id": {number}}}\n'
    (tmp_path / "rows.jsonl").write_bytes(bom + row.encode())
    assert bytes_of(tmp_path / "rows.jsonl") == {name: b"sound"}


def test_every_kind_of_audio_is_found_and_other_files_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["a.wav", "b.aiff", "c.oga", "d.m4a", "e.sph", "f.W64", "._a.wav", ".DS_Store", "g.txt", "h.txt", "README"]
    (tmp_path / "folder").mkdir()
    for name in names:
        (tmp_path / "folder" / name).write_bytes(b"sound")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in names:
            archive.writestr(name, b"sound")
    for source in (tmp_path / "folder", tmp_path / "a.zip"):
        assert list(bytes_of(source)) == ["a", "b", "c", "d", "e", "f"]
        assert capsys.readouterr().err == f"{source}: skipped 3 files (2 .txt, 1 no suffix)\n"


def test_files_that_differ_by_their_suffix_alone_keep_it_in_their_names(tmp_path: Path) -> None:
    for name in ("half.wav", "half.m4a", "whole.wav"):
        (tmp_path / name).write_bytes(name.encode())
    assert bytes_of(tmp_path) == {name: name.encode() for name in ("half.wav", "half.m4a", "whole.wav")}


@pytest.mark.parametrize(
    ("row", "options"),
    [
        ({"audio_path": "{name}"}, {}),
        ({"audio_path": "{root}/{name}"}, {"audio_root": "{root}"}),
        ({"audio_path": "{name}"}, {"audio_root": "{root}"}),
        ({"path": "{name}", "id": "{name}"}, {"columns": {"audio_path": "path", "utterance_id": "id"}}),
        ({"audio_path": "./{name}", "utterance_id": " {name} "}, {}),
    ],
)
def test_a_manifest_names_and_finds_clips_as_a_build_does(
    row: dict[str, str], options: dict[str, Any], tmp_path: Path
) -> None:
    root = tmp_path / "root"
    folder = tmp_path / "far" if "audio_root" in options else root
    names = ["s1/001.flac", "s2/001.flac", "s2/002.flac"]
    for path in (folder, *(root / name for name in names)):
        path.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(exist_ok=True)
    for name in names:
        (root / name).write_bytes(name.encode())
    rows = [{key: text.format(root=root, name=name) for key, text in row.items()} for name in names]
    (folder / "rows.jsonl").write_text("".join(json.dumps(each | {"phonetic_text": "kæt"}) + "\n" for each in rows))
    if "audio_root" in options:
        options = {"audio_root": str(root)}
    built = read_source(folder / "rows.jsonl", ManifestOptions(**options))
    wanted = [built.parse(number).utterance_id for number in range(3)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    found = find_recordings([str(folder / "rows.jsonl")], **options)
    assert [one.utterance_id for one in found] == wanted
    assert len(set(wanted)) == 3
    assert [one.load()[0].audio.decode() for one in found] == names


def test_what_tells_how_manifests_are_read_is_refused_where_there_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.flac").write_bytes(b"sound")
    save_vocab(vocab_of(policy_of("pasketti")), tmp_path / "model", do_normalize=True, attention_mask=False)
    for option in (("--audio-root", tmp_path), ("--columns", "audio_path=path")):
        command = ("transcribe", tmp_path / "model", tmp_path / "a.flac", "--out", tmp_path / "out.jsonl", *option)
        assert "no source is a transcripts file" in run_module("streamtrain", *command).stderr


def test_a_folder_is_searched_through_its_links_and_zips_and_under_any_name(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "linked").symlink_to(corpus / "audio")
    (tmp_path / "here" / "circle").symlink_to(tmp_path / "here")
    data = next((corpus / "audio").iterdir()).read_bytes()
    with zipfile.ZipFile(tmp_path / "here" / "b.zip", "w") as archive:
        archive.writestr("zipped.flac", data)
    with open(os.fsencode(tmp_path / "here") + b"/Sch\xfcler.flac", "wb") as file:
        file.write(data)
    (tmp_path / "here" / "nowhere.flac").symlink_to(tmp_path / "nobody")
    *found, broken = sorted(find_recordings([str(tmp_path / "here")]), key=lambda one: one.utterance_id == "nowhere")
    with pytest.raises(FileNotFoundError):
        broken.load()
    names = {one.utterance_id for one in found}
    assert len(names) == len(found) == 11 + 2
    assert {"zipped", "Sch\\xfcler"} <= names
    assert all(one.load()[0].audio for one in found)
    assert all(one.audio_path.encode() for one in found)


def test_files_of_one_name_are_told_apart_by_their_folders_or_refused(corpus: Path, tmp_path: Path) -> None:
    data = next((corpus / "audio").iterdir()).read_bytes()
    for child in ("kid1", "kid2"):
        (tmp_path / child).mkdir()
        (tmp_path / child / "001.flac").write_bytes(data)
    assert [one.utterance_id for one in find_recordings([str(tmp_path)])] == ["kid1/001", "kid2/001"]
    for child in ("kid1", "kid2"):
        with zipfile.ZipFile(tmp_path / f"{child}.zip", "w") as archive:
            archive.writestr("001.flac", data)
    names = ["kid1.zip/001.flac", "kid1/001.flac", "kid2.zip/001.flac", "kid2/001.flac"]
    assert [one.utterance_id for one in find_recordings([str(tmp_path)])] == [name[:-5] for name in names]
    with pytest.raises(StreamtrainError, match="1 names are shared by several recordings, such as '001'"):
        find_recordings([str(tmp_path / "kid1"), str(tmp_path / "kid2")])


def test_what_is_not_there_is_told(tmp_path: Path) -> None:
    for source, said in ((tmp_path / "none", "no such file"), (tmp_path, "no audio in")):
        with pytest.raises(StreamtrainError, match=said):
            find_recordings([str(source)])
