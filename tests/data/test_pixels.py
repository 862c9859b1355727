"""Channels and depths: what a file of any kind becomes, and that nothing is lost on the way."""

import io
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from latentvae.data import (
    DeepImage,
    EvalTransform,
    ImageFolder,
    PixelFormat,
    TarShards,
    TrainTransform,
    UnreadableImage,
    open_source,
    read_image,
    to_tensor,
)
from latentvae.data.resampling import normalised
from latentvae.data.sizes import read_size
from latentvae.data.transforms import Window

GREY, RGB, RGBA = PixelFormat(1), PixelFormat(3), PixelFormat(4)


def png16(values: np.ndarray, *chunks: tuple[bytes, bytes]) -> bytes:
    """A 16-bit PNG (H, W, C) by hand: Pillow writes none with colours."""
    height, width, channels = values.shape

    def chunk(name: bytes, data: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + crc

    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0))
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    extra = b"".join(chunk(*pair) for pair in chunks)
    body = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + extra + body


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def tiff(array: np.ndarray, **options: object) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, array, **options)  # type: ignore[arg-type]
    return file.getvalue()


def saved(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def tensor(data: bytes, pixels: PixelFormat) -> torch.Tensor:
    return to_tensor(read_image(data, pixels=pixels))


def ramp(*shape: int) -> np.ndarray:
    """All of 0..65535 in (256, 256), and other orders of it in more channels."""
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    return values if not shape else np.stack([np.roll(values, 97 * i) for i in range(*shape)], 2)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("form", ["png", "tiff"])
def test_a_16_bit_ramp_comes_back_to_the_step(channels: int, form: str, tmp_path: Path) -> None:
    values = ramp(channels)
    if form == "png":
        data = png16(values)
    else:
        alpha = {"extrasamples": ["unassalpha"]} if channels in (2, 4) else {}
        kind = "minisblack" if channels < 3 else "rgb"
        planar = {"planarconfig": "contig"} if channels > 1 else {}
        data = tiff(values.squeeze(), photometric=kind, **planar, **alpha)
    (tmp_path / f"ramp.{form}").write_bytes(data)
    wanted = 1 if channels == 1 else 3 if channels == 3 else 4
    images = open_source(tmp_path, pixels=PixelFormat(wanted))
    square = EvalTransform(256)(images.read(0))  # its own size: nothing is resampled
    back = ((square.double() + 1) * 32767.5).permute(1, 2, 0).numpy()
    expected = values if channels != 2 else values[..., [0, 0, 0, 1]]
    assert np.abs(back - expected).max() < 0.01
    assert np.array_equal(np.rint(back), expected)


def test_a_float_array_in_hounsfield_units_comes_back(tmp_path: Path) -> None:
    values = np.linspace(-1000, 3000, 64 * 64).reshape(64, 64).astype(np.float32)
    np.save(tmp_path / "ct.npy", values)
    images = ImageFolder(tmp_path, pixels=PixelFormat(1, (-1000, 3000)))
    square = EvalTransform(64)(images.read(0))
    back = (square[0].double().numpy() + 1) * 2000 - 1000
    assert np.abs(back - values).max() < 4000 / 65535 / 2
    assert (square.min(), square.max()) == (-1, 1)


def test_what_lies_outside_the_range_is_clipped() -> None:
    values = np.array([[-3000.0, -1000.0], [1000.0, 9e9]])
    found = tensor(npy(values), PixelFormat(1, (-1000, 3000)))
    assert found.tolist() == [[[-1, -1], [0, 1]]]
    signed = values.clip(-3000, 3000).astype(np.int16)
    for data in (npy(signed), tiff(signed)):
        found = tensor(data, PixelFormat(1, (-1000, 3000)))
        assert found.tolist() == [[[-1, -1], [0, 1]]]
    with pytest.raises(UnreadableImage, match=r"outside 0\.\.65535: value_range"):
        tensor(npy(signed), GREY)


def test_a_stated_range_holds_for_8_bits_too_and_leaves_alpha_alone() -> None:
    data = saved(Image.fromarray(np.array([[[0, 64, 128, 255], [255, 32, 0, 0]]], dtype=np.uint8)))
    found = tensor(data, PixelFormat(4, (0, 128)))
    assert found[:, 0, 0].tolist() == [-1, 0, 1, 1]
    assert found[:, 0, 1].tolist() == [1, -0.5, -1, -1]


@pytest.mark.parametrize("value_range", [None, (0, 255)])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_8_bits_are_the_same_with_and_without_their_own_range(
    channels: int, value_range: tuple[float, float] | None, make_picture
) -> None:
    photo = make_picture(40, 40).convert("RGBA")
    photo.putalpha(make_picture(40, 40, seed=1).convert("L"))
    plain = to_tensor(read_image(saved(photo), pixels=PixelFormat(channels)))
    deep = to_tensor(read_image(saved(photo), pixels=PixelFormat(channels, (0, 255))))
    assert plain.shape == deep.shape == (channels, 40, 40)
    assert (plain - deep).abs().max() <= 2 / 255 + 1e-6  # Pillow rounds what it composites


def test_a_colour_picture_of_8_bits_is_what_it_always_was(make_picture) -> None:
    for data in (saved(make_picture(50, 40)), saved(make_picture(50, 40), "JPEG")):
        old, new = read_image(data, at_least=32), read_image(data, at_least=32, pixels=RGB)
        assert isinstance(new, Image.Image) and new.mode == "RGB"
        assert torch.equal(to_tensor(old), to_tensor(new))


def test_odd_modes_of_8_bits() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putdata([0, 1])
    file = io.BytesIO()
    palette.save(file, "PNG", transparency=bytes([255, 0]))
    found = tensor(file.getvalue(), RGBA)
    assert found[:, 0].T.tolist() == [[1, -1, -1, 1], [-1, -1, 1, -1]]
    assert tensor(file.getvalue(), RGB)[:, 0, 1].tolist() == [1, 1, 1]  # over white
    assert tensor(file.getvalue(), GREY)[0, 0, 1] == 1

    veiled = Image.merge("LA", [Image.new("L", (1, 1), 51), Image.new("L", (1, 1), 0)])
    assert tensor(saved(veiled), RGBA).flatten().tolist() == pytest.approx([-0.6, -0.6, -0.6, -1])
    assert tensor(saved(veiled), GREY).flatten().tolist() == [1]

    bits = Image.fromarray(np.array([[True, False]])).convert("1")
    assert tensor(saved(bits), GREY).flatten().tolist() == [1, -1]
    assert tensor(saved(bits), RGBA)[:, 0, 0].tolist() == [1, 1, 1, 1]
    assert tensor(saved(bits), PixelFormat(1, (0, 255))).flatten().tolist() == [1, -1]

    ink = Image.new("CMYK", (1, 1), (0, 255, 255, 0))
    assert tensor(saved(ink, "TIFF"), RGBA).flatten().tolist() == [1, -1, -1, 1]
    assert tensor(saved(ink, "TIFF"), GREY).item() == pytest.approx(76 / 127.5 - 1)  # red's luma


def test_odd_modes_of_16_bits() -> None:
    values = np.array([[0, 1], [65534, 65535]], dtype=np.uint16)
    big = Image.frombytes("I;16B", (2, 2), values.astype(">u2").tobytes())
    for data in (saved(big, "TIFF"), tiff(values, byteorder=">"), npy(values.astype(">u2"))):
        assert torch.equal((tensor(data, GREY)[0] + 1).mul(32767.5).round().long(),
                           torch.from_numpy(values.astype(np.int64)))  # fmt: skip
    grey = png16(values[..., None])
    assert torch.equal(tensor(grey, RGB), tensor(grey, GREY).expand(3, 2, 2))
    assert (tensor(grey, RGBA)[3] == 1).all()
    keyed = png16(values[..., None], (b"tRNS", struct.pack(">H", 1)))
    assert tensor(keyed, RGBA)[3].tolist() == [[1, -1], [1, 1]]
    assert tensor(keyed, GREY)[0, 0].tolist() == [-1, 1]
    colour = np.array([[[65535, 0, 0], [0, 257, 0]]], dtype=np.uint16)
    assert tensor(png16(colour), GREY)[0, 0, 0] == pytest.approx(2 * 0.299 - 1)
    keyed = png16(colour, (b"tRNS", struct.pack(">HHH", 0, 257, 0)))
    assert tensor(keyed, RGBA)[3, 0].tolist() == [1, -1]


def test_deep_files_are_turned_upright() -> None:
    values = np.arange(6, dtype=np.uint16).reshape(2, 3, 1).repeat(3, axis=2) * 10000
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    turned = png16(values, (b"eXIf", exif.tobytes()[6:]))
    expected = np.rot90(values, -1)[..., 0]
    for data in (
        turned,
        tiff(values, photometric="rgb", extratags=[(0x0112, "H", 1, 6, True)]),
    ):
        found = (tensor(data, RGB)[0] + 1) * 32767.5
        assert np.array_equal(found.round().numpy(), expected)


def test_float_files_need_a_range_but_for_the_old_rule_of_rgb() -> None:
    values = np.array([[0.0, 0.25], [0.5, 1.0]], dtype=np.float32)
    colours = np.stack([values] * 3, axis=2)
    with pytest.raises(UnreadableImage, match="floats: value_range must say"):
        tensor(tiff(values), GREY)
    assert tensor(tiff(values), RGB)[0].tolist() == [[-1, -0.5], [0, 1]]
    assert tensor(tiff(colours, photometric="rgb"), RGB)[0].tolist() == [[-1, -0.5], [0, 1]]
    assert tensor(npy(colours * 255), RGB)[1].tolist() == [[-1, -0.5], [0, 1]]
    assert tensor(tiff(colours, photometric="rgb"), PixelFormat(3, (0, 2)))[0, 1, 1] == 0
    half = npy(np.concatenate([colours, colours[..., :1]], axis=2).astype(np.float16))
    assert tensor(half, PixelFormat(4, (0, 2)))[:, 1, 1].tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize(
    ("array", "pixels", "reason"),
    [
        (np.array([[1.0, np.nan]]), PixelFormat(1, (0, 1)), "float values are not finite"),
        (np.array([[np.inf]]), PixelFormat(1, (0, 1)), "float values are not finite"),
        (np.zeros((4, 4, 3), np.uint8), GREY, r"be \(H, W\) or \(H, W, 1\) \(got \(4, 4, 3\)\)"),
        (np.zeros((3, 8, 8), np.uint8), RGB, r"be \(H, W, 3\) \(got \(3, 8, 8\)\)"),
        (np.zeros((8, 8), np.uint8), RGBA, r"be \(H, W, 4\) \(got \(8, 8\)\)"),
        (np.zeros((0, 8), np.uint8), GREY, "no pixels"),
        (np.zeros((2, 2), complex), GREY, "type complex128"),
        (np.array([["a"]]), GREY, "type <U1, not pixel values"),
    ],
)
@pytest.mark.parametrize("on_disk", [True, False])
def test_arrays_that_are_no_picture(
    array: np.ndarray, pixels: PixelFormat, reason: str, on_disk: bool, tmp_path: Path
) -> None:
    (tmp_path / "a.npy").write_bytes(npy(array))
    with pytest.raises(UnreadableImage, match=reason):
        read_image(tmp_path / "a.npy" if on_disk else npy(array), pixels=pixels)


class Trap:
    def __reduce__(self) -> tuple[type, tuple[str]]:
        return type(self), ()  # type: ignore[return-value]

    def __init__(self) -> None:
        raise AssertionError("something was unpickled")


@pytest.mark.parametrize("on_disk", [True, False])
def test_python_objects_are_never_unpickled(on_disk: bool, tmp_path: Path) -> None:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": "|O", "fortran_order": False, "shape": (2, 2)}
    )
    data = file.getvalue() + pickle.dumps(object.__new__(Trap))
    (tmp_path / "a.npy").write_bytes(data)
    with pytest.raises(UnreadableImage, match=r"(?i)object"):
        read_image(tmp_path / "a.npy" if on_disk else data, pixels=GREY)


