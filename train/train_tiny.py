"""Distil an autoencoder into a small one.

All options are in the class `latentvae.tasks.distill.DistillConfig`.

    accelerate launch train/train_tiny.py --teacher runs/vae/export --train_data_dir photos \\
        --output_dir runs/tiny

`--help` lists all options.
"""

import sys

from latentvae.cli.tiny_commands import train_tiny_command

if __name__ == "__main__":
    train_tiny_command(sys.argv[1:])
