"""Publishing a verified export on the Hub."""

from __future__ import annotations

import fnmatch
import hashlib
import json
from pathlib import Path

import httpx
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import get_token, validate_repo_id

from posttrain.export.card import for_hub, is_hub_id
from posttrain.export.export import MARKER, is_verified
from posttrain.models.load import ADAPTER_CONFIG, BUNDLED_BASE

# what decides how a repository loads: left over from an earlier export, it would be mixed with the new one
_LOADABLE = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    ADAPTER_CONFIG,
)

AGAIN = "Nothing was published. Push again: files that have arrived are not sent twice"


class PushError(RuntimeError):
    """The export was not published; the message says why and what to do. It never holds the token."""


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    token: str | None = None,
    endpoint: str | None = None,
    revision: str | None = None,
) -> str:
    """Upload an export of :func:`posttrain.export.export.export_model` in one commit, and return its address.

    What is uploaded differs from the folder in three places: the card's loading code downloads the
    repository, the adapter's configuration points to its bundled base as ``./base`` instead of a folder of
    this machine, and weights of an earlier export that the new one does not replace are deleted from the
    branch (its history keeps them).

    Args:
        folder: The export; refused when it was not verified or was changed since.
        repo_id: ``user/name``; created when it does not exist.
        private: Create the repository private; an existing public one is then refused.
        token: Access token with write permission; the one of ``hf auth login`` or ``HF_TOKEN`` when None.
        endpoint: Address of another Hub; ``HF_ENDPOINT`` or the public one when None.
        revision: Branch to write to, created when it does not exist; the main one when None.

    Raises:
        PushError: Not verified, not allowed, not reachable, interrupted, or nobody else could load it.
    """
    folder = Path(folder)
    problem = is_verified(folder)
    if problem is not None:
        raise PushError(f"refusing to push: {problem}. Export it first; only what was read back is published")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise PushError(f"{repo_id!r} is not a repository name: write user/name") from error
    changed = _changed_for_hub(folder, repo_id, revision)
    token = token or get_token()
    if not token:
        raise PushError(
            "no access token: run 'hf auth login', or set HF_TOKEN to a token with write permission"
        )
    api = HfApi(endpoint=endpoint, token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if private and api.repo_info(repo_id).private is False:
            raise PushError(
                f"{repo_id} exists and is public, but a private push was asked for: make it private in "
                f"its settings, push to another name, or ask for a public push (private: false)"
            )
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        sent = sorted(
            path.relative_to(folder).as_posix()
            for path in folder.rglob("*")
            if path.is_file() and not path.relative_to(folder).as_posix().startswith(".cache/")
        )
        there = api.list_repo_files(repo_id, revision=revision)
        stale = [
            name
            for name in there
            if name not in sent and any(fnmatch.fnmatch(Path(name).name, p) for p in _LOADABLE)
        ]
        commit = api.create_commit(
            repo_id,
            operations=[
                *(CommitOperationAdd(name, changed.get(name, str(folder / name))) for name in sent),
                *(CommitOperationDelete(name) for name in stale),
            ],
            commit_message="Upload an export of posttrain",
            revision=revision,
        )
    except OfflineModeIsEnabled as error:
        raise PushError("the Hub is switched off: unset HF_HUB_OFFLINE to push") from error
    except HfHubHTTPError as error:
        raise PushError(_explain(error, repo_id).replace(token, "***")) from None
    except (httpx.HTTPError, OSError) as error:
        words = f"{type(error).__name__}: {error}".replace(token, "***")
        raise PushError(f"the connection to {api.endpoint} failed ({words}). {AGAIN}") from None
    except ValueError as error:  # the Hub's opinion on the card's front matter
        raise PushError(f"the Hub refuses the card of {folder}: {error}".replace(token, "***")) from None
    return str(commit.repo_url)


def _changed_for_hub(folder: Path, repo_id: str, revision: str | None) -> dict[str, bytes]:
    """Return the files whose content on the Hub differs from the folder's, by name."""
    changed = {"README.md": for_hub((folder / "README.md").read_text(), repo_id, revision).encode()}
    marker = json.loads((folder / MARKER).read_text())
    if marker["format"] == "delta" and not is_hub_id(marker["base"]):
        raise PushError(
            f"the delta's base is the local folder {marker['base']!r}, which nobody else can load: push the "
            f"base, or find it on the Hub, and export again with --base user/name"
        )
    path = folder / ADAPTER_CONFIG
    if path.is_file():
        config = json.loads(path.read_text())
        base = config["base_model_name_or_path"]
        if (folder / BUNDLED_BASE).is_dir():
            config["base_model_name_or_path"] = f"./{BUNDLED_BASE}"
            changed[ADAPTER_CONFIG] = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
            marker["files"][ADAPTER_CONFIG] = hashlib.sha256(changed[ADAPTER_CONFIG]).hexdigest()
            changed[MARKER] = (json.dumps(marker, indent=1) + "\n").encode()
        elif not is_hub_id(base):
            raise PushError(
                f"the adapter's base is the local folder {base!r}, which nobody else can load: export "
                f"again with bundle_base=True or format 'merged', or push the base and name its Hub id in "
                f"base_path"
            )
    return changed


def _explain(error: HfHubHTTPError, repo_id: str) -> str:
    status = error.response.status_code
    namespace = repo_id.rpartition("/")[0] or "your account"
    reasons = {
        401: "the Hub does not accept the access token: log in again (hf auth login)",
        403: f"the token may not write to {namespace}: use one with write permission there",
        404: f"{repo_id} was not found, or the token may not see it: check both",
        409: f"{repo_id} was changed by someone else meanwhile. {AGAIN}",
        413: "a file is too large for the Hub",
        429: f"too many requests: wait a few minutes. {AGAIN}",
    }
    reason = reasons.get(status, f"the Hub answered with an error. {AGAIN}")
    server = f" [{error.server_message}]" if error.server_message else ""
    return f"push to {repo_id} failed with {status}: {reason}{server}"
