"""The command `latentvae`, with the table of its subcommands.

Most subcommands are classes or functions in other modules.
"""

import inspect
import sys
from collections.abc import Callable, Sequence

from latentvae.cli.anomaly_commands import AnomalyFit, AnomalyScore
from latentvae.cli.check_commands import Preflight, VerifyResume
from latentvae.cli.flags import exit_with, parse_known, parse_options, settled_output
from latentvae.cli.flow_commands import Prove, train_flow_command
from latentvae.cli.latents_command import Latents
from latentvae.cli.measure_commands import Compare, Evaluate, Reconstruct
from latentvae.cli.model_commands import Convert, Decode, Encode, Export
from latentvae.cli.prior_commands import Sample, train_prior_command
from latentvae.cli.tiny_commands import train_tiny_command
from latentvae.cli.vae_commands import Likelihood, train_vae_command
from latentvae.errors import UserError, nearest

Command = (
    type[Reconstruct]
    | type[Evaluate]
    | type[Compare]
    | type[Export]
    | type[Convert]
    | type[Encode]
    | type[Decode]
    | type[Latents]
    | type[Sample]
    | type[Prove]
    | type[Likelihood]
    | type[AnomalyFit]
    | type[AnomalyScore]
)

COMMANDS: dict[str, Command] = {
    "reconstruct": Reconstruct,
    "evaluate": Evaluate,
    "compare": Compare,
    "export": Export,
    "convert": Convert,
    "encode": Encode,
    "decode": Decode,
    "latents": Latents,
    "sample": Sample,
    "prove": Prove,
    "likelihood": Likelihood,
    "anomaly fit": AnomalyFit,
    "anomaly score": AnomalyScore,
}


SCRIPTS = """\
Scripts of the repository:
  train/train_kl.py        Train an autoencoder: `latentvae train` as a script.
  train/train_vq.py        Train a tokenizer: `latentvae train` with the default preset vq_small.
  train/train_prior.py     Train a prior on tokens: `latentvae train-prior` as a script.
  train/train_flow.py      Train a flow matching model: `latentvae train-flow` as a script.
  train/train_tiny.py      Distil a small autoencoder: `latentvae train-tiny` as a script.
  train/train_vae.py       Train a VAE by its likelihood: `latentvae train-vae` as a script.
  train/demo_pipeline.py   Run an export inside diffusers' Stable Diffusion pipelines.

To use several processes: accelerate launch --num_processes 8 -m latentvae.cli train ..."""
# These commands also take the flags of training.
COMMANDS_OF_RUNS: dict[str, type[Preflight] | type[VerifyResume]] = {
    "preflight": Preflight,
    "verify-resume": VerifyResume,
}


def train_command(arguments: Sequence[str]) -> None:
    """Train an autoencoder or a tokenizer on your images, and export it for diffusers.

        latentvae train --config kl_f8 --train_data_dir photos --output_dir runs/first
        accelerate launch --num_processes 8 -m latentvae.cli train --config kl_f8 ...

    To train with a single process, leave out `accelerate launch`. `--config` takes a YAML file or
    the name of a preset. Every flag below overrides a value of this config. To resume a training
    that was interrupted, run the same command again. `--preflight` trains a few updates to check
    the training, and then exits. `--recipe fast` means `--init auto --optimizer muon`: the initial
    weights compute a PCA of image patches if the network supports this, and the optimizer is Muon.
    `--recipe published` means random initial weights and AdamW. `--train_data_dir samples` trains
    on 21 photos that are installed with latentvae.
    """
    from latentvae.cli.train import run_training

    if arguments and not arguments[0].startswith("-"):
        raise UserError(f"'{arguments[0]}' is not a flag; did you mean '--config {arguments[0]}'?")
    run_training(arguments, description=inspect.cleandoc(train_command.__doc__ or ""))


TRAINING: dict[str, Callable[[Sequence[str]], None]] = {
    "train": train_command,
    "train-prior": train_prior_command,
    "train-flow": train_flow_command,
    "train-tiny": train_tiny_command,
    "train-vae": train_vae_command,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command. After a wrong argument, print one sentence and exit with code 2."""
    with settled_output():
        _run(sys.argv[1:] if arguments is None else arguments)


def _run(arguments: Sequence[str]) -> None:
    if {"-h", "--help"} & set(arguments[:2]) and " ".join(arguments[:1]) not in _one_word_names():
        print(_overview())
        raise SystemExit(0)
    try:
        name, others = _name(arguments)
        prog = f"latentvae {name}"
        if name in TRAINING:
            TRAINING[name](others)
        elif name in COMMANDS_OF_RUNS:
            options, flags = parse_known(COMMANDS_OF_RUNS[name], others, prog=prog)
            options.run(flags)
        else:
            parse_options(COMMANDS[name], others, prog=prog).run()
    except UserError as error:
        exit_with(error)


def _name(arguments: Sequence[str]) -> tuple[str, Sequence[str]]:
    """Return the command's name (one or two words), and the arguments after this name."""
    known = [*TRAINING, *COMMANDS, *COMMANDS_OF_RUNS]
    if not arguments:
        raise UserError(
            f"a command is missing. Give one of {', '.join(known)}. `latentvae --help` explains "
            "the commands."
        )
    for words in (2, 1):
        if (name := " ".join(arguments[:words])) in known:
            return name, arguments[words:]

    inside = any(command.startswith(f"{arguments[0]} ") for command in known)
    name = " ".join(arguments[: 2 if inside else 1])
    raise UserError(f"there is no command '{name}', only {', '.join(known)}{nearest(name, known)}")


def _one_word_names() -> set[str]:
    """Return the commands whose name is one word. The word `anomaly` alone is not a command."""
    return {name for name in [*TRAINING, *COMMANDS, *COMMANDS_OF_RUNS] if " " not in name}


def _overview() -> str:
    commands = {**TRAINING, **COMMANDS, **COMMANDS_OF_RUNS}
    first = {name: (command.__doc__ or "").splitlines()[0] for name, command in commands.items()}
    lines = [f"  latentvae {name:<13} {text}" for name, text in first.items()]
    return "\n".join(["Commands (each has --help):", *lines, "", SCRIPTS])
