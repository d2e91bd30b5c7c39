"""Read the header of a FLAC. Section numbers are those of RFC 9639."""

import hashlib
import struct
from collections.abc import Iterator

from sharding.errors import AudioError

HEADER_BYTES = 42  # "fLaC", the head of a block, STREAMINFO
STREAMINFO_BYTES, SEEK_POINT_BYTES = 34, 18
LAST = 128  # the bit of a block's kind that marks the last block (8.1)
PADDING, SEEK_POINTS, TAGS = 1, 3, 4  # kinds of blocks
PLAIN = 16_000 << 8 | 0 << 5 | 15  # as STREAMINFO packs it: 20 bits of rate, 3 of channels - 1, 5 of bits - 1 (8.2)


def samples_of_plain(data: bytes) -> int | None:
    """Return the samples that the first HEADER_BYTES of a plain FLAC, 16-bit mono at 16 kHz, declare; else None.

    Most clips are plain FLAC, and libsndfile takes ten times as long to find out.
    """
    if len(data) < HEADER_BYTES or data[:5] not in (b"fLaC\x00", b"fLaC\x80"):
        return None
    sample_format, samples = divmod(int.from_bytes(data[18:26], "big"), 2**36)
    return samples if sample_format == PLAIN else None


def has_usual_blocks(data: bytes) -> bool:
    """Return whether only padding, seek points and tags, well formed, precede the frames (8.3 to 8.6).

    libFLAC skips such blocks, whatever they contain; libsndfile rejects a clip with damaged ones.
    """
    (_, _, end), *others = _blocks(data)
    if end != HEADER_BYTES:
        return False
    for kind, start, end in others:
        if not _is_well_formed(kind, data[start:end]):
            return False
    return data[end : end + 2] in (b"\xff\xf8", b"\xff\xf9")  # a frame begins (9.1)


def end_of_blocks(data: bytes) -> int:
    """Return where the frames of a FLAC begin, after its blocks of metadata."""
    return max((end for _, _, end in _blocks(data)), default=0)


def _blocks(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield the kind of each block of metadata, and where its content begins and ends (8.1)."""
    position, last = 4, False
    while not last and position + 4 <= len(data):
        kind, start = data[position], position + 4
        last, position = kind >= LAST, start + int.from_bytes(data[position + 1 : start], "big")
        yield kind % LAST, start, position


def _is_well_formed(kind: int, block: bytes) -> bool:
    if kind == TAGS:  # a vendor, the number of tags, the tags: each text follows its length
        try:
            vendor = int.from_bytes(block[:4], "little")
            position = 4 + vendor
            (count,) = struct.unpack_from("<I", block, position)
            position += 4
            for _ in range(count):
                position += 4 + struct.unpack_from("<I", block, position)[0]
        except struct.error:
            return False
        return position == len(block)
    return kind == PADDING or (kind == SEEK_POINTS and len(block) % SEEK_POINT_BYTES == 0)


def check_md5(data: bytes, pcm: bytes) -> None:
    """Compare samples, packed as they were encoded, with the MD5 in the header, if the encoder left one (8.2).

    libsndfile checks each frame, but not this: a damaged header could shorten the clip unnoticed. Raises AudioError.
    """
    declared = data[26:42]
    if not data.startswith(b"fLaC") or declared == bytes(16):
        return
    actual = hashlib.md5(pcm, usedforsecurity=False).digest()
    if actual != declared:
        raise AudioError(f"damaged: md5 of the samples is {actual.hex()}, the FLAC header has {declared.hex()}")
