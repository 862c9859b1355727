"""List the styles of blocks. The keys of `STYLES` are the values of the option `block`."""

from collections.abc import Callable
from typing import Literal

from latentvae.models.hierarchical.blocks import Style, VdvaeStyle
from latentvae.models.hierarchical.nvae import NvaeStyle

StyleName = Literal["vdvae", "nvae"]

STYLES: dict[str, Callable[[float, str], Style]] = {
    "vdvae": VdvaeStyle,
    "nvae": lambda bottleneck_multiple, activation: NvaeStyle(),
}


def build_style(name: str, *, bottleneck_multiple: float, activation: str) -> Style:
    """Return the style of blocks called `name`. The style "nvae" ignores the other arguments."""
    return STYLES[name](bottleneck_multiple, activation)
