"""Start the training of a VAE with `accelerate launch -m latentvae.cli.train_vae`."""

import sys

from latentvae.cli.vae_commands import train_vae_command

if __name__ == "__main__":
    train_vae_command(sys.argv[1:])
