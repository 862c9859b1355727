"""Train a variational autoencoder by its likelihood.

All options are in the class `latentvae.tasks.likelihood.LikelihoodConfig`.

    accelerate launch train/train_vae.py --config vae_mnist --train_data_dir mnist/train.parquet \\
        --output_dir runs/vae

`--help` lists all options.
"""

import sys

from latentvae.cli.vae_commands import train_vae_command

if __name__ == "__main__":
    train_vae_command(sys.argv[1:])
