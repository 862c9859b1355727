"""Train a discrete tokenizer (VQGAN, FSQ, LFQ, residual VQ, Gumbel-softmax) on your images.

If diffusers' class VQModel can compute the same codes, the tokenizer is exported as a VQModel.

    accelerate launch train/train_vq.py --config train/configs/vq_f16.yaml \\
        --train_data_dir photos --output_dir runs/tokens --max_train_steps 100000

`--config` takes a YAML file or the name of a preset, which chooses the quantiser. Flags such as
`--max_train_steps` override values of this config. To resume a training that was interrupted, run
the same command again. `--preflight` trains a few updates to check the training, and then exits.
`--recipe fast` means `--init auto --optimizer muon`: the optimizer is Muon, and the initial weights
compute a PCA of image patches if the network supports this. `--recipe published` means random
initial weights and AdamW. `--train_data_dir samples` trains on 21 photos that are installed with
latentvae.
"""

import sys

from latentvae.cli.train import run_training

if __name__ == "__main__":
    run_training(sys.argv[1:], description=__doc__ or "", default_config="vq_small")
