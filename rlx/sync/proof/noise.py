"""Pictures of noise, the same bytes wherever they are made: every rank writes its own where a folder is not shared."""

from __future__ import annotations

import os
import random
import struct
import tempfile
import zlib
from hashlib import sha256

from rlx.data.images.pixels import image_file
from rlx.rollout.images import ImageStore


def write_noise(store: ImageStore, down: int, across: int, seed: int) -> str:
    """Write a picture of ``down`` by ``across`` merged patches as an image of the store; its key."""
    side = store.vision.patch * store.vision.merge
    content = noise_png(across * side, down * side, seed)
    key = sha256(content).hexdigest()
    file = image_file(store.folder, key)
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as part:
            part.write(content)
        os.chmod(part.name, 0o644)
        os.replace(part.name, file)  # others may be reading it, or writing the same
    return key


def noise_png(width: int, height: int, seed: int) -> bytes:
    """A PNG in RGB. Nothing is compressed, for compressors differ in what they write."""
    draw = random.Random(seed)
    rows = b"".join(b"\0" + draw.randbytes(3 * width) for _ in range(height))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 0)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
