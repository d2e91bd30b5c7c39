"""Prove that a file of audio is whole and one recording, by what its container says. Bytes only: nothing is decoded.

libsndfile reads a file that was cut off to the end that it finds, and of several joined ones the first, or the headers
of all others as sound.
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
    *(".w64", ".sph", ".m4a", ".aac", ".wma", ".amr", ".webm", ".mp4"),  # from .m4a on, libsndfile does not read them
)
PROVED_ELSEWHERE = ("FLAC", "MP3", "HTK")  # by their frames or their MD5; the last by libsndfile
UNKNOWN_BYTES = 0x7F00_0000  # what writers to a pipe put for a length, or more: SoX has this in AIFF, others 2³² − 1
SPHERE_FIELD = re.compile(rb"^(sample_count|sample_n_bytes|channel_count) -(?:i|s1) (\d{1,18})\b", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Chunks:
    """How the chunks of a container are written: name, size, body."""

    first: int  # byte at which they begin
    sound: bytes  # how the name of the one with the samples begins
    order: Literal["little", "big"]
    name_bytes: int = 4
    size_bytes: int = 4
    align: int = 2
    counts_head: bool = False  # whether a size includes name and size


READ_TO_THE_END = (b"riff", b"NIST")  # by libsndfile, whatever their headers say: Wave64 and SPHERE
TAIL_TAGS = (b"TAG", b"ID3", b"APETAGEX", b"LYRICSBEGIN")
HEADS = tuple(  # 48 bits and more, so that 10¹² bytes of compressed sound hold none by chance
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
UNKNOWN_LENGTH = "header without a length: taken to be whole"
TRAILING_DATA = "more behind the end that the header tells: left out"

CHUNKED = {  # by how a file begins
    b"RIFF": Chunks(12, b"data", "little"),  # WAV
    b"RIFX": Chunks(12, b"data", "big"),
    b"RF64": Chunks(12, b"data", "little"),  # EBU Tech 3306
    b"riff": Chunks(40, b"data", "little", name_bytes=16, size_bytes=8, align=8, counts_head=True),  # Sony Wave64
    b"FORM": Chunks(12, b"SSND", "big"),  # AIFF, AIFF-C
    b"caff": Chunks(8, b"data", "big", size_bytes=8, align=1),
}
SIZED = (*CHUNKED, b".snd", b"dns.", b"NIST")


def check_whole(data: bytes, container: str) -> tuple[str, ...]:
    """Return what the owner of a file may want to know of its end.

    A file that was written to a pipe does not tell its length, and is taken to be whole. The data begin behind their
    tags. Raises AudioError for a file that is cut off or several in one, or whose `container` never tells.
    """
    remarks: tuple[str, ...] = ()
    if data.startswith(b"OggS"):
        end = _check_ogg(data)
    elif container in PROVED_ELSEWHERE:
        end = flac.end_of_blocks(data) if container == "FLAC" else 1  # its blocks may hold the header of a WAV
    else:
        told = _end_of_sound(data)
        if told is None:
            raise AudioError(f"{container} file: nothing in it tells whether it is whole; convert it to WAV or FLAC")
        if len(data) < told < UNKNOWN_BYTES:
            raise AudioError(f"cut off: {told - len(data)} bytes are missing at the end")
        end = told if told < UNKNOWN_BYTES else 1
        if told >= UNKNOWN_BYTES:
            remarks = (UNKNOWN_LENGTH,)
        elif _is_odd(data, end):
            remarks = (TRAILING_DATA,)
    if joined := [found.start() for head in HEADS if (found := head.search(data, end))]:
        raise AudioError(f"several recordings in one file: another begins at byte {min(joined)}; split it")
    return remarks


def check_sizes(data: bytes) -> None:
    """Raise AudioError if the sizes in a header tell what is wrong with a file; libsndfile may say less."""
    if _end_of_sound(data) is not None:
        check_whole(data, "")


def cut_tail(data: bytes) -> bytes:
    """Return a file without what stands behind its samples, if libsndfile would take that for sound."""
    return data[: _end_of_sound(data)] if data[:4] in READ_TO_THE_END else data


def skip_tags(data: bytes, start: int = 0) -> int:
    """Return where the ID3v2 tags end that begin at `start`; one may follow another (ID3v2.4 §3.1)."""
    while data[start : start + 3] == b"ID3" and start + 10 <= len(data):
        size = sum(byte << 7 * place for place, byte in enumerate(reversed(data[start + 6 : start + 10])))
        start += 10 + size + (10 if data[start + 5] & 16 else 0)  # with a footer
    return start


def _end_of_sound(data: bytes) -> int | None:
    """Return the byte at which the samples should end, by the header; None if it does not tell."""
    if data[:4] in CHUNKED:
        return _end_of_chunk(data, CHUNKED[data[:4]])
    if data[:4] in (b".snd", b"dns."):  # Sun's AU: where the samples begin, and how long they are
        order: Literal["little", "big"] = "big" if data[:4] == b".snd" else "little"
        return sum(int.from_bytes(data[at : at + 4], order) for at in (4, 8))
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
            return UNKNOWN_BYTES  # of a writer that was to come back to it
        if name.startswith(chunks.sound):
            return body + long_size if long_size and end - body == 2**32 - 1 else end
    return None


def _walk(data: bytes, chunks: Chunks, position: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield the name of each chunk, and where its body begins and ends, if the file goes so far."""
    head = chunks.name_bytes + chunks.size_bytes
    while position + head <= len(data):
        name = data[position : position + chunks.name_bytes]
        size = int.from_bytes(data[position + chunks.name_bytes : position + head], chunks.order)
        body = position + head
        end = max(body, position + size) if chunks.counts_head else body + size
        yield name, body, end
        position = end + -end % chunks.align


