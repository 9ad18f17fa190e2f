"""Source files: what they are, how they are cut into parts, their checksums.

A plain text file is cut at multiples of the shard size, moved to the next line end; one part is
one shard. A compressed file is one part, read as a stream that is cut the same way. A Parquet file
is cut into runs of row groups. Cuts depend on the files and the configuration alone, never on the
number of workers.
"""

import csv
import hashlib
import mmap
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt

from dqrm.data.config import BLOCK_BYTES, PrepareConfig
from dqrm.kernels.keys import hash_strings
from dqrm.kernels.plan import MAX_LINE_BYTES

U64 = npt.NDArray[np.uint64]

CHECKSUM = "xxh64-blocks"
"""XXH64 (seed 0) of every 64 KiB block of the file; SHA-256 of those, little-endian, one after
the other. Blocks can be hashed apart, at 13 GiB/s a core where SHA-256 alone does 1.7 (measured
2026-11, Xeon with SHA extensions), and find a changed file as surely."""

_GZIP, _ZSTD, _PARQUET = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1"
_UTF8_MARK, _UTF16_MARKS = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")
_MIB = 1024 * 1024


@dataclass(frozen=True)
class Source:
    """One source file. Positions count bytes of the (uncompressed) text."""

    path: Path
    compression: Literal["gzip", "zstd"] | None
    bytes: int
    """Size on disk."""
    modified: int
    """Nanoseconds since the epoch."""
    columns: tuple[str, ...] = ()
    """Columns of a text file, in its order."""
    first_byte: int = 0
    """Where the rows begin: after a byte order mark and a header."""
    header_lines: int = 0
    """Lines before the rows."""
    is_parquet: bool = False


@dataclass(frozen=True)
class Part:
    """What one task reads: bytes [start, stop) of a text file, or row groups of a Parquet file."""

    file: int
    part: int
    start: int
    stop: int


def open_source(path: Path, config: PrepareConfig) -> Source:
    """Look at the beginning of a file.

    Raises:
        ValueError: it is missing, empty, of another format than configured, or lacks a column.
    """
    try:
        status = path.stat()
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    if not magic:
        raise ValueError(f"{path}: empty file; leave it out or copy it again")
    if (magic == _PARQUET) != (config.format == "parquet"):
        what = "is" if magic == _PARQUET else "is not"
        raise ValueError(f"{path}: {what} a Parquet file, but format is {config.format}")
    if config.format == "parquet":
        names = tuple(_parquet_file(path).schema_arrow.names)
        config.schema_.require_columns(names, str(path))
        return Source(path, None, status.st_size, status.st_mtime_ns, names, is_parquet=True)
    compression: Literal["gzip", "zstd"] | None = None
    if magic.startswith(_GZIP):
        compression = "gzip"
    elif magic == _ZSTD:
        compression = "zstd"
    source = Source(path, compression, status.st_size, status.st_mtime_ns)
    return _with_columns(source, config)


def _with_columns(source: Source, config: PrepareConfig) -> Source:
    path = source.path
    line = _first_line(source)
    mark = len(_UTF8_MARK) if line.startswith(_UTF8_MARK) else 0
    if line.startswith(_UTF16_MARKS):
        raise ValueError(f"{path}: UTF-16 text; convert it to UTF-8")
    if not config.has_header:
        columns = config.columns or config.schema_.names
        return _replace(source, columns, mark, 0)
    try:
        text = line[mark:].decode().rstrip("\r\n")
    except UnicodeDecodeError:
        raise ValueError(f"{path}:1: the header is not UTF-8 text") from None
    quote = config.field_quote
    quoting: dict[str, Any] = {"quotechar": quote} if quote else {"quoting": csv.QUOTE_NONE}
    try:
        names = next(csv.reader([text], delimiter=config.field_delimiter, **quoting), [])
    except csv.Error as error:
        raise ValueError(f"{path}:1: the header cannot be read ({error})") from None
    config.schema_.require_columns(names, f"{path}:1")
    for name in config.schema_.names:
        if names.count(name) > 1:
            raise ValueError(f"{path}:1: column {name!r} appears {names.count(name)} times")
    return _replace(source, tuple(names), len(line), 1)