@pytest.mark.parametrize("cut", [9, 40, -40])
def test_damaged_deep_files(cut: int, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (16, 16, 3), dtype=np.uint16)
    for data in (png16(values), tiff(values, photometric="rgb"), npy(values)):
        with pytest.raises(UnreadableImage):
            read_image(data[:cut], pixels=RGB)
        (tmp_path / "file").write_bytes(data[:cut])
        with pytest.raises(UnreadableImage):
            read_image(tmp_path / "file", pixels=RGB)


def levels(data: bytes, pixels: PixelFormat) -> np.ndarray:
    """(H, W, C) as 16-bit numbers again."""
    return ((tensor(data, pixels).double() + 1) * 32767.5).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("value_range", [None, (0, 65535)])
def test_planes_of_16_bits(byteorder: str, value_range: tuple[float, float] | None) -> None:
    values = ramp(3)
    planes = np.moveaxis(values, 2, 0)
    data = tiff(planes, photometric="rgb", planarconfig="separate", byteorder=byteorder)
    back = levels(data, PixelFormat(3, value_range))
    assert np.abs(back - values).max() < 0.01
    shown = np.asarray(read_image(data)).astype(int)  # without a format
    assert np.abs(shown - values / 257).max() <= 0.51


def test_planes_of_8_bits_are_read_by_pillow(make_picture) -> None:
    photo = make_picture(32, 24)
    planes = np.moveaxis(np.asarray(photo), 2, 0)
    data = tiff(planes, photometric="rgb", planarconfig="separate")
    found = read_image(data, pixels=RGB)
    assert isinstance(found, Image.Image)
    assert torch.equal(to_tensor(found), to_tensor(photo))


