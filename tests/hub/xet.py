"""Formats of Xet's storage protocol, as far as a server needs them: hashes as text, xorbs, shards, LZ4.

A file is a list of terms, each a range of chunks of a xorb. All numbers are little-endian.
"""
import struct
from typing import NamedTuple

CHUNK = 1 << 17  # most bytes of a chunk, as it is and compressed
_SHARD_TAG = b'HFRepoMetaData\0'
_RECORD = 48
_BOOKEND = b'\xff' * 32
_VERIFICATION, _METADATA = 1 << 31, 1 << 30


class FormatError(ValueError):
    """Bytes that are no xorb or shard."""


def hash_text(raw: bytes) -> str:
    """The text form of a hash of 32 bytes: four numbers of 64 bits, each as 16 hexadecimal digits."""
    return ''.join(f'{value:016x}' for value in struct.unpack('<4Q', raw))


# ---- xorbs: chunks one after the other --------------------------------------------------------------------------


class Chunk(NamedTuple):
    """Where a chunk lies in a xorb, and how long its data are."""
    start: int
    end: int
    kind: int
    size: int


class Xorb(NamedTuple):
    """Chunks as they are sent and stored."""
    body: bytes
    chunks: list[Chunk]

    def data(self, first: int, end: int) -> bytes:
        """What the chunks from ``first`` to before ``end`` hold."""
        return b''.join(self._decode(chunk) for chunk in self.chunks[first:end])

    def _decode(self, chunk: Chunk) -> bytes:
        data = self.body[chunk.start + 8:chunk.end]
        if chunk.kind:
            data = decode_lz4(data)
        if len(data) != chunk.size:
            raise FormatError(f'the chunk at byte {chunk.start} holds {len(data)} bytes, not {chunk.size}')
        return ungroup(data) if chunk.kind == 2 else data


def read_xorb(body: bytes) -> Xorb:
    """Chunks with a header of 8 bytes each, up to the footer that a stored xorb may have."""
    chunks, position = [], 0
    while position < len(body) and body[position:position + 7] != b'XETBLOB':
        header = body[position:position + 8]
        if len(header) < 8 or header[0] != 0 or header[4] > 2:
            raise FormatError(f'no chunk header at byte {position}')
        length, size = (int.from_bytes(header[i:i + 3], 'little') for i in (1, 5))
        end = position + 8 + length
        if not 0 < size <= CHUNK or length > CHUNK or end > len(body):
            raise FormatError(f'the chunk at byte {position} has wrong lengths')
        chunks.append(Chunk(position, end, header[4], size))
        position = end
    return Xorb(body, chunks)


def stored_xorb(data: bytes) -> Xorb:
    """Data as chunks that are not compressed."""
    pieces = [data[i:i + CHUNK // 2] for i in range(0, len(data), CHUNK // 2)]
    lengths = [len(piece).to_bytes(3, 'little') for piece in pieces]
    return read_xorb(b''.join(b'\0' + n + b'\0' + n + piece for n, piece in zip(lengths, pieces)))


def flipped(body: bytes) -> bytes:
    """Chunks with one bit changed in the last one, so that it decodes to as many bytes with another one among them."""
    xorb = read_xorb(body)
    last = len(xorb.chunks) - 1
    right = xorb.data(last, last + 1)
    for place in range(sum(xorb.chunks[last][:2]) // 2, len(body)):
        changed = body[:place] + bytes([body[place] ^ 0x40]) + body[place + 1:]
        try:
            if read_xorb(changed).data(last, last + 1) != right:
                return changed
        except (FormatError, IndexError):  # it was no byte of data
            continue
    raise AssertionError('no byte of the data can be changed')


# ---- LZ4 --------------------------------------------------------------------------------------------------------


def decode_lz4(frame: bytes) -> bytes:
    """The content of an LZ4 frame."""
    if frame[:4] != b'\x04\x22\x4d\x18':
        raise FormatError('no LZ4 frame')
    flags = frame[4]
    position = 7 + (8 if flags & 8 else 0) + (4 if flags & 1 else 0)
    out = bytearray()
    while size := int.from_bytes(frame[position:position + 4], 'little'):
        position += 4
        stored, size = size >> 31, size & 0x7fffffff
        block = frame[position:position + size]
        if stored:
            out += block
        else:
            _decode_block(block, out)
        position += size + (4 if flags & 16 else 0)
    return bytes(out)


def _decode_block(block: bytes, out: bytearray) -> None:
    position = 0

    def length(value: int) -> int:
        nonlocal position
        if value == 15:
            while True:
                more = block[position]
                position += 1
                value += more
                if more != 255:
                    break
        return value

    while True:
        token = block[position]
        position += 1
        literals = length(token >> 4)
        out += block[position:position + literals]
        position += literals
        if position >= len(block):
            return
        offset = block[position] | block[position + 1] << 8
        position += 2
        count = length(token & 15) + 4
        start = len(out) - offset
        if not 0 < offset <= len(out):
            raise FormatError('an LZ4 match before the beginning')
        if offset >= count:
            out += out[start:start + count]
        else:  # the match repeats what it writes
            out += (out[start:] * (count // offset + 1))[:count]


def ungroup(data: bytes) -> bytes:
    """Bytes 0, 4, 8 ... lie first, then bytes 1, 5, 9 ... and so on; put them back."""
    out = bytearray(len(data))
    position = 0
    for k in range(4):
        count = len(range(k, len(data), 4))
        out[k::4] = data[position:position + count]
        position += count
    return bytes(out)


# ---- shards: which chunks make up a file ------------------------------------------------------------------------


class Term(NamedTuple):
    """Chunks of a xorb, from ``first`` to before ``end``; ``size`` bytes of data."""
    xorb: str
    first: int
    end: int
    size: int


class XetFile(NamedTuple):
    hash: str
    terms: list[Term]
    sha256: str


def parse_shard(data: bytes) -> list[XetFile]:
    """The files of a shard; what it says of xorbs is in the xorbs themselves."""
    if not data.startswith(_SHARD_TAG):
        raise FormatError('no shard')
    records = (data[i:i + _RECORD] for i in range(_RECORD, len(data), _RECORD))
    files = []
    for head in records:
        if head[:32] == _BOOKEND:
            return files
        flags, count = struct.unpack_from('<2I', head, 32)
        terms = []
        for row in [next(records) for _ in range(count)]:
            _, size, first, end = struct.unpack_from('<4I', row, 32)
            terms.append(Term(hash_text(row[:32]), first, end, size))
        if flags & _VERIFICATION:
            for _ in range(count):
                next(records)
        if not flags & _METADATA:
            raise FormatError('a file without its SHA-256')
        files.append(XetFile(hash_text(head[:32]), terms, hash_text(next(records)[:32])))
    raise FormatError('a shard without an end')