def _replace(source: Source, columns: tuple[str, ...], first_byte: int, lines: int) -> Source:
    return Source(
        source.path, source.compression, source.bytes, source.modified, columns, first_byte, lines
    )


def _first_line(source: Source) -> bytes:
    """The first line with its line end, at most MAX_LINE_BYTES."""
    with source.path.open("rb") as file:
        if source.compression is None:
            return file.readline(MAX_LINE_BYTES)
        text = b""
        for chunk, _ in decompress(file, source):
            text += chunk
            end = text.find(b"\n")
            if end >= 0:
                return text[: end + 1]
            if len(text) > MAX_LINE_BYTES:
                break
        return text


def plan_parts(index: int, source: Source, config: PrepareConfig) -> list[Part]:
    """The parts of a source, in order."""
    if source.is_parquet:
        return _parquet_parts(index, source, config.shard_rows)
    if source.compression is not None:
        return [Part(index, 0, source.first_byte, source.bytes)]
    starts = range(0, source.bytes, config.shard_bytes)
    return [
        Part(index, i, start, min(start + config.shard_bytes, source.bytes))
        for i, start in enumerate(starts)
    ]


def _parquet_parts(index: int, source: Source, shard_rows: int) -> list[Part]:
    """Runs of row groups with at least `shard_rows` rows each, the last one apart."""
    metadata = _parquet_file(source.path).metadata
    parts: list[Part] = []
    start = rows = 0
    for group in range(metadata.num_row_groups):
        rows += metadata.row_group(group).num_rows
        if rows >= shard_rows or group == metadata.num_row_groups - 1:
            parts.append(Part(index, len(parts), start, group + 1))
            start, rows = group + 1, 0
    return parts


def _parquet_file(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: not a readable Parquet file ({error})") from None


@dataclass(frozen=True)
class TextPart:
    """The mapped lines of one part of a plain text file."""

    mapped: mmap.mmap
    start: int
    stop: int
    blocks: U64
    """Hashes of the blocks that begin in the part."""

    def close(self) -> None:
        """Let go of the file."""
        self.mapped.close()

    def lines(self) -> memoryview:
        """The whole lines that begin in the part; release it before close."""
        return memoryview(self.mapped)[self.start : self.stop]


def map_text(source: Source, part: Part) -> TextPart:
    """Map a part of a plain text file: the lines whose first byte lies in [start, stop).

    Raises:
        ValueError: a line is longer than 16 MiB, or the file has changed.
    """
    with source.path.open("rb") as file:
        # One byte before the part tells whether a line begins with the part.
        offset = max(part.start - mmap.ALLOCATIONGRANULARITY, 0)
        length = min(part.stop + MAX_LINE_BYTES + 1, source.bytes) - offset
        try:
            mapped = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ, offset=offset)
        except ValueError:
            raise ValueError(f"{source.path}: changed while it was read; start again") from None
    first = max(part.start, source.first_byte) - offset
    if part.start > source.first_byte:
        first = _after_line_end(mapped, part.start - offset, source, offset)
    last = part.stop - offset
    if part.stop < source.bytes:
        last = _after_line_end(mapped, max(last, source.first_byte - offset), source, offset)
    begin = part.start - offset
    with memoryview(mapped) as view, view[begin : part.stop - offset] as nominal:
        blocks = hash_blocks(nominal)
    return TextPart(mapped, first, max(first, last), blocks)


def _after_line_end(mapped: mmap.mmap, at: int, source: Source, offset: int) -> int:
    """First line start at or after `at`, given that `at` is not the first byte of the text."""
    end = mapped.find(b"\n", at - 1, at + MAX_LINE_BYTES)
    if end >= 0:
        return end + 1
    if len(mapped) - at < MAX_LINE_BYTES:
        return len(mapped)
    raise ValueError(
        f"{source.path}: no line end in {MAX_LINE_BYTES // _MIB} MiB after byte {offset + at}; "
        "is it text?"
    )