@pytest.mark.parametrize("value_range", [None, (0, 65535)])
def test_a_band_without_a_name_is_left_out_and_the_others_keep_16_bits(
    value_range: tuple[float, float] | None,
) -> None:
    values = ramp(4)
    for data in (
        tiff(values, photometric="rgb", extrasamples=["unspecified"]),
        tiff(
            np.moveaxis(values, 2, 0),
            photometric="rgb",
            planarconfig="separate",
            extrasamples=["unspecified"],
        ),
    ):
        found = levels(data, PixelFormat(3, value_range))
        assert np.abs(found - values[..., :3]).max() < 0.01
        opaque = levels(data, PixelFormat(4, value_range))
        assert np.abs(opaque[..., :3] - values[..., :3]).max() < 0.01
        assert (opaque[..., 3] == 65535).all()
    pair = tiff(values[..., :2], photometric="minisblack", planarconfig="contig", extrasamples=[0])
    assert np.abs(levels(pair, PixelFormat(1, value_range)) - values[..., :1]).max() < 0.01


def test_four_bands_of_which_none_is_named_are_a_bad_image() -> None:
    data = tiff(ramp(4), photometric="minisblack", planarconfig="contig", extrasamples=[0, 0, 0])
    with pytest.raises(UnreadableImage, match="must be RGB or have an alpha channel"):
        read_image(data, pixels=RGB)


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_colours_multiplied_with_their_alpha_are_divided_by_it(dtype: type) -> None:
    alpha = np.array([[1.0, 0.5, 0.25, 0.0]])
    colour = np.array([[[1.0, 0.25, 0.0], [0.5, 1.0, 0.0], [0.125, 0.5, 1.0], [0.7, 0.2, 0.1]]])
    values = np.concatenate([colour * alpha[..., None], alpha[..., None]], axis=2)
    top = 65535 if dtype == np.uint16 else 1
    stored = (values * top).round() if top > 1 else values
    data = tiff(stored.astype(dtype), photometric="rgb", extrasamples=["assocalpha"])
    found = levels(data, PixelFormat(4, (0, top))) / 65535
    assert np.abs(found[..., 3] - alpha).max() < 1e-5
    assert np.abs(found[:, :3, :3] - colour[:, :3]).max() < 5e-5  # steps of 1/65535, by 1/4
    over_white = levels(data, PixelFormat(3, (0, top))) / 65535
    expected = values[..., :3] + 1 - alpha[..., None]
    assert np.abs(over_white[:, :3] - expected[:, :3]).max() < 5e-5
    assert (over_white[0, 3] == 1).all()


