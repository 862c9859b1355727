"""Colour profiles (ICC) made by hand, for tests."""

import struct

ADOBE = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))


def fixed(*values: float) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def icc(tags: dict[str, bytes], *, space: str) -> bytes:
    """A profile of version 2 with these tags."""
    white = b"XYZ \0\0\0\0" + fixed(0.9642, 1, 0.8249)
    text = b"desc\0\0\0\0" + struct.pack(">I", 2) + b"x\0" + bytes(78)
    tags = {"desc": text, "cprt": b"text\0\0\0\0x\0", "wtpt": white, **tags}
    table, body, start = b"", b"", 132 + 12 * len(tags)
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        table += name.encode() + struct.pack(">II", start + len(body), len(data))
        body += data
    head = b"lcms" + struct.pack(">I", 0x02400000) + b"mntr" + space.encode().ljust(4) + b"XYZ "
    head += bytes(12) + b"acsp" + bytes(28) + fixed(0.9642, 1, 0.8249)
    head = struct.pack(">I", start + len(body)) + head
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def gamma(exponent: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(exponent * 256))


def rgb_profile(curve: bytes) -> bytes:
    columns = {f"{n}XYZ": b"XYZ \0\0\0\0" + fixed(*c) for n, c in zip("rgb", ADOBE, strict=True)}
    return icc({**columns, **{f"{n}TRC": curve for n in "rgb"}}, space="RGB")


ADOBE_RGB = rgb_profile(gamma(2.19921875))
LINEAR_GREY = icc({"kTRC": gamma(1.0)}, space="GRAY")
CURVES = {
    "gamma": gamma(2.2),
    "linear": b"curv\0\0\0\0" + struct.pack(">I", 0),
    "table": b"curv\0\0\0\0"
    + struct.pack(">I1024H", 1024, *(round(65535 * (i / 1023) ** 1.8) for i in range(1024))),
    "para0": b"para\0\0\0\0\0\0\0\0" + fixed(1.9),
    "para3": b"para\0\0\0\0\0\3\0\0" + fixed(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045),
}