def _is_odd(data: bytes, end: int) -> bool:
    """Whether behind the samples stands anything but other chunks, zeros or a tag, such as the rest of a recording.

    The header of a recorder that stopped for want of power may tell an earlier end.
    """
    chunks = CHUNKED.get(data[:4])
    if chunks:
        for name, _, end_of_chunk in _walk(data, chunks, end + -end % chunks.align):
            is_name = name[:4].isascii() and name[:4].decode().isprintable() and not name.startswith(chunks.sound)
            if not is_name or end_of_chunk > len(data):
                break
            end = end_of_chunk
    tail = data[end:].strip(b"\0")
    return bool(tail) and not tail.startswith(TAIL_TAGS)


# --- Ogg (RFC 3533) ---------------------------------------------------------------------------------------------

BEGINS, ENDS = 2, 4  # flags of a page
MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def _check_ogg(data: bytes) -> int:
    """Hold each page against its checksum and the page before, and the last one of each stream against its mark.

    Returns where the pages end.
    """
    end = 0
    streams: dict[bytes, tuple[int, bool]] = {}  # serial → number and end mark of the page before
    sound_began = False
    for position, page in _ogg_pages(data):
        flags, serial, number = page[5], page[14:18], int.from_bytes(page[18:22], "little")
        if flags & BEGINS and sound_began:
            raise AudioError("several recordings joined in one Ogg file; split it, or encode it anew")
        sound_began = not flags & BEGINS
        before = streams.get(serial, (number - 1, False))[0]
        if number != before + 1:
            raise AudioError(f"damaged: Ogg page {before + 1} is missing before byte {position}")
        if _ogg_checksum(page) != page[22:26]:
            raise AudioError(f"damaged: the checksum of the Ogg page at byte {position} is another")
        streams[serial], end = (number, bool(flags & ENDS)), position + len(page)
    if not all(ended for _, ended in streams.values()):
        raise AudioError("cut off: the last Ogg page has no end-of-stream mark")
    return end


def _ogg_pages(data: bytes) -> Iterator[tuple[int, bytes]]:
    position = 0
    while data[position : position + 4] == b"OggS" and position + 27 <= len(data):
        lacing = position + 27 + data[position + 26]  # where the table of the page's parts ends
        end = lacing + sum(data[position + 27 : lacing])
        if max(lacing, end) > len(data):
            raise AudioError(f"cut off: {end - len(data)} bytes of the last Ogg page are missing")
        yield position, data[position:end]
        position = end
    if b"OggS" in data[position:]:
        raise AudioError(f"damaged: there is no Ogg page at byte {position}")


def _ogg_checksum(page: bytes) -> bytes:
    """CRC of polynomial 04c11db7 from zero, highest bit first: zlib's of mirrored bytes, without its inversions."""
    crc = zlib.crc32((page[:22] + bytes(4) + page[26:]).translate(MIRRORED), 2**32 - 1) ^ (2**32 - 1)
    return crc.to_bytes(4, "big").translate(MIRRORED)


# --- MP3 (ISO 11172-3 and 13818-3) ------------------------------------------------------------------------------

MP3_KBITS = {  # per second, of layer III, by the header's index
    1: (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    2: (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
MP3_RATES = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}  # by version bits
MP3_HEAD = re.compile(rb"\xff[\xe2\xe3\xf2\xf3\xfa\xfb][\x10-\xef]")  # as nearly all that is no frame does not begin
MP3_SLACK_FRAMES = 6  # of a coder's delay and padding, and of a tag: they hold no sound


def check_mp3_length(data: bytes, samples: int, told: int, rate: int) -> None:
    """Hold the samples that were decoded against all frames of an MP3, also those behind a tag. Raises AudioError.

    A file that does not say its length has it guessed by libsndfile: from too few frames if its bit rate varies, where
    decoding then stops; else a little too long at 22,050 and 44,100 Hz, and then each frame counts, for nothing but a
    tag tells what a coder has added. Of joined files the first may say a length for itself.
    """
    hold = longest = 0.0  # seconds
    for seconds in _mp3_frames(data):
        hold, longest = hold + seconds, max(longest, seconds)
    if not hold:
        raise AudioError("MP3 without a frame of layer III; convert it to WAV or FLAC")
    have = samples / rate
    if samples < told and hold - have > longest / 2:
        raise AudioError(f"cut off: {samples} of {told} samples decode")
    if hold - have > MP3_SLACK_FRAMES * longest:
        raise AudioError(f"MP3 that does not say its length: {have:.2f} s of {hold:.2f} s decode; encode it anew")


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
    """The size of the frame that begins here, in bytes, and its duration in seconds."""
    head = int.from_bytes(data[position : position + 4], "big")
    rates, bit_rate, rate = MP3_RATES.get(head >> 19 & 3), head >> 12 & 15, head >> 10 & 3
    if head >> 21 != 2047 or head >> 17 & 3 != 1 or not rates or bit_rate in (0, 15) or rate == 3:
        return None
    version = 1 if head >> 19 & 3 == 3 else 2
    length = 1152 // version
    size = length // 8 * MP3_KBITS[version][bit_rate - 1] * 1000 // rates[rate] + (head >> 9 & 1)
    return size, length / rates[rate]


def _next_mp3_frame(data: bytes, position: int) -> int:
    """Return where frames go on behind tags and whatever else is no frame, or the end."""
    position = skip_tags(data, position)
    while found := MP3_HEAD.search(data, position):
        frame = _mp3_frame(data, found.start())
        if frame and _mp3_frame(data, found.start() + frame[0]):  # one alone may be four bytes of a picture
            return found.start()
        position = found.start() + 1
    return len(data)
