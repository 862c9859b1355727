"""Every kind of file becomes the RGB it shows, or an UnreadableImage; expected by hand."""

import io
import pickle
import struct
import warnings
from functools import partial

import numpy as np
import pytest
from PIL import Image

from latentvae.data import UnreadableImage, read_image
from latentvae.errors import UserError

array8 = partial(np.array, dtype=np.uint8)
array32 = partial(np.array, dtype=np.float32)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(data: bytes) -> list:
    image = read_image(data)
    assert image.mode == "RGB"
    return np.asarray(image).tolist()


RED, GREEN, BLUE, WHITE = [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]


def test_rgb_is_unchanged():
    values = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    assert pixels(encoded(Image.fromarray(values), "PNG")) == values.tolist()


def test_one_bit_and_grey():
    assert pixels(encoded(Image.fromarray(np.array([[True, False]])), "PNG")) == [[WHITE, [0] * 3]]
    assert pixels(encoded(Image.fromarray(array8([[7, 200]])), "PNG")) == [[[7] * 3, [200] * 3]]


def test_palette(make_png):
    palette = (b"PLTE", bytes(RED + GREEN + BLUE))
    assert pixels(make_png((3, 1), 8, 3, b"\0\0\1\2", palette)) == [[RED, GREEN, BLUE]]


def test_palette_transparency_is_laid_over_white(make_png):
    chunks = (b"PLTE", bytes(RED + GREEN + BLUE)), (b"tRNS", bytes([0, 255, 51]))
    # 51/255 = 0.2: blue 0.2*255 + 0.8*255, the others 0.8*255 = 204
    assert pixels(make_png((3, 1), 8, 3, b"\0\0\1\2", *chunks)) == [[WHITE, GREEN, [204, 204, 255]]]


def test_colour_key_is_laid_over_white(make_png):
    key = (b"tRNS", struct.pack(">3H", *RED))
    assert pixels(make_png((2, 1), 8, 2, b"\0" + bytes(RED + GREEN), key)) == [[WHITE, GREEN]]
    key = (b"tRNS", struct.pack(">H", 7))
    assert pixels(make_png((2, 1), 8, 0, b"\0\7\x09", key)) == [[WHITE, [9] * 3]]


def test_grey_with_alpha_and_rgba_are_laid_over_white():
    grey = Image.merge("LA", [Image.new("L", (1, 1), 100), Image.new("L", (1, 1), 51)])
    assert pixels(encoded(grey, "PNG")) == [[[224] * 3]]  # 0.2*100 + 0.8*255
    colour = Image.new("RGBA", (1, 1), (255, 0, 0, 0))
    for kind in ("PNG", "WEBP", "TIFF"):
        options = {"lossless": True} if kind == "WEBP" else {}
        assert pixels(encoded(colour, kind, **options)) == [[WHITE]]


def test_sixteen_bit_grey_is_scaled_not_clipped(make_png):
    values = np.array([[0, 128, 257, 32896, 65535]], dtype=np.uint16)
    expected = [[[v] * 3 for v in (0, 0, 1, 128, 255)]]
    for kind in ("PNG", "TIFF", "PPM"):  # modes I;16, I;16 and I
        assert pixels(encoded(Image.fromarray(values), kind)) == expected
    rows = b"\0" + struct.pack(">2H", 513, 65535)
    keyed = make_png((2, 1), 16, 0, rows, (b"tRNS", struct.pack(">H", 513)))
    assert pixels(keyed) == [[WHITE, WHITE]]
    keyed = make_png((2, 1), 16, 0, rows, (b"tRNS", struct.pack(">H", 65535)))
    assert pixels(keyed) == [[[2] * 3, WHITE]]


def test_sixteen_bit_colour(make_png):
    rows = b"\0" + struct.pack(">3H", 65535, 0, 32896)
    assert pixels(make_png((1, 1), 16, 2, rows)) == [[[255, 0, 128]]]


def test_float_grey():
    for values in ([[0.0, 0.5, 1.0]], [[0.0, 127.5, 255.0]]):
        data = encoded(Image.fromarray(array32(values)), "TIFF")
        assert pixels(data) == [[[0] * 3, [128] * 3, WHITE]]


@pytest.mark.parametrize("values", [array32([[np.nan]]), array32([[np.inf]])])
def test_float_that_is_not_finite_is_refused(values):
    with pytest.raises(UnreadableImage, match="finite"):
        read_image(encoded(Image.fromarray(values), "TIFF"))


@pytest.mark.parametrize("value", [-1, 70_000])
def test_integers_without_a_known_white_are_refused(value):
    with pytest.raises(UnreadableImage, match=r"0\.\.65535"):
        read_image(encoded(Image.fromarray(np.array([[value]], dtype=np.int32)), "TIFF"))


def test_cmyk():
    cyan = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    jpeg = encoded(cyan, "JPEG", quality=100)  # Pillow writes Adobe's inverted values
    assert b"Adobe" in jpeg
    for data in (jpeg, encoded(cyan, "TIFF")):
        assert np.abs(np.array(pixels(data)) - [0, 255, 255]).max() <= 2


