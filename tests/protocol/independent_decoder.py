"""A second reader of the wire, from docs/protocol.md alone; tensors: dtype, shape, bits."""
# mypy: ignore-errors
# ruff: noqa: ANN001, ANN201, ANN204

import ctypes
import io
import math
import struct
import zlib

import zstandard

SIZES = {"f4": 4, "f2": 2, "f8": 8, "i8": 8, "i4": 4, "i2": 2, "i1": 1, "u1": 1}
NUMBERS = dict(zip(range(0xCA, 0xD4), "fdBHIQbhiq", strict=True))
LENGTHS = dict(zip(b"\xc4\xc5\xc6\xd9\xda\xdb\xdc\xdd\xde\xdf", "BHIBHIHIHI", strict=True))
CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True} | {tag: tag for tag in range(0x80)}
CONSTANTS |= {tag: tag - 256 for tag in range(0xE0, 0x100)}


def need(condition, what):
    if not condition:
        raise ValueError(what)


def take(stream, form):
    data = stream.read(struct.calcsize(form))
    need(len(data) == struct.calcsize(form), "more bytes")
    return struct.unpack(form, data)[0]


def value(stream, depth=0):
    tag = take(stream, "B")
    if tag in CONSTANTS or tag in NUMBERS:
        return CONSTANTS[tag] if tag in CONSTANTS else take(stream, ">" + NUMBERS[tag])
    need(depth < 8 and (tag < 0xC0 or tag in LENGTHS), "a known type, not too deep")
    length = tag & (31 if tag >= 0xA0 else 15) if tag < 0xC0 else take(stream, ">" + LENGTHS[tag])
    if 0xA0 <= tag < 0xDC:
        data = take(stream, f"{length}s")
        return data if 0xC4 <= tag <= 0xC6 else data.decode()
    if 0x90 <= tag < 0xDE:
        return [value(stream, depth + 1) for _ in range(length)]
    pairs = [(value(stream, depth + 1), value(stream, depth + 1)) for _ in range(length)]
    need(len(dict(pairs)) == length and all(type(k) is str for k, _ in pairs), "keys, each once")
    return dict(pairs)


def read_message(data):
    stream = io.BytesIO(data)
    fields = value(stream)
    need(type(fields) is dict and not stream.read(1), "one map")
    return fields