def test_white_is_zero_at_every_depth() -> None:
    shades = np.array([[0, 51, 204, 255]], np.uint8)
    expected = 1 - shades / 127.5
    files = [
        (255, tiff(shades, photometric="miniswhite")),
        (65535, tiff(shades.astype(np.uint16) * 257, photometric="miniswhite")),
        (1, tiff((shades / 255).astype(np.float32), photometric="miniswhite")),
        (1, tiff(shades / 255, photometric="miniswhite")),  # float64, which is not for Pillow
    ]
    for top, data in files:
        assert np.abs(tensor(data, RGB)[1].numpy() - expected).max() < 1e-6
        assert np.abs(tensor(data, PixelFormat(1, (0, top)))[0].numpy() - expected).max() < 1e-6
        part = tensor(data, PixelFormat(1, (0, top * 0.8)))[0].numpy()
        assert np.abs(part - [1, 0.5, -1, -1]).max() < 1e-6
        assert np.asarray(read_image(data))[0, :, 0].tolist() == [255, 204, 51, 0]


def test_signed_8_bit_numbers_need_a_range() -> None:
    values = np.array([[-128, 0, 127]], np.int8)
    colours = np.stack([values] * 3, axis=2)
    for data, pixels in (
        (npy(values), GREY),
        (npy(colours), RGB),
        (tiff(values), GREY),
        (tiff(values), RGB),
        (tiff(colours, photometric="rgb"), RGB),
    ):
        with pytest.raises(UnreadableImage, match="signed 8-bit: value_range"):
            read_image(data, pixels=pixels)
        found = levels(data, PixelFormat(pixels.channels, (-128, 127)))[0, :, 0] / 257
        assert np.abs(found - [0, 128, 255]).max() < 1e-4
    with pytest.raises(UnreadableImage, match="signed 8-bit"):
        read_image(tiff(values))


