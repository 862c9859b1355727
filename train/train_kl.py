"""Train a KL autoencoder (Stable Diffusion's kind) on your images, and export it for diffusers.

    accelerate launch train/train_kl.py --config train/configs/kl_f8.yaml \
        --train_data_dir photos --output_dir runs/first --max_train_steps 100000

`--preflight` checks the wiring of the run in a few updates and exits. The same command again goes
on where the last one ended. `--config` takes a preset's name (a tokenizer's too) or a YAML file;
every flag below overrides it. `--train_data_dir samples` trains on the photos that come with
scikit-image.
"""

import sys

from latentvae.cli.train import run_training

if __name__ == "__main__":
    run_training(sys.argv[1:], description=__doc__ or "")
