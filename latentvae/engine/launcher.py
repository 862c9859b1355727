"""Reject the settings of `accelerate launch` that training does not support.

Such settings often come from another project, because `accelerate config` writes one file for all
projects.
"""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from accelerate.commands.config.config_args import default_config_file

from latentvae.errors import UserError
from latentvae.files import read_yaml


class Setting(NamedTuple):
    """A setting of `accelerate launch` that training supports only with some values.

    Attributes:
        variable: the environment variable through which the launcher passes the setting on.
        allowed: the values of the setting that training supports, in lower case.
        key: the setting's name in the launcher's configuration file.
        name: name of the setting in messages.
        remedy: text that tells the user which supported setting to use.
    """

    variable: str
    allowed: tuple[str, ...]
    key: str
    name: str
    remedy: str


_OFF = ("", "no", "false", "0")
_DDP = "Choose MULTI_GPU (or NO for one process) as distributed_type, or launch with --multi_gpu."
SETTINGS = (
    Setting(
        "ACCELERATE_DYNAMO_BACKEND",
        _OFF,
        "dynamo_backend",
        "dynamo_backend",
        "Launch with --dynamo_backend no. The option --torch_compile compiles the network.",
    ),
    Setting("ACCELERATE_USE_DEEPSPEED", _OFF, "deepspeed_config", "DeepSpeed", _DDP),
    Setting("ACCELERATE_USE_FSDP", _OFF, "fsdp_config", "FSDP", _DDP),
    Setting("ACCELERATE_USE_MEGATRON_LM", _OFF, "megatron_lm_config", "Megatron-LM", _DDP),
    Setting(
        "ACCELERATE_USE_PARALLELISM_CONFIG",
        _OFF,
        "parallelism_config",
        "a parallelism_config",
        "Launch without a parallelism_config: only data parallelism is supported.",
    ),
)
PRECISION = Setting(
    "ACCELERATE_MIXED_PRECISION",
    ("", "no", "bf16"),
    "mixed_precision",
    "mixed_precision",
    "Allowed are bf16 and no: give --mixed_precision bf16 or --mixed_precision no.",
)


def check_launcher(*, precision: str | None, environment: Mapping[str, str] = os.environ) -> None:
    """Check that training supports the settings of the launcher (`accelerate launch`).

    A setting that is not supported could crash the run later.

    Args:
        precision: the option mixed_precision, which overrides the launcher's precision.
        environment: variables that the launcher has set.

    Raises:
        UserError: a setting is not supported. The message names the setting, its value, and where
            it was set (a file, the command line or the environment).
    """
    settings = SETTINGS if precision else (*SETTINGS, PRECISION)
    for setting in settings:
        value = environment.get(setting.variable, "")
        if value.lower() not in setting.allowed:
            shown = "" if value.lower() in ("true", "1") else f" {value.lower()}"
            raise UserError(
                f"the launcher asks for {setting.name}{shown} ({_origin(setting.key, value)}). "
                f"Training does not support this setting. {setting.remedy}"
            )


def _origin(key: str, value: str) -> str:
    """Return text that says where a setting is made: file, command line or environment."""
    for path in (_named_by_launcher(), Path(default_config_file)):
        if path is not None and path.is_file():
            with contextlib.suppress(UserError):
                if _has(read_yaml(path), key, value):
                    return f"{key} in '{path}'"
    return "from its command line or the environment"


def _has(values: Any, key: str, value: str) -> bool:
    """Return whether a configuration file has this value, or a non-empty section, for `key`."""
    if not isinstance(values, dict):
        return False
    found = values.get(key)
    if isinstance(found, dict):
        return bool(found)
    inside = any(_has(part, key, value) for part in values.values())
    return inside or (found is not None and str(found).lower() == value.lower())


def _named_by_launcher() -> Path | None:
    """Return the file after --config_file in the command of the launcher (the parent process).

    Return None if there is no such file name or the command cannot be read.
    """
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode().split("\0")
        folder = Path(os.readlink(f"/proc/{os.getppid()}/cwd"))
    except (OSError, UnicodeDecodeError):
        return None
    for i, word in enumerate(words):
        if word.startswith("--config_file="):
            return folder / word.partition("=")[2]
        if word == "--config_file" and i + 1 < len(words):
            return folder / words[i + 1]
    return None
