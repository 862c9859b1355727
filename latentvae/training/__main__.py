"""The training scripts as a module, for `accelerate launch -m latentvae.training` where the package
is installed and there are no scripts; `--config` takes every preset."""

import sys

from latentvae.training.command_line import run_training

if __name__ == "__main__":
    run_training(sys.argv[1:], description=__doc__ or "")
