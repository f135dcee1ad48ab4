"""A checkpoint's identity, found in seconds however large it is."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from distprune.checkpoint.headers import read_byte_ranges
from distprune.checkpoint.layout import CONFIG_FILE

SAMPLE_BYTES = 4096


def compute_fingerprint(folder: Path, files: Iterable[Path]) -> str:
    """A sha256 in hex over config.json and each weight file's name, size, header and a sample of each tensor.

    The sample is a tensor's first and last 4 KiB. It catches another configuration, other names, shapes,
    dtypes or sharding, and any change that reaches either end of any tensor, as training, merging and casting
    do. It misses an edit that leaves both ends of a tensor as they were. It is the same on every machine:
    neither absolute paths nor times go in.
    """
    digest = hashlib.sha256()
    _add(digest, (folder / CONFIG_FILE).read_bytes())
    for file in sorted(files):
        _add(digest, file.name.encode())
        _add_weights(digest, file)
    return digest.hexdigest()


def _add_weights(digest: hashlib._Hash, file: Path) -> None:
    header, ranges = read_byte_ranges(file)
    _add(digest, str(file.stat().st_size).encode())
    _add(digest, header)
    with file.open("rb") as stream:
        for begin, end in sorted(ranges.values()):
            for position in (begin, max(begin, end - SAMPLE_BYTES)):
                stream.seek(position)
                _add(digest, stream.read(min(SAMPLE_BYTES, end - position)))


def _add(digest: hashlib._Hash, content: bytes) -> None:
    # The length goes first, so that no two different sequences of fields feed the digest the same bytes.
    digest.update(len(content).to_bytes(8, "little"))
    digest.update(content)
