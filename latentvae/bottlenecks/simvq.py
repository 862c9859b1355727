"""SimVQ (arXiv:2411.02038): the codebook is a frozen random matrix times one learned matrix.

features h (B, D, h, w) -> vectors (N, D) -> nearest row of the codebook C W -> z (B, D, h, w)

C (K, D) is frozen, and W (D, D) is learned. The gradient of one code changes W, and so changes all
codes. So every code stays near the encoder's vectors, and no unused code has to be replaced. C is
drawn from a normal distribution with variance 1 / D, and W has the default initialisation of a
linear layer. The authors' code and vector-quantize-pytorch initialise C and W in the same way.

`B` batch, `D` code width, `K` codes, `N = B * h * w` vectors.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from latentvae.bottlenecks.bottleneck_config import CodebookConfig, GradientName
from latentvae.bottlenecks.gradients import gradient_of
from latentvae.bottlenecks.nearest import nearest_codes
from latentvae.bottlenecks.quantized import Quantized, Quantizer
from latentvae.errors import UserError


class SimVQConfig(CodebookConfig):
    """Options of the quantiser SimVQ, which takes the nearest of K codes.

    The codes are fixed random vectors, multiplied by one learned matrix.
    """

    type: Literal["simvq"] = "simvq"
    gradient: GradientName = Field(
        default="straight_through",
        description=(
            "How the gradient passes from the decoder through the quantiser to the encoder. "
            "`straight_through` passes the gradient unchanged. `rotation` (the rotation trick) "
            "treats the code as the encoder's vector, rotated and scaled by constants, and passes "
            "the gradient back through this rotation and this scale."
        ),
    )

    @property
    def why_no_linear_start(self) -> str:
        return "its codes are random. Give --init random."


class SimVQ(Quantizer):
    """A `Quantizer` that takes the nearest code of a codebook C W, where only W is learned.

    The rows of C are fixed random vectors, and W is a square matrix. The losses are those of
    VQ-VAE: for features h, `commitment` is |h - sg(code)|^2 and `codebook` is |sg(h) - code|^2. The
    function sg stops the gradient. The loss `codebook` has a gradient only for the matrix W.

    Args:
        num_codes: number of codes K.
        code_channels: code width D, also the number of feature channels.
        gradient: `"straight_through"` (as in the paper) or `"rotation"`.

    Raises:
        UserError: there is no code or no channel, or the name of the gradient is unknown.
    """

    kind = "simvq"
    frozen: Tensor

    def __init__(
        self, *, num_codes: int, code_channels: int, gradient: str = "straight_through"
    ) -> None:
        super().__init__()
        if num_codes < 1 or code_channels < 1:
            raise UserError(
                f"A codebook needs at least 1 code of at least 1 channel (got {num_codes} codes of "
                f"{code_channels} channels)."
            )
        self.gradient = gradient_of(gradient)
        self.num_codes = num_codes
        self.code_channels = self.in_channels = code_channels
        self.register_buffer("frozen", torch.randn(num_codes, code_channels) * code_channels**-0.5)
        self.projection = nn.Linear(code_channels, code_channels, bias=False)

    @property
    def codebook(self) -> Tensor:
        """The K codes that the decoder reads, (K, D), float32, with a gradient to the matrix W."""
        with torch.autocast(self.frozen.device.type, enabled=False):
            return F.linear(self.frozen.float(), self.projection.weight.float())

    def forward(self, features: Tensor, *, temperature: float = 1.0) -> Quantized:
        """Quantise features of D channels, (B, D, h, w). ``temperature`` has no effect."""
        assert features.shape[1] == self.in_channels, features.shape
        with torch.autocast(features.device.type, enabled=False):
            B, _, h, w = features.shape
            vectors = rearrange(features.float(), "B D h w -> (B h w) D")

            codebook = self.codebook
            indices = nearest_codes(vectors, codebook)
            quantised = F.embedding(indices, codebook)

            losses = {
                "commitment": F.mse_loss(vectors, quantised.detach()),
                "codebook": F.mse_loss(quantised, vectors.detach()),
            }
            z = self.gradient(vectors, quantised)
            z = rearrange(z, "(B h w) D -> B D h w", B=B, h=h, w=w).contiguous()
        return Quantized(z, indices.view(B, h, w), losses, statistics={})

    def codes(self, indices: Tensor) -> Tensor:
        """Return the decoder's input `z` (B, D, h, w), codes of width D, for indices (B, h, w)."""
        return rearrange(F.embedding(indices, self.codebook), "B h w D -> B D h w").contiguous()

    def why_not_listed(self) -> str:
        """Return "" (see `Quantizer.why_not_listed`), because the codebook is a list of codes."""
        return ""

    def listed_codes(self) -> Tensor:
        """Return all codes, see `Quantizer.listed_codes`."""
        return self.codebook.detach().clone()
