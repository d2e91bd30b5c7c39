"""What the header of a FLAC says. Section numbers are those of RFC 9639."""

import hashlib
import struct

from sharding.errors import AudioError

HEADER_BYTES = 42  # "fLaC", the head of a block, STREAMINFO
STREAMINFO_BYTES, SEEK_POINT_BYTES = 34, 18
LAST = 128  # the bit of a block's kind that says no other follows (8.1)
PADDING, SEEK_POINTS, TAGS = 1, 3, 4  # kinds of blocks
PLAIN = 16_000 << 8 | 0 << 5 | 15  # as STREAMINFO packs it: 20 bits of rate, 3 of channels - 1, 5 of bits - 1 (8.2)


def samples_of_plain(data: bytes) -> int | None:
    """How many samples a plain FLAC, 16-bit mono at 16 kHz, says it has, by its first HEADER_BYTES; else None.

    Most clips are that, and libsndfile takes ten times as long to find out.
    """
    if len(data) < HEADER_BYTES or data[:5] not in (b"fLaC\x00", b"fLaC\x80"):
        return None
    form, samples = divmod(int.from_bytes(data[18:26], "big"), 2**36)
    return samples if form == PLAIN else None


def has_usual_blocks(data: bytes) -> bool:
    """Whether between STREAMINFO and the frames stand padding, seek points and tags alone, well formed (8.3 to 8.6).

    libFLAC passes over such blocks, whatever is in them; libsndfile does not take a clip with damaged ones.
    """
    position, last = HEADER_BYTES, data[4] >= LAST
    if int.from_bytes(data[5:8], "big") != STREAMINFO_BYTES:
        return False
    while not last and position < len(data):
        kind, length = data[position], int.from_bytes(data[position + 1 : position + 4], "big")
        last = kind >= LAST
        block = data[position + 4 : position + 4 + length]
        position += 4 + length
        if not _is_well_formed(kind % LAST, block):
            return False
    return data[position : position + 2] in (b"\xff\xf8", b"\xff\xf9")  # a frame begins (9.1)


def _is_well_formed(kind: int, block: bytes) -> bool:
    if kind == TAGS:  # a vendor, a number, so many tags: each text with its length before it
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
    """Hold samples, packed as they were encoded, against the MD5 in the header, where the encoder left one (8.2).

    libsndfile checks each frame, but not this: a damaged header could shorten the clip unseen. Raises AudioError.
    """
    promised = data[26:42]
    if not data.startswith(b"fLaC") or promised == bytes(16):
        return
    seen = hashlib.md5(pcm, usedforsecurity=False).digest()
    if seen != promised:
        raise AudioError(f"damaged: md5 of the samples is {seen.hex()}, the FLAC header says {promised.hex()}")
