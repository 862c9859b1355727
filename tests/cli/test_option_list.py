"""The options as plain data are those of the classes, and need no torch."""

import subprocess
import sys

from latentvae.cli.option_list import describe_presets, names_elsewhere, read_list
from latentvae.tasks.autoencoder.config import TrainConfig


def test_the_file_is_what_the_classes_say() -> None:
    listed = read_list()
    assert listed is not None, "options.json is stale: run `python -m latentvae.cli.option_list`"
    assert listed.presets == describe_presets(TrainConfig)
    assert listed.elsewhere == names_elsewhere(TrainConfig)


def test_help_and_wrong_flags_of_training_load_no_torch() -> None:
    code = """
import sys
from latentvae.cli.main import main
for arguments in (["--help"], ["--config", "vq_f16", "--lr", "3"], ["--config", "kl_f9"],
                  ["--use_ema", "false"], ["--seed", "x"], ["--rec_loss", "l3"]):
    try: main(["train", *arguments])
    except SystemExit as ended: print("torch" in sys.modules, ended.code)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--learning_rate" in done.stdout
    assert done.stdout.splitlines()[-6:] == ["False 0", *["False 2"] * 5]
    assert done.stderr.count("error: ") == 5
