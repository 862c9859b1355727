"""Upload the export of a finished run to the Hugging Face Hub, from rank 0."""

from pathlib import Path

from latentvae.distributed import from_main, is_main
from latentvae.errors import UserError
from latentvae.export.hub_upload import UploadError, check_access, check_repo_id, upload_export

__all__ = ["UploadError", "check_push", "push_export", "repository"]


def repository(hub_model_id: str | None, folder: Path) -> str:
    """Return the id of the Hub repository.

    Without `hub_model_id`, the id is the name of the run's folder, in the user's account.
    """
    repo_id = hub_model_id or folder.resolve().name
    check_repo_id(repo_id)
    return repo_id


def check_push(repo_id: str, *, private: bool) -> None:
    """Raise UserError if an upload is sure to fail. Only rank 0 asks the Hub."""
    answer: str | UserError | None = None
    if is_main():
        try:
            answer = check_access(repo_id, private=private)
        except UserError as error:
            answer = error
    answer = from_main(answer)
    if isinstance(answer, UserError):
        raise answer
    if answer is not None and is_main():
        print(answer)


def push_export(export: Path, *, repo_id: str, private: bool, message: str) -> None:
    """Upload an export and print its URL. Only one rank calls this function.

    Raises:
        UploadError: the Hub did not accept the upload.
    """
    address = upload_export(export, repo_id=repo_id, private=private, message=message)
    print(f"uploaded to {address}")
