"""Start the training of a small autoencoder: `accelerate launch -m latentvae.cli.train_tiny`."""

import sys

from latentvae.cli.tiny_commands import train_tiny_command

if __name__ == "__main__":
    train_tiny_command(sys.argv[1:])
