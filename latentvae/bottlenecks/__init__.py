"""What turns encoder features into a latent."""

from latentvae.bottlenecks.gaussian import gaussian_bottleneck

__all__ = ["gaussian_bottleneck"]
