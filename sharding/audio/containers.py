"""Prove that an audio file is whole and a single recording, by its container. Bytes only: nothing is decoded.

libsndfile reads a file that was cut off up to its present end, and of several joined files the first alone, or the
headers of all others as sound.
"""

import math
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from sharding.audio import flac
from sharding.errors import AudioError

AUDIO_SUFFIXES = (
    *(".flac", ".wav", ".mp3", ".ogg", ".oga", ".opus", ".aif", ".aiff", ".aifc", ".au", ".snd", ".caf", ".rf64"),
    *(".w64", ".sph", ".m4a", ".aac", ".wma", ".amr", ".webm", ".mp4"),  # libsndfile cannot read those from .m4a on
)
PROVED_ELSEWHERE = ("FLAC", "MP3", "HTK")  # by their frames or their MD5; the last by libsndfile
UNKNOWN_BYTES = 0x7F00_0000  # writers to a pipe put this or more for a length: SoX in AIFF, others 2³² − 1
SPHERE_FIELD = re.compile(rb"^(sample_count|sample_n_bytes|channel_count) -(?:i|s1) (\d{1,18})\b", re.MULTILINE)
SPHERE_HEADER_BYTES = 1024
SPHERE_COMPRESSION = re.compile(rb"^sample_coding -s\d+ \w+,([\w.-]+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Chunks:
    """Describe how a container writes its chunks: name, size, body."""

    first: int  # byte at which the first chunk begins
    sound: bytes  # prefix of the name of the chunk with the samples
    order: Literal["little", "big"]
    name_bytes: int = 4
    size_bytes: int = 4
    align: int = 2
    counts_head: bool = False  # whether a size includes name and size


READ_TO_THE_END = (b"riff", b"NIST")  # by libsndfile, whatever their headers declare: Wave64 and SPHERE
TAIL_TAGS = (b"TAG", b"ID3", b"APETAGEX", b"LYRICSBEGIN")
HEADS = tuple(  # 48 bits and more, so that 10¹² bytes of compressed sound contain none by chance
    re.compile(head, re.DOTALL)
    for head in (
        rb"fLaC[\0\x80]\0\0\x22",
        rb"OggS\0\x02\0{8}",
        rb"RIFF....WAVE",
        rb"RIFX....WAVE",
        rb"RF64....WAVE",
        rb"riff\x2e\x91\xcf\x11",
        rb"FORM....AIF[FC]",
        rb"caff\0.\0\0",
        rb"\.snd\0\0\0",
        rb"dns\..\0\0\0",
        rb"NIST_1A\n",
    )
)
UNKNOWN_LENGTH = "header without a length: assumed to be whole"
TRAILING_DATA = "data after the end that the header declares: left out"

CHUNKED = {  # by the first bytes of a file
    b"RIFF": Chunks(12, b"data", "little"),  # WAV
    b"RIFX": Chunks(12, b"data", "big"),
    b"RF64": Chunks(12, b"data", "little"),  # EBU Tech 3306
    b"riff": Chunks(40, b"data", "little", name_bytes=16, size_bytes=8, align=8, counts_head=True),  # Sony Wave64
    b"FORM": Chunks(12, b"SSND", "big"),  # AIFF, AIFF-C
    b"caff": Chunks(8, b"data", "big", size_bytes=8, align=1),
}
SIZED = (*CHUNKED, b".snd", b"dns.", b"NIST")


def check_whole(data: bytes, container: str) -> tuple[str, ...]:
    """Return remarks on the end of a file for its owner. Raises AudioError if it is cut off or several files in one.

    A file that was written to a pipe declares no length, and is assumed to be whole. `data` begin after the tags.
    Raises AudioError also if a file of this `container` never shows whether it is whole.
    """
    remarks: tuple[str, ...] = ()
    if data.startswith(b"OggS"):
        end = _check_ogg(data)
    elif container in PROVED_ELSEWHERE:
        end = flac.end_of_blocks(data) if container == "FLAC" else 1  # its blocks may hold the header of a WAV
    else:
        declared_end = _end_of_sound(data)
        if declared_end is None:
            raise AudioError(f"{container} file: nothing in it shows whether it is whole; convert it to WAV or FLAC")
        if len(data) < declared_end < UNKNOWN_BYTES:
            raise AudioError(f"cut off: {declared_end - len(data)} bytes are missing at the end")
        end = declared_end if declared_end < UNKNOWN_BYTES else 1
        if declared_end >= UNKNOWN_BYTES:
            remarks = (UNKNOWN_LENGTH,)
        elif _is_odd(data, end):
            remarks = (TRAILING_DATA,)
    if joined := [match.start() for head in HEADS if (match := head.search(data, end))]:
        raise AudioError(f"several recordings in one file: another begins at byte {min(joined)}; split it")
    return remarks


def check_compression(data: bytes) -> None:
    """Raise AudioError if the samples of a SPHERE file are compressed: their size would look as if it were cut off."""
    if data.startswith(b"NIST_1A\n") and (match := SPHERE_COMPRESSION.search(data, 0, SPHERE_HEADER_BYTES)):
        raise AudioError(f"SPHERE file compressed by {match[1].decode()}: convert it, sph2pipe -f wav x.sph x.wav")


def check_sizes(data: bytes) -> None:
    """Raise AudioError if the sizes in a header show what is wrong with a file; libsndfile's error may be vaguer."""
    if _end_of_sound(data) is not None:
        check_whole(data, "")


def cut_tail(data: bytes) -> bytes:
    """Return a file without the bytes after its samples, if libsndfile would read them as sound."""
    return data[: _end_of_sound(data)] if data[:4] in READ_TO_THE_END else data


def skip_tags(data: bytes, start: int = 0) -> int:
    """Return where the ID3v2 tags that begin at `start` end; one may follow another (ID3v2.4 §3.1)."""
    while data[start : start + 3] == b"ID3" and start + 10 <= len(data):
        size = sum(byte << 7 * index for index, byte in enumerate(reversed(data[start + 6 : start + 10])))
        start += 10 + size + (10 if data[start + 5] & 16 else 0)  # with a footer
    return start


def _end_of_sound(data: bytes) -> int | None:
    """Return the byte at which the samples should end, by the header; None if it does not declare one."""
    if data[:4] in CHUNKED:
        return _end_of_chunk(data, CHUNKED[data[:4]])
    if data[:4] in (b".snd", b"dns."):  # Sun's AU: offset and size of the samples
        order: Literal["little", "big"] = "big" if data[:4] == b".snd" else "little"
        return sum(int.from_bytes(data[offset : offset + 4], order) for offset in (4, 8))
    if data.startswith(b"NIST_1A\n"):
        header = int(data[8:16]) if data[8:16].strip().isdigit() else 0
        fields = {name: int(value) for name, value in SPHERE_FIELD.findall(data[:header])}
        return header + math.prod(fields.values()) if len(fields) == 3 else None
    return None


def _end_of_chunk(data: bytes, chunks: Chunks) -> int | None:
    long_size = 0
    for name, body, end in _walk(data, chunks, chunks.first):
        if name == b"ds64":
            long_size = int.from_bytes(data[body + 8 : body + 16], "little")
        if name.startswith(chunks.sound) and end == body:
            return UNKNOWN_BYTES  # the writer meant to fill it in at the end
        if name.startswith(chunks.sound):
            return body + long_size if long_size and end - body == 2**32 - 1 else end
    return None


def _walk(data: bytes, chunks: Chunks, position: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield the name of each chunk and where its body begins and ends, as long as the file has chunks."""
    head = chunks.name_bytes + chunks.size_bytes
    while position + head <= len(data):
        name = data[position : position + chunks.name_bytes]
        size = int.from_bytes(data[position + chunks.name_bytes : position + head], chunks.order)
        body = position + head
        end = max(body, position + size) if chunks.counts_head else body + size
        yield name, body, end
        position = end + -end % chunks.align


def _is_odd(data: bytes, end: int) -> bool:
    """Return whether anything but chunks, zeros or a tag follows the samples, such as the rest of a recording.

    The header of a recorder that lost its power may declare too early an end.
    """
    chunks = CHUNKED.get(data[:4])
    if chunks:
        for name, _, chunk_end in _walk(data, chunks, end + -end % chunks.align):
            is_name = name[:4].isascii() and name[:4].decode().isprintable() and not name.startswith(chunks.sound)
            if not is_name or chunk_end > len(data):
                break
            end = chunk_end
    tail = data[end:].strip(b"\0")
    return bool(tail) and not tail.startswith(TAIL_TAGS)


# --- Ogg (RFC 3533) ---------------------------------------------------------------------------------------------

BEGINS, ENDS = 2, 4  # flags of a page
MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def _check_ogg(data: bytes) -> int:
    """Return where the pages of an Ogg file end. Raises AudioError if it is damaged, cut off or several files.

    Checks each page by its checksum and the number of the page before, and the last one of each stream by its mark.
    """
    end = 0
    streams: dict[bytes, tuple[int, bool]] = {}  # serial → number and end mark of the page before
    sound_began = False
    for position, page in _ogg_pages(data):
        flags, serial, number = page[5], page[14:18], int.from_bytes(page[18:22], "little")
        if flags & BEGINS and sound_began:
            raise AudioError("several recordings joined in one Ogg file; split it, or re-encode it")
        sound_began = not flags & BEGINS
        previous = streams.get(serial, (number - 1, False))[0]
        if number != previous + 1:
            raise AudioError(f"damaged: Ogg page {previous + 1} is missing before byte {position}")
        if _ogg_checksum(page) != page[22:26]:
            raise AudioError(f"damaged: the checksum of the Ogg page at byte {position} does not match")
        streams[serial], end = (number, bool(flags & ENDS)), position + len(page)
    if not all(ended for _, ended in streams.values()):
        raise AudioError("cut off: the last Ogg page has no end-of-stream mark")
    return end


def _ogg_pages(data: bytes) -> Iterator[tuple[int, bytes]]:
    position = 0
    while data[position : position + 4] == b"OggS" and position + 27 <= len(data):
        lacing = position + 27 + data[position + 26]  # end of the page's segment table
        end = lacing + sum(data[position + 27 : lacing])
        if max(lacing, end) > len(data):
            raise AudioError(f"cut off: {end - len(data)} bytes of the last Ogg page are missing")
        yield position, data[position:end]
        position = end
    if b"OggS" in data[position:]:
        raise AudioError(f"damaged: there is no Ogg page at byte {position}")


def _ogg_checksum(page: bytes) -> bytes:
    """Return the CRC of polynomial 04c11db7 from zero, highest bit first: zlib's of mirrored bytes, not inverted."""
    crc = zlib.crc32((page[:22] + bytes(4) + page[26:]).translate(MIRRORED), 2**32 - 1) ^ (2**32 - 1)
    return crc.to_bytes(4, "big").translate(MIRRORED)


# --- MP3 (ISO 11172-3 and 13818-3) ------------------------------------------------------------------------------

MP3_KBITS = {  # per second, of layer III, by the header's index
    1: (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    2: (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
MP3_RATES = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}  # by version bits
MP3_HEAD = re.compile(rb"\xff[\xe2\xe3\xf2\xf3\xfa\xfb][\x10-\xef]")  # rejects nearly all that is no frame
MP3_SLACK_FRAMES = 6  # of an encoder's delay and padding, and of a tag: they hold no sound


def check_mp3_length(data: bytes, samples: int, declared: int, rate: int) -> None:
    """Compare the decoded samples with all frames of an MP3, also those after a tag. Raises AudioError.

    libsndfile guesses the length of a file that declares none: from too few frames if its bit rate varies, and decoding
    then stops there; else a little too long at 22,050 and 44,100 Hz, and then each frame counts, because only a tag
    declares what an encoder has added. The first of joined files may declare its own length alone.
    """
    total_sec = longest_sec = 0.0  # seconds
    for seconds in _mp3_frames(data):
        total_sec, longest_sec = total_sec + seconds, max(longest_sec, seconds)
    if not total_sec:
        raise AudioError("MP3 without a frame of layer III; convert it to WAV or FLAC")
    decoded_sec = samples / rate
    if samples < declared and total_sec - decoded_sec > longest_sec / 2:
        raise AudioError(f"cut off: {samples} of {declared} samples decode")
    if total_sec - decoded_sec > MP3_SLACK_FRAMES * longest_sec:
        raise AudioError(f"MP3 without declared length: {decoded_sec:.2f} s of {total_sec:.2f} s decode; re-encode it")


def _mp3_frames(data: bytes) -> Iterator[float]:
    """Yield the duration of each frame in seconds."""
    position = 0
    while position < len(data):
        if frame := _mp3_frame(data, position):
            position += frame[0]
            yield frame[1]
        else:
            position = _next_mp3_frame(data, position)


def _mp3_frame(data: bytes, position: int) -> tuple[int, float] | None:
    """Return the size in bytes and the duration in seconds of the frame that begins here, None if there is none."""
    head = int.from_bytes(data[position : position + 4], "big")
    rates, bit_rate, rate = MP3_RATES.get(head >> 19 & 3), head >> 12 & 15, head >> 10 & 3
    if head >> 21 != 2047 or head >> 17 & 3 != 1 or not rates or bit_rate in (0, 15) or rate == 3:
        return None
    version = 1 if head >> 19 & 3 == 3 else 2
    length = 1152 // version
    size = length // 8 * MP3_KBITS[version][bit_rate - 1] * 1000 // rates[rate] + (head >> 9 & 1)
    return size, length / rates[rate]


def _next_mp3_frame(data: bytes, position: int) -> int:
    """Return where the next frame begins, after tags and whatever else is no frame, or the end."""
    position = skip_tags(data, position)
    while match := MP3_HEAD.search(data, position):
        frame = _mp3_frame(data, match.start())
        if frame and _mp3_frame(data, match.start() + frame[0]):  # a single match may be four bytes of a picture
            return match.start()
        position = match.start() + 1
    return len(data)
