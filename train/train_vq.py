"""Train a discrete tokenizer (VQGAN, FSQ, LFQ, residual VQ, Gumbel-softmax) on your images, and
export it: to diffusers' VQModel where that can say the same.

    accelerate launch train/train_vq.py --config train/configs/vq_f16.yaml \
        --train_data_dir photos --output_dir runs/tokens --max_train_steps 100000

`--preflight` checks the wiring of the run in a few updates and exits. The same command again goes
on where the last one ended. `--config` takes a preset's name or a YAML file, which chooses the
quantiser; every flag below overrides it. `--train_data_dir samples` trains on the photos that come
with scikit-image.
"""

import sys

from latentvae.cli.train import run_training

if __name__ == "__main__":
    run_training(sys.argv[1:], description=__doc__ or "", default_config="vq_small")
