"""The Hugging Face Hub: single files of a repository, at one commit, and files that are pushed as one commit.

`huggingface_hub` does the work, so its cache, ``HF_ENDPOINT``, ``HF_HUB_OFFLINE`` and logins hold here, too.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from orthorank.common.errors import OrthoRankError, reason_of, shown
from orthorank_kernels._version import __version__
from orthorank_kernels.remedies import install

_ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?", re.ASCII)
_LIBRARY: dict[str, Any] = {"library_name": "orthorank", "library_version": __version__}


class Place(NamedTuple):
    """A repository of the Hub at a revision: a branch, a tag or a commit; None: the head of its main branch."""

    repo: str
    revision: str | None

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


def place_of(name: str, revision: str | None = None) -> Place | None:
    """``org/name`` or ``org/name@revision`` as a place on the Hub; None if ``name`` does not look like one.

    Raises:
        OrthoRankError: there are two revisions, or ``revision`` is no text.

    >>> place_of("org/name@v2"), place_of("org/name", "v2"), place_of("./plans"), place_of("plans/plan.json")
    (Place(repo='org/name', revision='v2'), Place(repo='org/name', revision='v2'), None, None)
    """
    if not (revision is None or (isinstance(revision, str) and revision)):
        raise OrthoRankError(f"revision is {shown(revision)}; it must be a branch, a tag or a commit, or None")
    if (found := _ID.fullmatch(name)) is None or name.endswith(".json"):
        return None
    if revision is not None and found[2] is not None:
        raise OrthoRankError(f"plan is {name!r} and revision is {revision!r}; name the revision in one of them")
    return Place(found[1], revision or found[2])


def fetch(place: Place, name: str, most: int, token: str | bool | None = None) -> tuple[Path, str]:
    """The file ``name`` of ``place`` in the local cache, and the commit that it is of.

    Args:
        most: bytes that it may have. A larger one is not downloaded, as far as the Hub tells its size.
        token: as huggingface_hub takes it; None: of the login, if there is one.

    Raises:
        OrthoRankError: there is no such repository, revision or file, it is too large, or the Hub does not answer.
    """
    given: dict[str, Any] = {"revision": place.revision, "token": token, **_LIBRARY}
    with _told(place, name):
        from huggingface_hub import hf_hub_download

        size = hf_hub_download(place.repo, name, dry_run=True, **given).file_size
        if size is not None and size > most:
            raise OrthoRankError(f"{name} of {place} has {size:,} bytes, and may have {most:,}: it is not downloaded")
        file = Path(hf_hub_download(place.repo, name, **given))
    return file, file.parent.name  # the cache keeps snapshots/COMMIT/NAME


def push(
    files: Sequence[Path],
    repo_id: str,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    **commit: Any,
) -> None:
    """``files`` as one commit on the Hub, in a repository that is made where it is not there.

    Args:
        repo_id: ``org/name``, or ``name`` for one's own.
        private: whether a new repository is; None: as the account's default says.
        revision: a branch, which is made where it is not there; None: the main branch.
        commit: further arguments of `huggingface_hub.HfApi.create_commit`.

    Raises:
        OrthoRankError: the Hub cannot be reached, or refuses.
    """
    with _told(Place(repo_id, revision), "the plan"):
        from huggingface_hub import CommitOperationAdd, HfApi

        api = HfApi(token=token, **_LIBRARY)
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/"):  # a pull request, which is there
            api.create_branch(repo, branch=revision, exist_ok=True)
        operations = [CommitOperationAdd(file.name, file) for file in files]
        api.create_commit(repo, operations, revision=revision, **commit)


@contextmanager
def _told(place: Place, what: str) -> Iterator[None]:
    """Errors of huggingface_hub in a sentence, with the remedy."""
    try:
        from huggingface_hub import errors
    except ImportError:
        raise OrthoRankError(
            f"{place} is no path here, and the Hugging Face Hub needs huggingface_hub, which is not installed; run: "
            f"{install('hf')}"
        ) from None
    try:
        yield
    except OrthoRankError:
        raise
    except (errors.HTTPError, errors.EntryNotFoundError, errors.FileMetadataError, OSError, ValueError) as error:
        raise OrthoRankError(f"{place} on the Hugging Face Hub: {_reason(error, place, what)}") from error


def _reason(error: Exception, place: Place, what: str) -> str:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return f"its authors ask for consent; give it at {constants.ENDPOINT}/{place.repo}, then run `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            "there is no such repository (and no such folder here); check the name, or, if it is private, log in "
            "with `hf auth login` or give a token"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"it has no revision {place.revision!r}; name a branch, a tag or a commit of it"
    if isinstance(error, errors.OfflineModeIsEnabled) or isinstance(error.__cause__, errors.OfflineModeIsEnabled):
        return f"HF_HUB_OFFLINE is set and {what} is not in the local cache; unset it, or give a local folder"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return (
            f"{constants.ENDPOINT} cannot be reached and {what} is not in the local cache; check the network, or "
            "give a local folder"
        )
    if isinstance(error, errors.EntryNotFoundError):
        return f"it has no file {what}; a plan is pushed with save_pretrained(folder, push_to_hub=True)"
    if isinstance(error, errors.LocalTokenNotFoundError):
        return "you are not logged in; run `hf auth login`, or give a token"
    if isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 403):
        return "the token may not do this; log in with one that may write, with `hf auth login`, or give it"
    said = reason_of(error)
    return f"{said}; try again" if isinstance(error, errors.HTTPError) else said
