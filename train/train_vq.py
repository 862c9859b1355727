"""Train a discrete tokenizer (VQGAN, FSQ, LFQ, residual VQ, Gumbel-softmax) on your images.

If diffusers' class VQModel can compute the same codes, the tokenizer is exported as a VQModel.

    accelerate launch train/train_vq.py --config train/configs/vq_f16.yaml \
        --train_data_dir photos --output_dir runs/tokens --max_train_steps 100000

`--config` takes a YAML file or the name of a preset, which chooses the quantiser. Every flag below
overrides a value of this config. To resume a run that was interrupted, run the same command again.
`--preflight` trains a few updates to check the run, and then exits. `--recipe fast` starts at a
linear code and trains by Muon (`--init auto --optimizer muon`). `--recipe published` starts at
random weights and trains by AdamW. `--train_data_dir samples` trains on the photos that come with
scikit-image.
"""

import sys

from latentvae.cli.train import run_training

if __name__ == "__main__":
    run_training(sys.argv[1:], description=__doc__ or "", default_config="vq_small")
