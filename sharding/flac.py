"""What the header of a FLAC says. Section numbers are those of RFC 9639."""

import hashlib

from sharding.errors import AudioError

HEADER_BYTES = 42  # "fLaC", the head of a block, STREAMINFO
PLAIN = 16_000 << 8 | 0 << 5 | 15  # as STREAMINFO packs it: 20 bits of rate, 3 of channels - 1, 5 of bits - 1 (8.2)


def samples_of_plain(data: bytes) -> int | None:
    """How many samples a plain FLAC, 16-bit mono at 16 kHz, says it has, by its first HEADER_BYTES; else None.

    Most clips are that, and libsndfile takes ten times as long to find out.
    """
    if len(data) < HEADER_BYTES or data[:5] not in (b"fLaC\x00", b"fLaC\x80"):
        return None
    form, samples = divmod(int.from_bytes(data[18:26], "big"), 2**36)
    return samples if form == PLAIN else None


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