@pytest.mark.parametrize("on_disk", [True, False])
def test_bombs_are_refused_before_they_are_decoded(on_disk: bool, tmp_path: Path) -> None:
    """Files of a few bytes that claim 10 GB; the sentence is Pillow's."""
    header = io.BytesIO()
    shape = {"descr": "<f4", "fortran_order": False, "shape": (50_000, 50_000)}
    np.lib.format.write_array_header_1_0(header, shape)
    page = tiff(np.zeros((8, 8, 3), np.float32), photometric="rgb")  # not for Pillow
    for tag in (256, 257):  # width, height
        entry = struct.pack("<HHII", tag, 4, 1, 8)
        assert page.count(entry) == 1
        page = page.replace(entry, struct.pack("<HHII", tag, 4, 1, 50_000))
    for data, pixels in ((header.getvalue(), PixelFormat(1, (0, 1))), (page, RGB)):
        with open(tmp_path / "bomb", "wb") as file:
            file.write(data)
            if on_disk:
                file.truncate(len(data) + 10_000_000_000)  # sparse
        with pytest.raises(UnreadableImage, match=r"2,500,000,000 pixels, more than the limit of"):
            read_image(tmp_path / "bomb" if on_disk else data, pixels=pixels)


def test_a_damaged_tiff_is_named_so(capfd: pytest.CaptureFixture[str]) -> None:
    whole = tiff(ramp(3), photometric="rgb")
    reasons = set()
    for data in (b"II*\0\x08\0\0\0", b"II+\0\x08\0\0\0", whole[:8], whole[:40], whole[:300]):
        for read in (
            lambda data: read_image(data, pixels=RGB),
            lambda data: read_size(data, name="x"),
        ):
            try:
                read(data)
            except UnreadableImage as error:
                reasons.add(error.reason)
    assert "a damaged TIFF" in reasons
    assert all(len(reason.split()) > 2 for reason in reasons)
    flat = whole.replace(struct.pack("<HHI", 256, 4, 1), struct.pack("<HHI", 999, 4, 1))  # no width
    with pytest.raises(UnreadableImage, match="a damaged TIFF"):
        read_image(flat, pixels=RGB)
    assert capfd.readouterr() == ("", "")  # tifffile logs nothing