# The stored picture is  A B   and what each orientation (EXIF 2.3, tag 274) shows of it.
#                        C D
ORIENTATIONS = {
    1: ("AB", "CD"),
    2: ("BA", "DC"),
    3: ("DC", "BA"),
    4: ("CD", "AB"),
    5: ("AC", "BD"),
    6: ("CA", "DB"),
    7: ("DB", "CA"),
    8: ("BD", "AC"),
}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_exif_orientation(orientation, kind):
    shades = {"A": 0, "B": 80, "C": 160, "D": 240}
    stored = Image.fromarray(array8([[shades[c] for c in row] for row in ("AB", "CD")]))
    exif = Image.Exif()
    exif[274] = orientation
    stored = stored.resize((32, 32), Image.Resampling.NEAREST)
    image = read_image(encoded(stored, kind, exif=exif))
    shown = np.asarray(image)[8::16, 8::16, 0].tolist()
    expected = [[shades[c] for c in row] for row in ORIENTATIONS[orientation]]
    assert np.abs(np.array(shown) - expected).max() <= 2


def test_of_an_animation_the_first_frame_is_taken():
    frames = [Image.new("RGB", (4, 4), tuple(colour)) for colour in (RED, BLUE)]
    for kind in ("GIF", "PNG", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert pixels(data) == [[RED] * 4] * 4


def test_a_path_and_its_bytes_give_the_same(tmp_path, make_picture):
    file = tmp_path / "ä photo.jpg"
    make_picture(40, 30).save(file)
    assert read_image(file) == read_image(str(file)) == read_image(file.read_bytes())


def test_at_least_keeps_the_shorter_side_and_the_picture(make_picture):
    data = encoded(make_picture(400, 300), "JPEG", quality=95)
    small = read_image(data, at_least=70)
    assert small.size == (100, 75)
    assert read_image(data, at_least=76).size == (200, 150)
    assert read_image(data, at_least=1000).size == (400, 300)
    whole = np.asarray(read_image(data).reduce(4), dtype=float)
    assert np.abs(np.asarray(small) - whole).mean() < 1


def hostile_files(make_png, make_picture) -> dict[str, bytes]:
    picture = make_picture(64, 48)
    files = {
        "empty": b"",
        "html": b"<html><body>404 Not Found</body></html>",
        "zeros": bytes(1000),
        "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
        "bomb": make_png((60_000, 60_000), 8, 2, b"\0\0\0\0"),
        "bomb, a smaller one": make_png((10_000, 10_000), 8, 2, b"\0\0\0\0"),
        "header of no width": make_png((0, 8), 8, 2, b""),
        "unknown filter": make_png((2, 1), 8, 2, b"\x09" + bytes(6)),
        "palette missing": make_png((4, 1), 8, 3, b"\0\0\1\2\3")[:33],
    }

    # incomplete files of each format
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "AVIF"):
        data = encoded(picture, kind)
        for share in (0.02, 0.3, 0.6, 0.9):
            files[f"{kind} cut at {share}"] = data[: int(len(data) * share)]

    # wrong sizes and checksums
    data = encoded(picture, "BMP")
    files["BMP too tall"] = data[:22] + struct.pack("<I", 480) + data[26:]
    files["PPM too tall"] = encoded(picture, "PPM").replace(b"64 48", b"64 480", 1)
    data = encoded(picture, "PNG")
    files["PNG too tall"] = data[:20] + struct.pack(">I", 480) + data[24:]
    for chunk in (b"IHDR", b"IDAT"):
        broken = bytearray(data)
        broken[data.index(chunk) + 6] ^= 0xFF
        files[f"bad CRC of {chunk.decode()}"] = bytes(broken)
    return files


def test_hostile_files_raise_one_exception_and_no_warning(make_png, make_picture, tmp_path):
    for name, data in hostile_files(make_png, make_picture).items():
        file = tmp_path / "hostile.jpg"
        file.write_bytes(data)
        for source in (data, file):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                try:
                    read_image(source)
                except UnreadableImage as error:
                    assert error.reason and "\n" not in str(error) and "0x" not in str(error), name
                else:
                    pytest.fail(f"'{name}' was read")


def test_random_damage_never_raises_anything_else(make_picture):
    rng = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF"):
        data = np.frombuffer(encoded(make_picture(32, 24), kind), dtype=np.uint8)
        for _ in range(40):
            broken = data.copy()
            broken[rng.integers(0, len(data), 4)] = rng.integers(0, 256, 4)
            try:
                assert read_image(broken.tobytes()).mode == "RGB"
            except UnreadableImage:
                pass


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UnreadableImage, match=r"cannot read image '.*gone\.jpg': No such file"):
        read_image(tmp_path / "gone.jpg")
    with pytest.raises(UnreadableImage):
        read_image(tmp_path)


def test_the_error_names_the_file_and_survives_pickling(tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(b"")
    with pytest.raises(UserError) as caught:
        read_image(file)
    assert str(caught.value) == f"cannot read image '{file}': the file is empty"
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.reason) == (str(caught.value), "the file is empty")
