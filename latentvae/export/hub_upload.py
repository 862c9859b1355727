"""Put an export on the Hugging Face Hub.

Who uploads is `huggingface_hub`'s matter (`hf auth login`, or HF_TOKEN): no token passes through
here, so that none reaches a file, a log, a tracker or the model card.
"""

import re
import shlex
from pathlib import Path

import huggingface_hub
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from latentvae.errors import UserError


class UploadError(Exception):
    """The Hub did not take an export, which lies whole on the disk. Commands exit with code 1."""


def check_repo_id(repo_id: str) -> None:
    """Refuse what cannot name a repository of the Hub: neither `owner/name` nor `name`."""
    if not _is_valid(repo_id):
        near = re.sub(r"[^\w.-]+|-{2,}|\.{2,}", "-", repo_id.rstrip("/").split("/")[-1]).strip("-.")
        near = "/".join([*repo_id.split("/")[:-1][:1], near])
        hint = f"; such as '{near}'" if _is_valid(near) else ""
        raise UserError(
            f"hub_model_id '{repo_id}' cannot name a repository of the Hub: allowed is owner/name, "
            "or name for one of your own, of letters, digits, '-', '_' and single '.'"
            f"{hint}"
        )


def check_access(repo_id: str, *, private: bool = False) -> str | None:
    """Refuse, before any work, an upload that is sure to fail; returns a doubt, in one sentence.

    Args:
        private: as of `upload_export`.

    Raises:
        UserError: offline mode, no login, or a token that the Hub refuses or that may only read.
    """
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise UserError(
            "push_to_hub cannot upload while HF_HUB_OFFLINE is set; unset it, or leave push_to_hub "
            f"out and upload the export later (`{_command(repo_id, 'EXPORT', private=private)}`)"
        )
    if huggingface_hub.get_token() is None:
        raise UserError("push_to_hub needs a login: run `hf auth login`, or set HF_TOKEN")
    try:
        user = HfApi().whoami()
    except Exception as error:  # of the network or a Hub that is down, which may be up at the end
        if _status(error) == 401:
            raise UserError(
                "the Hub does not know the token of push_to_hub; run `hf auth login` again, or set "
                "another HF_TOKEN"
            ) from error
        return (
            f"the Hub cannot be asked now ({_reason(error)}); the export is uploaded at the "
            "end, if it can be reached then"
        )
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UserError("the token of push_to_hub may only read; take one that may write")
    owners = [user["name"], *(organization["name"] for organization in user.get("orgs", []))]
    owner = repo_id.split("/")[0]
    if "/" in repo_id and owner not in owners:
        return f"'{owner}' of hub_model_id '{repo_id}' is not among yours ({', '.join(owners)})"
    return None


def upload_export(folder: Path, *, repo_id: str, private: bool, message: str) -> str:
    """Upload an export as one commit, into a repository that is made if it is not there.

    Args:
        private: of a new repository; without it the account's own setting counts.
        message: of the commit.

    Returns:
        The repository's address.

    Raises:
        UploadError: the Hub or the network refuses; the folder is as it was.
    """
    api = HfApi()
    try:
        repository = api.create_repo(repo_id, private=private or None, exist_ok=True)
        api.upload_folder(repo_id=repository.repo_id, folder_path=folder, commit_message=message)
    except Exception as error:  # whatever happens here, the model is made, and the user is told
        raise UploadError(
            f"the export in '{folder}' is whole, but the Hub did not take it ({_reason(error)}); "
            f"upload it later with `{_command(repo_id, str(folder), private=private)}`"
        ) from error
    return str(repository)


def _command(repo_id: str, folder: str, *, private: bool) -> str:
    """What uploads the same by hand; without its flag a new repository would be public."""
    return shlex.join(["hf", "upload", repo_id, folder, ".", *(["--private"] if private else [])])


def _is_valid(repo_id: str) -> bool:
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        return False
    return repo_id != ""


def _status(error: Exception) -> int | None:
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def _reason(error: Exception) -> str:
    """What the Hub said, or the first line of the error."""
    if isinstance(error, HfHubHTTPError):
        said = f": {error.server_message}" if error.server_message else ""
        return f"status {error.response.status_code}{said}"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
