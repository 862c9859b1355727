"""Upload an export to the Hugging Face Hub.

`huggingface_hub` handles the login (`hf auth login`, or HF_TOKEN). This code only checks the token
and does not keep it, so no token can reach a file, a log, a tracker or the model card.
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
    """Raised if an upload fails. The export on the disk is complete. Commands exit with code 1."""


def check_repo_id(repo_id: str) -> None:
    """Check that `repo_id` can name a repository of the Hub: `owner/name` or `name`.

    Raises:
        UserError: `repo_id` has another form or contains a character that is not allowed.
    """
    if not _is_valid(repo_id):
        near = re.sub(r"[^\w.-]+|-{2,}|\.{2,}", "-", repo_id.rstrip("/").split("/")[-1]).strip("-.")
        near = "/".join([*repo_id.split("/")[:-1][:1], near])
        hint = f" Try '{near}'." if _is_valid(near) else ""
        raise UserError(
            f"hub_model_id must be owner/name, or name for your own account (got '{repo_id}'). "
            f"Allowed are letters, digits, '-', '_' and single '.'.{hint}"
        )


def check_access(repo_id: str, *, private: bool = False) -> str | None:
    """Raise an error if an upload is sure to fail, else return a warning or None.

    Args:
        private: see `upload_export`.

    Raises:
        UserError: offline mode is on, there is no login, or the token is unknown or has only read
            access.
    """
    # is there a login?
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise UserError(
            "push_to_hub cannot upload while HF_HUB_OFFLINE is set. Unset HF_HUB_OFFLINE, or "
            "leave out push_to_hub and upload the export later "
            f"(`{_command(repo_id, 'EXPORT', private=private)}`)."
        )
    if huggingface_hub.get_token() is None:
        raise UserError("push_to_hub needs a login: run `hf auth login`, or set HF_TOKEN.")

    # does the Hub know the token?
    try:
        user = HfApi().whoami()
    except Exception as error:  # the connection may work again at the end of the run
        if _status(error) == 401:
            raise UserError(
                "the Hub does not know the token of push_to_hub. Run `hf auth login` again, or set "
                "another HF_TOKEN."
            ) from error
        return (
            f"the Hub cannot be reached now ({_reason(error)}). The export is uploaded at the "
            "end of the run, if the Hub can be reached then."
        )

    # may the token write to this repository?
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UserError("the token of push_to_hub may only read. Use a token that may write.")
    owners = [user["name"], *(organization["name"] for organization in user.get("orgs", []))]
    owner = repo_id.split("/")[0]
    if "/" in repo_id and owner not in owners:
        return (
            f"'{owner}' of hub_model_id '{repo_id}' is not one of your accounts "
            f"({', '.join(owners)})."
        )
    return None


def upload_export(folder: Path, *, repo_id: str, private: bool, message: str) -> str:
    """Upload an export as one commit. A missing repository is created.

    Args:
        private: make a new repository private. False uses the default of the account.
        message: message of the commit.

    Returns:
        The repository's URL.

    Raises:
        UploadError: the upload failed. The folder is not changed.
    """
    api = HfApi()
    try:
        repository = api.create_repo(repo_id, private=private or None, exist_ok=True)
        api.upload_folder(repo_id=repository.repo_id, folder_path=folder, commit_message=message)
    except Exception as error:  # the export is complete whatever happens here
        raise UploadError(
            f"the export in '{folder}' is complete, but its upload to the Hub failed "
            f"({_reason(error)}). Upload the export later with "
            f"`{_command(repo_id, str(folder), private=private)}`."
        ) from error
    return str(repository)


def _command(repo_id: str, folder: str, *, private: bool) -> str:
    """Return the `hf upload` command that uploads `folder`, for an error message.

    Without `--private`, the account's default says whether a new repository is public.
    """
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
    """Return a short text on the error: the Hub's answer, or the first line of the message."""
    if isinstance(error, HfHubHTTPError):
        said = f": {error.server_message}" if error.server_message else ""
        return f"status {error.response.status_code}{said}"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
