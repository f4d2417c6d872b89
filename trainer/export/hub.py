"""Folders to and from the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from actcache.errors import NotFoundError, UnreachableError, UsageError

_TRANSPORT: tuple[type[Exception], ...] = (OSError, HfHubHTTPError.__bases__[0])
"""What the hub client's HTTP library raises where nobody answers: its name changes with huggingface_hub's versions."""


def is_repository(text: str) -> bool:
    """Whether this can be the name of a repository: OWNER/NAME."""
    owner, slash, name = text.partition("/")
    return bool(slash and owner and name) and "/" not in name and not text.startswith((".", "~"))


def push(
    folder: Path, repo_id: str, *, private: bool = False, endpoint: str | None = None, quiet: bool = True
) -> str:
    """Upload a folder as a model repository, made where it is not there; the login is huggingface_hub's.

    Args:
        folder: what `export` wrote.
        repo_id: such as somebody/an-sae.
        private: of a repository that is made.
        endpoint: another hub.
        quiet: without the client's progress bars.

    Returns:
        Address of the commit.

    Raises:
        UsageError: no such name can be, or this login may not write there.
        UnreachableError: the hub cannot be reached, or failed.
    """
    api = HfApi(endpoint=endpoint)
    try:
        with _bars(quiet):
            api.create_repo(repo_id, private=private, exist_ok=True)
            message = f"Upload of {folder.name} with actcache"
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message))
    except HFValidationError as error:
        raise UsageError(f"{repo_id!r} is not the name of a repository: {error}") from error
    except HfHubHTTPError as error:
        raise _said(
            error, f"upload to {repo_id}", "log in with 'hf auth login', as somebody who may write there"
        ) from error
    except _TRANSPORT as error:
        raise UnreachableError(f"upload to {repo_id}: the hub cannot be reached: {error}") from error


def download(
    repo_id: str,
    folder: Path,
    *,
    revision: str | None = None,
    endpoint: str | None = None,
    quiet: bool = True,
) -> str:
    """Bring a model repository's files into a folder.

    Args:
        repo_id: such as tim-lawson/mlsae-pythia-70m-deduped-x64-k32.
        folder: where they go.
        revision: commit, branch or tag.
        endpoint: another hub.
        quiet: without the client's progress bars.

    Returns:
        The commit that was brought.

    Raises:
        UsageError: no such name can be.
        NotFoundError: there is no such repository or revision, or it is not public.
        UnreachableError: the hub cannot be reached, or failed.
    """
    api = HfApi(endpoint=endpoint)
    try:
        with _bars(quiet):
            commit = api.model_info(repo_id, revision=revision).sha
            api.snapshot_download(repo_id, revision=commit, local_dir=folder)
    except HFValidationError as error:
        raise UsageError(
            f"{repo_id!r} is neither a folder here nor the name of a repository: {error}"
        ) from error
    except HfHubHTTPError as error:
        raise _said(
            error, f"{repo_id}", "check its name, and log in with 'hf auth login' if it is private"
        ) from error
    except _TRANSPORT as error:
        raise UnreachableError(f"{repo_id}: the hub cannot be reached: {error}") from error
    return str(commit)


@contextmanager
def _bars(quiet: bool) -> Iterator[None]:  # noqa: FBT001 (the only thing it is told)
    were_off = are_progress_bars_disabled()
    if quiet:
        disable_progress_bars()
    try:
        yield
    finally:
        if quiet and not were_off:
            enable_progress_bars()


def _said(error: HfHubHTTPError, what: str, hint: str) -> UsageError | NotFoundError | UnreachableError:
    status = getattr(error.response, "status_code", None)
    if status in (401, 403):
        return UsageError(f"{what}: the hub refuses ({status}); {hint}")
    if status == 404:
        return NotFoundError(f"{what}: the hub has no such repository or revision, or not for you; {hint}")
    return UnreachableError(f"{what}: the hub failed ({status}): {error}")
