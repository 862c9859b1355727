"""Start the training of a prior on tokens: `accelerate launch -m latentvae.cli.train_prior`."""

import sys

from latentvae.cli.prior_commands import train_prior_command

if __name__ == "__main__":
    train_prior_command(sys.argv[1:])