def read_compressed(source: Source, shard_bytes: int) -> Iterator[tuple[bytes, U64, int]]:
    """Whole lines of a compressed file, about `shard_bytes` at a time.

    Yields (text, hashes of the compressed blocks read for it, number of compressed bytes read for
    it); at least once. Memory: twice shard_bytes.

    Raises:
        ValueError: the file is damaged or ends early, or a line is longer than 16 MiB.
    """
    pending: list[bytes] = []
    pending_bytes = 0
    skip = source.first_byte
    blocks: list[U64] = []
    compressed_bytes = 0
    with source.path.open("rb") as file:
        for chunk, block in decompress(file, source):
            if len(block):
                blocks.append(hash_blocks(block))
                compressed_bytes += len(block)
            text = chunk[skip:] if skip else chunk
            skip = max(skip - len(chunk), 0)
            pending.append(text)
            pending_bytes += len(text)
            if pending_bytes < shard_bytes or b"\n" not in text:
                if pending_bytes > shard_bytes + MAX_LINE_BYTES:
                    raise ValueError(
                        f"{source.path}: no line end in {MAX_LINE_BYTES // _MIB} MiB; is it text?"
                    )
                continue
            cut = text.rindex(b"\n") + 1
            pending[-1], rest = text[:cut], text[cut:]
            whole = b"".join(pending)
            pending, pending_bytes = [rest], len(rest)
            yield whole, _joined(blocks), compressed_bytes
            del whole
            blocks, compressed_bytes = [], 0
    yield b"".join(pending), _joined(blocks), compressed_bytes


def _joined(blocks: Sequence[U64]) -> U64:
    return np.concatenate([np.zeros(0, np.uint64), *blocks])


def decompress(file: BinaryIO, source: Source) -> Iterator[tuple[bytes, bytes]]:
    """(text, the compressed block it came from), for each 64 KiB of the file.

    Both formats allow several streams one after the other. A block that ends one stream and
    begins another yields more than once, with an empty block after the first time.
    """
    import zstandard

    def new_stream() -> Any:
        if source.compression == "gzip":
            return zlib.decompressobj(wbits=31)
        return zstandard.ZstdDecompressor().decompressobj()

    stream = new_stream()
    while block := file.read(BLOCK_BYTES):
        data, shown = block, block
        while data:
            if stream.eof:
                # gzip files may be padded with zeros.
                if source.compression == "gzip" and not data.strip(b"\0"):
                    break
                stream = new_stream()
            try:
                text = stream.decompress(data)
            except (zlib.error, zstandard.ZstdError) as error:
                raise ValueError(
                    f"{source.path}: damaged {source.compression} data near byte {file.tell()} "
                    f"({error}); copy the file again"
                ) from None
            data = stream.unused_data if stream.eof else b""
            yield text, shown
            shown = b""
        if shown:
            yield b"", shown
    if not stream.eof:
        raise ValueError(
            f"{source.path}: the {source.compression} data end early, at byte {source.bytes}; "
            "the file is incomplete, copy it again"
        )


def hash_blocks(data: bytes | memoryview) -> U64:
    """XXH64 of each 64 KiB of `data`, the last one shorter."""
    size = len(data)
    offsets = np.append(np.arange(0, size, BLOCK_BYTES, dtype=np.int64), np.int64(size))
    return hash_strings(offsets, data)


def hash_file(path: Path) -> tuple[Path, U64]:
    """The path, and the block hashes of the whole file."""
    with path.open("rb") as file:
        return path, _joined([hash_blocks(data) for data in iter(lambda: file.read(_MIB), b"")])


def checksum(blocks: Sequence[U64]) -> str:
    """Checksum of a file from the hashes of its blocks, in order."""
    digest = hashlib.sha256()
    for part in blocks:
        digest.update(part.astype("<u8").tobytes())
    return f"{CHECKSUM}:{digest.hexdigest()}"
