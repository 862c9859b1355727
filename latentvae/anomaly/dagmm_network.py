"""Define the two networks of DAGMM (Zong et al., ICLR 2018): compression and estimation.

    x -> encoder -> z_c -> decoder -> x'
    z = [z_c, relative distance of x and x', cosine similarity of x and x']
    z -> estimation network -> probability of each mixture component

Symbols: `N` rows, `F` columns of x, `D` columns of z, `K` components.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

# Smallest norm of a row. Without this limit, the relative distance and the cosine of a row of zeros
# would not be finite.
MIN_NORM = 1e-8
NUM_RECONSTRUCTION_FEATURES = 2


class Compressed(NamedTuple):
    """The reconstruction (N, F), the features z (N, D) and the component probabilities (N, K)."""

    recon: Tensor
    z: Tensor
    assignments: Tensor


class DAGMMNetwork(nn.Module):
    """The two networks of DAGMM in one module: an autoencoder and an estimation network.

    The autoencoder compresses a row x to z_c. The estimation network gives the probability of each
    component of a Gaussian mixture.

    Args:
        num_features: number of columns F.
        hidden: widths of the encoder's hidden layers, such as (60, 30, 10). The decoder mirrors
            them.
        latent_dim: number of columns of z_c.
        estimation_width: width of the estimation network's hidden layer.
        num_components: number of components K.
        dropout: share of the estimation network's hidden units that training drops.
    """

    def __init__(
        self,
        num_features: int,
        *,
        hidden: Sequence[int],
        latent_dim: int,
        estimation_width: int,
        num_components: int,
        dropout: float,
    ) -> None:
        super().__init__()
        widths = [num_features, *hidden, latent_dim]
        self.encoder = tanh_layers(widths)
        self.decoder = tanh_layers(widths[::-1])
        self.estimation = nn.Sequential(
            nn.Linear(latent_dim + NUM_RECONSTRUCTION_FEATURES, estimation_width),
            nn.Tanh(),
            nn.Dropout(dropout),
            nn.Linear(estimation_width, num_components),
        )
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Compressed:
        """Return reconstructions, features z and component probabilities of rows x (N, F)."""
        latent = self.encoder(x)
        recon = self.decoder(latent)
        z = torch.cat([latent, reconstruction_features(x, recon)], dim=1)
        return Compressed(recon, z, self.estimation(z).softmax(dim=1))


def reconstruction_features(x: Tensor, recon: Tensor) -> Tensor:
    """Return relative Euclidean distance and cosine similarity of x and recon, (N, 2).

    The relative distance is |x - recon| / |x|.
    """
    norm = x.norm(dim=1).clamp_min(MIN_NORM)
    recon_norm = recon.norm(dim=1).clamp_min(MIN_NORM)
    distance = (x - recon).norm(dim=1) / norm
    cosine = (x * recon).sum(dim=1) / (norm * recon_norm)
    return torch.stack([distance, cosine], dim=1)


def tanh_layers(widths: Sequence[int]) -> nn.Sequential:
    """Return linear layers with tanh between them. The last layer is linear."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.Tanh()]
    return nn.Sequential(*layers[:-1])
