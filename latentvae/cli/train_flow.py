"""Start the training of a flow matching model: `accelerate launch -m latentvae.cli.train_flow`."""

import sys

from latentvae.cli.flow_commands import train_flow_command

if __name__ == "__main__":
    train_flow_command(sys.argv[1:])