class Frames:
    def __init__(self, limits):
        self.limits, self.open = limits, {}  # (sender, topic, id): (size, chunks, started)

    def expire(self, now):
        late = [k for k, v in self.open.items() if now - v[2] > self.limits["timeout_s"]]
        return len([self.open.pop(key) for key in late])

    def held(self, keys):
        return sum(self.open[key][0] + len(self.open[key][1]) for key in keys)

    def add(self, sender, topic, frame, now):
        f, limits = read_message(frame), self.limits
        numbers = [f.get(key) for key in ("v", "id", "i", "n", "size", "crc")]
        need(all(type(x) is int and 0 <= x < 2**32 for x in numbers), "u32")
        version, number, i, n, size, crc = numbers
        need(version == 1 and i < n <= 65536 and n - 1 <= size, "version 1, an index in range")
        need(size <= limits["message_bytes"], "a smaller message")
        chunk, length = f.get("d"), -(-size // n)
        need(type(chunk) is bytes and zlib.crc32(chunk) == crc, "an intact chunk")
        need(len(chunk) == max(0, min(length, size - i * length)), "the chunk's length")
        if n == 1:
            return chunk
        key = sender, topic, number
        if key in self.open and (self.open[key][0], len(self.open[key][1])) != (size, n):
            del self.open[key]
        if key not in self.open:
            mine, most = [k for k in self.open if k[0] == sender], limits["sender_bytes"] - size - n
            while mine and (len(mine) >= limits["sender_messages"] or self.held(mine) > most):
                del self.open[mine.pop(0)]
            need(most >= 0 and self.held(self.open) + size + n <= limits["total_bytes"], "room")
        chunks = self.open.setdefault(key, (size, [None] * n, now))[1]
        chunks[i] = chunk if chunks[i] is None else chunks[i]
        return None if None in chunks else b"".join(self.open.pop(key)[1])


def affine(level, scale, offset):
    return ctypes.c_float(ctypes.c_float(level * scale).value + offset).value


def read_tensor(data, keep=None, max_elements=2**26, max_bytes=2**28, max_ndim=8):
    need(len(data) >= 14 and len(data) >= 22 + 4 * data[9], "more bytes")
    magic, version, codec, stage, dtype, flags, top, ndim, crc = struct.unpack("<3s7BI", data[:14])
    need(magic == b"SFT" and version == 2 and codec <= 3 and stage <= 1, "a known format")
    need(dtype < (1 if codec else 8) and ndim <= min(8, max_ndim), "dtype, ndim")
    need(top > 0 and flags <= 2 if codec == 3 else top + flags == 0, "flags, top")
    *dims, values, body_bytes = struct.unpack_from(f"<{ndim + 2}I", data, 14)
    name, elements, taken = list(SIZES)[dtype], math.prod(dims), math.prod(max(1, d) for d in dims)
    need(taken <= max_elements and taken * SIZES[name] <= max_bytes, "less")
    need(values == elements or (values < elements and flags == 2), "values")
    maps = (dims[1] if flags == 1 and ndim > 1 else 1) if codec == 3 else 0
    side, body = data[22 + 4 * ndim :][: 8 * maps], data[22 + 4 * ndim + 8 * maps :]
    need((len(side), len(body)) == (8 * maps, body_bytes), "length")
    need(zlib.crc32(data[14:], zlib.crc32(data[:10])) == crc, "checksum")
    width, widths = 2 if codec else SIZES[name], [w for w in (8, 4, 2, 1) if top.bit_length() & w]
    raw = sum(-(-values * w // 8) for w in widths) if codec == 3 else values * width
    if stage:
        need(body[:4] == b"\x28\xb5\x2f\xfd" and zstandard.frame_content_size(body) == raw, "size")
        body = zstandard.ZstdDecompressor().decompress(body, allow_extra_data=False)
        if codec < 3:  # byte planes
            body = bytes(body[p * values + k] for k in range(values) for p in range(width))
    need(len(body) == raw, "length of the body")
    if codec == 1:
        body, width = struct.pack(f"<{values}f", *struct.unpack(f"<{values}e", body)), 4
    if codec < 3:
        got = [int.from_bytes(body[k : k + width], "little") for k in range(0, len(body), width)]
        return name, dims, [x << 16 for x in got] if codec == 2 else got
    numbers = struct.unpack(f"<{2 * maps}f", side)
    pairs = list(zip(numbers[maps:], numbers[:maps], strict=True))
    sides = [math.copysign(1, s) > 0 and math.isfinite(affine(top, s, o)) for s, o in pairs]
    levels, start, shift, decoded = [0] * values, 0, 0, [0.0] * elements
    o, m, r = (*dims[:2], math.prod(dims[2:])) if ndim > 1 else (1, 1, elements)
    kept = [(n * m + c) * r + k for c in range(m) for n in range(o) for k in range(r)]
    for w in widths:
        for k in range(values):
            levels[k] |= (body[start + k * w // 8] >> k * w % 8 & (1 << w) - 1) << shift
        start, shift = start + -(-values * w // 8), shift + w
    need(all(sides) and max(levels, default=0) <= top, "side data, levels up to top")
    if flags == 2:
        need(keep is not None and (len(keep), keep.count("1")) == (elements, values), "mask")
        need(any(affine(level, *pairs[0]) == 0 for level in range(top + 1)), "a zero")
        kept = [k for k in range(elements) if keep[k] == "1"]
    for k, level in zip(kept, levels, strict=True):
        decoded[k] = affine(level, *pairs[k // r % maps])
    return name, dims, struct.unpack(f"<{elements}I", struct.pack(f"<{elements}f", *decoded))


def read_pack(data, max_elements=2**26, max_bytes=2**28, max_ndim=8):
    stream, state = io.BytesIO(data), {}
    for _ in range(count := take(stream, "<I")):
        name = take(stream, f"{take(stream, '<H')}s").decode()
        tensor = take(stream, f"{min(take(stream, '<Q'), len(data))}s")
        state[name] = read_tensor(tensor, None, max_elements, max_bytes, max_ndim)
        max_elements -= len(state[name][2])
        max_bytes -= len(state[name][2]) * SIZES[state[name][0]]
    need(len(state) == count and not stream.read(1), "every name once, nothing behind")
    return state
