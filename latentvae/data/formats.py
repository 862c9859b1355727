"""List the types of image files that can be read, and advise how to read other types."""

import functools
import importlib
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass

from PIL import Image

SUFFIXES = (
    ".jpg .jpeg .jpe .jfif .mpo .png .apng .webp .bmp .dib .gif .tif .tiff .ppm .pgm .pbm .pnm "
    ".pfm .avif .jp2 .j2k .jpx .qoi .npy"
).split()
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000", "QOI")
# Pictures of other types, which another program has to convert.
TO_CONVERT = (
    ".3fr .arw .cr2 .cr3 .dcm .dng .exr .hdr .nef .nii .nrw .orf .pef .psb .psd .raf .raw .rw2 "
    ".srw .svg .tga .xcf"
).split()


@dataclass(frozen=True)
class Plugin:
    """A plugin package that lets Pillow read more file formats.

    Attributes:
        module: name of the plugin's module.
        extra: name of the extra (group of optional dependencies) of latentvae that installs the
            plugin.
        suffixes: file name suffixes of the plugin's formats.
        formats: Pillow's names of the formats.
        register: name of the module's function that registers the plugin with Pillow. None means
            that the module registers itself on import.
    """

    module: str
    extra: str
    suffixes: tuple[str, ...]
    formats: tuple[str, ...]
    register: str | None = None


PLUGINS = (
    Plugin("pillow_heif", "heif", (".heic", ".heif", ".hif"), ("HEIF",), "register_heif_opener"),
    Plugin("pillow_jxl", "jxl", (".jxl",), ("JXL",)),
)


@functools.cache
def installed_plugins() -> tuple[Plugin, ...]:
    """Register the plugins that are installed, and return them."""
    found = []
    for plugin in PLUGINS:
        if importlib.util.find_spec(plugin.module) is None:
            continue
        try:
            module = importlib.import_module(plugin.module)
        except ImportError:  # the plugin's libraries are missing
            continue
        if plugin.register is not None:
            getattr(module, plugin.register)()
        found.append(plugin)
    return tuple(found)


@functools.cache
def readable_suffixes() -> tuple[str, ...]:
    """Return the file name suffixes that can be read with the installed plugins."""
    return (*SUFFIXES, *(suffix for plugin in installed_plugins() for suffix in plugin.suffixes))


@functools.cache
def known_formats() -> tuple[str, ...]:
    """Return the names of the formats that this build of Pillow and its plugins can read."""
    plugins = installed_plugins()
    Image.init()
    formats = (*FORMATS, *(name for plugin in plugins for name in plugin.formats))
    return tuple(name for name in formats if name in Image.OPEN)


def how_to_read(suffixes: Iterable[str]) -> str:
    """Return sentences that say how to read files of these types, or "" if there is no advice."""
    suffixes = set(suffixes) - set(readable_suffixes())
    missing = [plugin for plugin in PLUGINS if suffixes.intersection(plugin.suffixes)]
    convert = sorted(suffixes.intersection(TO_CONVERT))
    sentences = []
    if missing:
        extras = ",".join(plugin.extra for plugin in missing)
        types = ", ".join(sorted(s for p in missing for s in suffixes.intersection(p.suffixes)))
        sentences.append(f"To read {types}: pip install 'latentvae[{extras}]'.")
    if convert:
        sentences.append(f"Convert {', '.join(convert)} to PNG or TIFF.")
    return " ".join(sentences)
