"""Train a flow matching model on latents.

All options are in the class `latentvae.tasks.flow.LatentFlowConfig`.

    accelerate launch train/train_flow.py --latents latents --output_dir runs/flow

`--help` lists all options.
"""

import sys

from latentvae.cli.flow_commands import train_flow_command

if __name__ == "__main__":
    train_flow_command(sys.argv[1:])
