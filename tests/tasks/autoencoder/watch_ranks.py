"""Run by the launcher in test_watch.py: a run whose critic wins and is switched off, and what each
rank's watch remembers at its end.

watch_ranks.py FOLDER
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from latentvae.distributed import rank
from latentvae.tasks.autoencoder import loop, watch
from tests.tasks.autoencoder.small import small_config
from tests.tasks.autoencoder.test_watch import PLAIN, WINNING


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    watch.BEGINNING, watch.LASTING, watch.WON_SHARE = 2, 4, 0.9
    original = loop._Loop._save

    def saving(self: Any) -> Path:
        path = original(self)
        remembered = {
            "critic_stopped": self.progress.critic_stopped,
            "watch": self.watch.state_dict(),
        }
        (folder / f"rank-{rank()}.json").write_text(json.dumps(remembered))
        return path

    loop._Loop._save = saving  # type: ignore[method-assign]
    loop.train(small_config(folder / "run", **(PLAIN | WINNING), critic_watch="disable"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
