"""List the likelihoods that papers report for the networks of presets."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """A likelihood that a paper reports.

    Attributes:
        value: the negative log-likelihood, or an upper bound of it.
        unit: "nats" per image or "bits" per dimension.
        source: the paper, and what exactly the paper measured.
    """

    value: float
    unit: str
    source: str


IWAE_TABLE = "Burda et al., arXiv:1509.00519, table 1, 5,000 samples"
VDVAE_TABLE = "Child, arXiv:2011.10650, table 2, ELBO"

# By preset.
PUBLISHED = {
    "vae_mnist": Published(86.76, "nats", f"{IWAE_TABLE}, VAE with 1 sample"),
    "iwae_mnist": Published(84.78, "nats", f"{IWAE_TABLE}, IWAE with 50 samples"),
    "vae2_mnist": Published(85.33, "nats", f"{IWAE_TABLE}, 2 layers, VAE with 1 sample"),
    "iwae2_mnist": Published(82.90, "nats", f"{IWAE_TABLE}, 2 layers, IWAE with 50 samples"),
    "conv_mnist": Published(81.08, "nats", "Kingma et al., arXiv:1606.04934, table 1, Gaussian"),
    "iaf_mnist": Published(79.77, "nats", "Kingma et al., arXiv:1606.04934, table 1, IAF 2 x 320"),
    "efficient_vdvae_mnist": Published(79.09, "nats", "Hazami et al., arXiv:2203.13751, ELBO"),
    "vdvae_cifar10": Published(2.87, "bits", f"{VDVAE_TABLE}, CIFAR-10"),
    "vdvae_imagenet32": Published(3.80, "bits", f"{VDVAE_TABLE}, ImageNet 32 x 32"),
    "vdvae_imagenet64": Published(3.52, "bits", f"{VDVAE_TABLE}, ImageNet 64 x 64"),
    "nvae_cifar10": Published(2.93, "bits", "Vahdat and Kautz, arXiv:2007.03898, without flows"),
}
