"""Train a prior on the tokens of images.

All options are in the class `latentvae.tasks.prior.PriorConfig`.

    accelerate launch train/train_prior.py --tokens tokens --output_dir runs/prior

`--help` lists all options.
"""

import sys

from latentvae.cli.prior_commands import train_prior_command

if __name__ == "__main__":
    train_prior_command(sys.argv[1:])