def test_a_compression_that_needs_another_package_names_it() -> None:
    data = tiff(np.zeros((8, 8, 3), np.uint16), photometric="rgb")
    compression = struct.pack("<HHIHH", 259, 3, 1, 1, 0)  # the tag: none
    assert data.count(compression) == 1
    data = data.replace(compression, struct.pack("<HHIHH", 259, 3, 1, 5, 0))  # LZW
    with pytest.raises(UnreadableImage, match="imagecodecs"):
        read_image(data, pixels=RGB)


def test_arrays_beside_images_are_not_images(tmp_path: Path, make_tar) -> None:
    names = ["a/1.jpg", "a/1.latent.npy", "a/2.npy", "b/1.NPY", "1.npy"]
    for name in names:
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(b"x")
    wanted = ["1.npy", "a/1.jpg", "a/2.npy", "b/1.NPY"]
    assert ImageFolder(tmp_path / "folder").names == wanted
    shard = make_tar(tmp_path / "x.tar", {name: b"x" for name in names})
    assert TarShards(shard).names == wanted


def test_deep_pictures_are_cut_and_mirrored_as_others_are(make_picture) -> None:
    photo = make_picture(60, 44)
    values = np.asarray(photo).astype(np.uint16) * 257
    window = Window(0.7, 0.2, 0.9, flip=True)
    for name in ("lanczos", "bilinear"):
        transform = TrainTransform(24, interpolation=name)
        plain = transform.apply(photo, window)
        deep = transform.apply(read_image(png16(values), pixels=RGB), window)
        off = (normalised(plain) - deep).abs().max()
        assert off < 3.5 / 255  # of 8 bits, weights are rounded, and the result of either pass


def test_colours_count_by_their_alpha() -> None:
    """Half of the pixels are red, half are transparent with green in them: no green comes up."""
    row = np.array([[65535, 0, 0, 65535], [0, 65535, 0, 0]] * 16, dtype=np.uint16)
    deep = read_image(png16(np.stack([row] * 32)), pixels=RGBA)
    small = deep.resize((4, 4), Image.Resampling.BILINEAR)
    assert isinstance(small, DeepImage)
    red, green, blue, alpha = small.to_array()[:, 1:-1, 1:-1]
    assert (red > 0.999).all() and (green < -0.999).all() and (blue < -0.999).all()
    assert np.abs(alpha).max() < 0.2


def test_without_a_format_deep_files_are_shown_in_8_bits() -> None:
    array = np.stack([np.full((2, 2), value) for value in (0.0, 0.5, 1.0)], axis=2)
    for data in (npy(array), tiff(array.astype(np.float32), photometric="rgb")):
        assert read_image(data).getpixel((0, 0)) == (0, 128, 255)
