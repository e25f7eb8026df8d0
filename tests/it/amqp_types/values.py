"""Messages whose headers have every type of AMQP with its extremes, through
pika, which is given the bytes: `publish URL QUEUE` sends them, each with the
JSON that a handler should see as its body; `compare URL QUEUE` takes them all
and says which headers are not the bytes that were sent.
"""

import json
import random
import struct
import sys

import pika
import pika.data

COUNT = 120
SEED = 7


class Raw:
    """A value as it stands on the wire, and the JSON it should become."""

    def __init__(self, tag, payload, plain):
        self.tag, self.payload, self.plain = tag, payload, plain

    def __eq__(self, other):
        return (self.tag, self.payload) == (other.tag, other.payload)


def fixed(tag, form, value):
    return Raw(tag, struct.pack(">" + form, value), value)


def real(tag, form, value):
    (value,) = struct.unpack(">" + form, struct.pack(">" + form, value))
    if value != value:
        plain = "NaN"
    elif value in (float("inf"), float("-inf")):
        plain = str(value)
    else:
        plain = value
    return Raw(tag, struct.pack(">" + form, value), plain)


def decimal(scale, digits):
    return Raw(b"D", struct.pack(">Bi", scale, digits), float(f"{digits}e-{scale}"))


def text(value):
    encoded = value.encode()
    payload = struct.pack(">I", len(encoded)) + encoded
    return Raw(b"S", payload, value.replace("\0", "\ufffd"))


def octets(value):
    return Raw(b"x", struct.pack(">I", len(value)) + value, "\\x" + value.hex())


def array(items):
    content = b"".join(item.tag + item.payload for item in items)
    plain = [item.plain for item in items]
    return Raw(b"A", struct.pack(">I", len(content)) + content, plain)


def table(entries):
    content = b"".join(
        struct.pack("B", len(name)) + name.encode() + item.tag + item.payload
        for name, item in entries.items()
    )
    plain = {name: item.plain for name, item in entries.items()}
    return Raw(b"F", struct.pack(">I", len(content)) + content, plain)


INTEGERS = [
    (b"b", "b", 8, True),
    (b"B", "B", 8, False),
    (b"s", "h", 16, True),
    (b"u", "H", 16, False),
    (b"I", "i", 32, True),
    (b"i", "I", 32, False),
    (b"l", "q", 64, True),
]


def extremes():
    for tag, form, bits, signed in INTEGERS:
        least = -(1 << bits - 1) if signed else 0
        for value in (least, -1 if signed else 1, 0, least + (1 << bits) - 1):
            yield fixed(tag, form, value)
    for digits in (-150, -7, 0, 7, -(1 << 31), (1 << 31) - 1):
        for scale in (0, 2, 9, 255):
            yield decimal(scale, digits)
    for seconds in (0, 1, -1, 1 << 32, -(1 << 63), (1 << 63) - 1):
        yield fixed(b"T", "q", seconds)
    for tag, form, most in ((b"f", "f", 3.4028234e38), (b"d", "d", sys.float_info.max)):
        # RabbitMQ itself cannot read what is no number, and ends the connection.
        for value in (0.1, -1.5, most, -most, 1e-45, -0.0):
            yield real(tag, form, value)
    yield Raw(b"V", b"", None)
    yield Raw(b"t", b"\0", False)
    yield Raw(b"t", b"\1", True)
    for value in ("", "a\0b", "größe \U0001F600", "x" * 5000):
        yield text(value)
    yield octets(b"")
    yield octets(bytes(range(256)))
    yield array([])
    yield table({})


def drawn(draw, depth=0):
    kind = draw.randrange(9 if depth < 4 else 7)
    if kind == 0:
        tag, form, bits, signed = draw.choice(INTEGERS)
        value = draw.getrandbits(bits)
        return fixed(tag, form, value - (1 << bits - 1) if signed else value)
    if kind == 1:
        return decimal(draw.getrandbits(8), draw.getrandbits(32) - (1 << 31))
    if kind == 2:
        return fixed(b"T", "q", draw.getrandbits(64) - (1 << 63))
    if kind == 3:
        return real(b"d", "d", draw.uniform(-1, 1) * 10 ** draw.randrange(-300, 300))
    if kind == 4:
        return real(b"f", "f", draw.uniform(-1, 1))
    if kind == 5:
        return text("".join(chr(draw.randrange(1, 0xD7FF)) for _ in range(draw.randrange(9))))
    if kind == 6:
        return octets(draw.randbytes(draw.randrange(9)))
    items = [drawn(draw, depth + 1) for _ in range(draw.randrange(4))]
    return array(items) if kind == 7 else table({f"n{n}": item for n, item in enumerate(items)})


def messages():
    draw = random.Random(SEED)
    values = list(extremes())
    values += [drawn(draw) for _ in range(COUNT)]
    return {f"m-{n}": value for n, value in enumerate(values)}


encode = pika.data.encode_value


def encode_value(pieces, value):
    if not isinstance(value, Raw):
        return encode(pieces, value)
    pieces.append(value.tag + value.payload)
    return 1 + len(value.payload)


def length_of(tag, encoded, at):
    lengths = {b"V": 0, b"t": 1, b"b": 1, b"B": 1, b"s": 2, b"u": 2, b"I": 4, b"i": 4,
               b"f": 4, b"D": 5, b"l": 8, b"d": 8, b"T": 8}
    if tag in lengths:
        return lengths[tag]
    return 4 + struct.unpack_from(">I", encoded, at)[0]


def decode_value(encoded, at):
    tag = encoded[at:at + 1]
    length = length_of(tag, encoded, at + 1)
    return Raw(tag, encoded[at + 1:at + 1 + length], None), at + 1 + length


def publish(channel, queue):
    channel.confirm_delivery()
    for name, value in messages().items():
        properties = pika.BasicProperties(
            delivery_mode=2, message_id=name, headers={"v": value}
        )
        body = json.dumps({"v": value.plain}, allow_nan=False).encode()
        channel.basic_publish("", queue, body, properties, mandatory=True)
    print(len(messages()))


def compare(channel, queue):
    sent = messages()
    for _ in range(len(sent)):
        method, properties, _ = channel.basic_get(queue, auto_ack=True)
        assert method, f"these are not there: {sorted(sent)}"
        expected = sent.pop(properties.message_id)
        got = properties.headers["v"]
        # A table is a set of entries: their order is nobody's.
        same = got == expected or (
            got.tag == expected.tag and sorted(got.payload) == sorted(expected.payload)
        )
        assert same, (
            properties.message_id, expected.tag, expected.payload, got.tag, got.payload
        )
    print("alike")


connection = pika.BlockingConnection(pika.URLParameters(sys.argv[2]))
# What both sides say of themselves when they connect is read by pika.
pika.data.encode_value = encode_value
pika.data.decode_value = decode_value
{"publish": publish, "compare": compare}[sys.argv[1]](connection.channel(), sys.argv[3])
connection.close()
