"""Publish a checked folder on the Hub, or on any server that speaks its API.

    python -m hub_export push outputs/smoldriver your-name/smoldriver --dry_run
    python -m hub_export push outputs/smoldriver your-name/smoldriver --private

    # a server of one's own; few of them speak Xet
    export HF_ENDPOINT=http://localhost:8000 HF_HUB_DISABLE_XET=1
    python -m hub_export push outputs/smoldriver your-name/smoldriver

One commit makes the repository what the folder is: files are uploaded first and appear together or not at all. A
second, small commit writes that commit's hash into the card's snippet; its own hash a card cannot know. The same
command again continues where a lost connection left off (what is on the server is not sent again), and does nothing
where nothing has changed. The token is huggingface_hub's: `hf auth login` or HF_TOKEN.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2  # what huggingface_hub speaks HTTP with
from huggingface_hub import CommitOperation, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import sha

from hub_export.card import pinned
from hub_export.check import read_stamp
from hub_export.refuse import published_files

CARD = "README.md"
KEPT = {".gitattributes"}  # the server's own


@dataclass
class PushArguments:
    folder: str = field(metadata={"help": "Exported folder that passed its check.", "positional": True})
    repo_id: str = field(metadata={"help": "Owner and name, as in your-name/smoldriver.", "positional": True})
    private: bool = field(default=False, metadata={"help": "Create the repository as a private one."})
    pr: bool = field(default=False, metadata={"help": "Open a pull request in place of committing to main."})
    dry_run: bool = field(default=False, metadata={"help": "Show files and sizes; nothing is sent."})
    message: str = field(default="Publish a checked export", metadata={"help": "Of the commit."})


def remote_files(api: HfApi, repo_id: str, revision: str) -> dict[str, str]:
    """{path: sha256 of large files, git's own hash of small ones} on the server; empty for a new repository."""
    try:
        entries = list(api.list_repo_tree(repo_id, recursive=True, revision=revision))
    except RevisionNotFoundError:
        return {}
    files = [entry for entry in entries if isinstance(entry, RepoFile) and entry.path not in KEPT]
    return {file.path: file.lfs.sha256 if file.lfs else file.blob_id for file in files}


def is_same(path: Path, remote: str, sha256: str) -> bool:
    """Whether the server's file has the content of `path`, whose sha256 is known from the stamp."""
    if len(remote) == len(sha256):
        return remote == sha256
    return remote == sha.git_hash(path.read_bytes())


def publish(api: HfApi, args: PushArguments, stamp: dict[str, Any]) -> str:
    """Upload and commit what differs from the server; returns the commit that the card's snippet names."""
    folder = Path(args.folder)
    hashes: dict[str, str] = stamp["files"]
    remote = remote_files(api, args.repo_id, "main")
    changed = [name for name in hashes if name not in remote or not is_same(folder / name, remote[name], hashes[name])]
    removed = sorted(set(remote) - set(hashes))

    local_card = (folder / CARD).read_text()
    if not removed and set(changed) <= {CARD} and CARD in remote:
        # The content is there. If its card is there too, with some commit written in, there is nothing to do.
        card = Path(api.hf_hub_download(args.repo_id, CARD)).read_text()
        for commit in api.list_repo_commits(args.repo_id):
            if card == pinned(local_card, card_name(local_card), args.repo_id, commit.commit_id):
                print(f"{args.repo_id} is up to date")
                return commit.commit_id
    operations: list[CommitOperation] = [CommitOperationAdd(name, str(folder / name)) for name in changed]
    operations += [CommitOperationDelete(name) for name in removed]
    info = api.create_commit(
        args.repo_id, operations, commit_message=args.message, revision="main", create_pr=args.pr, num_threads=2
    )
    branch = info.pr_revision if args.pr else "main"
    card = pinned(local_card, card_name(local_card), args.repo_id, info.oid)
    api.create_commit(
        args.repo_id,
        [CommitOperationAdd(CARD, card.encode())],
        commit_message=f"Pin the card's snippet to {info.oid[:12]}",
        revision=branch,
        parent_commit=None if args.pr else info.oid,  # somebody else's commit in between must not be hidden
    )
    if args.pr:
        print(f"pull request: {info.pr_url}")
    return info.oid


def card_name(card: str) -> str:
    """The local name that the card's snippet loads."""
    for line in card.splitlines():
        if line.startswith("# "):
            return line.removeprefix("# ")
    raise ValueError("README.md has no title")


def main(args: PushArguments) -> str | None:
    """Publish; returns the commit to pin, or None after a dry run.

    Raises:
        ValueError: no stamp, files changed since the check, a refused token, or a lost connection.
    """
    folder = Path(args.folder)
    if args.repo_id.count("/") != 1:
        raise ValueError(f"repo_id must be owner/name, as in your-name/smoldriver; got {args.repo_id!r}")
    stamp = read_stamp(folder)
    tested = ", ".join(environment["versions"]["transformers"] for environment in stamp["environments"])
    files = published_files(folder)
    for path in files:
        print(f"{path.stat().st_size:>14,}  {path.relative_to(folder).as_posix()}")
    total = sum(path.stat().st_size for path in files)
    print(f"{total:>14,}  bytes in {len(files)} files, checked with transformers {tested}")
    if args.dry_run:
        print(f"dry run: nothing was sent to {args.repo_id}")
        return None

    api = HfApi()
    try:
        name = api.whoami()["name"]
    except (HfHubHTTPError, LocalTokenNotFoundError) as error:
        raise ValueError(
            f"{api.endpoint} does not accept the token ({short(error)}); log in with `hf auth login` or set HF_TOKEN "
            "to a token that may write"
        ) from error
    except (OSError, RuntimeError, httpx2.HTTPError) as error:
        raise ValueError(f"{api.endpoint} cannot be reached: {short(error)}") from error
    try:
        if not args.pr:
            api.create_repo(args.repo_id, private=args.private, exist_ok=True)
        revision = publish(api, args, stamp)
    except RepositoryNotFoundError as error:
        raise ValueError(f"{args.repo_id} is not there, or {name} may not see it; create it without --pr") from error
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (401, 403):
            raise ValueError(f"{name} may not write to {args.repo_id}: {short(error)}") from error
        raise ValueError(interrupted(args.repo_id, error)) from error
    except (OSError, RuntimeError, httpx2.HTTPError) as error:
        raise ValueError(interrupted(args.repo_id, error)) from error
    print(f"{api.endpoint}/{args.repo_id} at revision {revision}")
    return revision


def interrupted(repo_id: str, error: Exception) -> str:
    """What a lost connection means for whoever pushed."""
    return (
        f"the upload was interrupted ({short(error)}). {repo_id} is as it was before the commit that failed; run the "
        "same command again: what has arrived is not sent again"
    )


def short(error: Exception) -> str:
    """An error in one line, with its cause if it only wraps one."""
    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
    return " ".join(f"{type(cause).__name__}: {cause}".split())[:300]
