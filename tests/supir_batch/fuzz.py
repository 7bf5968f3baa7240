"""Reads mutations of sound images, in a process of its own: ``python fuzz.py <folder> <first seed> <last seed>``.

``folder`` holds the sound images. Each seed is one mutation of one of them, the same every time. What must happen is an
image or an ImageError; anything else ends the process, and the file ``folder/current`` tells the seed. A crash or a
blow-up of a native codec thus has a name.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import struct
import sys
import zlib
from pathlib import Path

HEADROOM = 768 * 2**20
"""Bytes of address space that reading one of the small images may take, threads' stacks included."""

SECONDS = 30
"""What one mutation may take."""

_ODD_BYTES = (0, 1, 0x7F, 0x80, 0xFE, 0xFF)
_ODD_NUMBERS = (0, 1, 2, 0x7F, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One to four changes: bytes, numbers, pieces; sometimes the end is cut off. PNG checksums are mended in half."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if not changed:
            break
        # half of all changes go to the first bytes, where most headers are
        at = rng.randrange(min(len(changed), 400) if rng.random() < 0.5 else len(changed))
        kind = rng.randrange(7)
        if kind == 0:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[at] = rng.choice(_ODD_BYTES)
        elif kind == 2:
            changed[at] = rng.randrange(256)
        elif kind == 3:
            number = struct.pack(rng.choice("<>") + "I", rng.choice(_ODD_NUMBERS))
            changed[at : at + 4] = number[: len(changed) - at]
        elif kind == 4:
            number = struct.pack(rng.choice("<>") + "H", rng.choice(_ODD_NUMBERS) & 0xFFFF)
            changed[at : at + 2] = number[: len(changed) - at]
        elif kind == 5:
            del changed[at : at + rng.choice((1, 4, 64))]
        else:
            start = rng.randrange(len(changed))
            changed[at:at] = changed[start : start + rng.choice((1, 4, 64))]
    if rng.random() < 0.1:
        del changed[rng.randrange(len(changed) + 1) :]
    return _mended(changed) if data.startswith(b"\x89PNG") and rng.random() < 0.5 else bytes(changed)


def _mended(png: bytearray) -> bytes:
    """Checksums made right, so that changes reach the code behind them."""
    at = 8
    while at + 12 <= len(png):
        (length,) = struct.unpack_from(">I", png, at)
        if at + 12 + length > len(png):
            break
        struct.pack_into(">I", png, at + 8 + length, zlib.crc32(png[at + 4 : at + 8 + length]))
        at += 12 + length
    return bytes(png)


def main(folder: Path, first: int, last: int) -> None:
    """Read the mutations ``first`` to ``last`` - 1; prints how many were images and how many were refused."""
    from supir_batch import metadata, probe, readers
    from supir_batch.errors import ImageError

    sound = sorted(path for path in folder.iterdir() if path.suffix == ".sound")
    originals = [path.read_bytes() for path in sound]
    victim, current = folder / "mutation", os.open(folder / "current", os.O_WRONLY | os.O_CREAT)
    for path in sound:  # loads every library, so that the limit is on the images alone
        readers.read(path, probe.probe(path))
        metadata.read_metadata(path)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + HEADROOM,) * 2)
    read = refused = 0
    for seed in range(first, last):
        os.pwrite(current, f"{seed:<12}".encode(), 0)
        rng = random.Random(f"{folder.name}:{seed}")
        victim.write_bytes(mutate(rng.choice(originals), rng))
        signal.alarm(SECONDS)
        try:
            readers.read(victim, probe.probe(victim))
            metadata.read_metadata(victim)
            read += 1
        except ImageError:
            refused += 1
        signal.alarm(0)
    print(read, refused)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
