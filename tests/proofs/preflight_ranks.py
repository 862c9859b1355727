"""Run by the launcher in test_preflight.py: a preflight of several processes with a fault in the
code.

python -m tests.proofs.preflight_ranks "NAME OF THE MUTATION" FOLDER
"""

import contextlib
import sys
from pathlib import Path

import torch

from latentvae.proofs.preflight import preflight
from tests.proofs.mutations import MUTATIONS, applied
from tests.tasks.autoencoder.small import small_config


def main(name: str, folder: Path) -> int:
    torch.set_num_threads(1)
    mutation = next((mutation for mutation in MUTATIONS if mutation.name == name), None)
    model = None if mutation is None else mutation.model
    config = small_config(folder / "run", model, train_batch_size=2)
    with contextlib.nullcontext() if mutation is None else applied(mutation):
        return preflight(config, json=folder / "checks.json")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], Path(sys.argv[2])))
