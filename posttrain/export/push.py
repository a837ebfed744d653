"""Publishing a verified export on the Hub.

One repository, one commit: nobody sees half an export. What the Hub has received stays there for a while,
also when the commit never came, and is not sent again. An adapter whose base is in the export (nobody else
has it) comes with a second repository, ``NAME-base``: PEFT and transformers look for a base at an address.

The access token goes into the requests and nowhere else: messages are cleared of it, and so are the errors
behind them, which hold requests with their headers and are not chained.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import json
import logging
import os
import re
import shlex
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import httpx
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    constants,
    get_session,
)
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import build_hf_headers, get_token, validate_repo_id

from posttrain.export.card import base_card, for_hub, is_hub_id, license_of_card, with_license
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

WAITS = (2.0, 10.0)
"""Seconds before a second and a third attempt, when the connection or the Hub failed."""

_PASSING = frozenset({429, 500, 502, 503, 504})
_CREDENTIALS = re.compile(r"(\w+://)[^/@\s]+@")


class PushError(RuntimeError):
    """The export was not published; the message says why and what to do. It never holds the token."""


class PushRefusedError(PushError):
    """The push cannot work as it was asked for: known before anything is exported or sent."""


@dataclass(frozen=True)
class _Hub:
    """Who writes where.

    Attributes:
        api: Client of the Hub.
        token: Access token.
        repo_id: ``user/name``.
        private: Whether nobody else may see it.
        again: The command that repeats the push.
    """

    api: HfApi
    token: str = field(repr=False)
    repo_id: str
    private: bool
    again: str | None = None

    @property
    def endpoint(self) -> str:
        """Address of the Hub, without credentials."""
        return _CREDENTIALS.sub(r"\1***@", str(self.api.endpoint))

    @contextlib.contextmanager
    def explained(self, repo_id: str, *, known: str) -> Iterator[None]:
        """Turn what the client raises into sentences without the token, and without the error behind it."""
        try:
            yield
        except PushError:
            raise
        except OfflineModeIsEnabled:
            _refuse_offline()
        except Exception as error:  # hf_xet's own may hold the headers of a request
            cause = error.__cause__ if type(error) is RuntimeError and error.__cause__ else error
            text = f"{self._words(cause, repo_id)}{known}"
        else:
            return
        raise PushError(_CREDENTIALS.sub(r"\1***@", text.replace(self.token, "***"))) from None

    def _words(self, error: BaseException, repo_id: str) -> str:
        if isinstance(error, HfHubHTTPError):
            return _explain(error, repo_id)
        if isinstance(error, httpx.HTTPError | OSError):
            return f"the connection to {self.endpoint} failed ({type(error).__name__}: {error})"
        if isinstance(error, ValueError):  # the Hub's opinion on the front matter, an answer one cannot read
            return f"{self.endpoint} refuses the upload: {error}"
        return f"the upload to {self.endpoint} failed ({type(error).__name__}: {error})"


def preflight(
    repo_id: str, *, private: bool = True, token: str | None = None, endpoint: str | None = None
) -> None:
    """Refuse a push that cannot work, before the work whose result it would publish.

    Asks the Hub who owns the token and whether the repository exists; nothing is written.

    Args:
        repo_id: See :func:`push`, also for the others.
        private: Whether nobody else may see it.
        token: Access token.
        endpoint: Address of another Hub.

    Raises:
        PushRefusedError: The Hub is switched off or not reachable, there is no token or one that may only
            read, the name is none, or the repository exists with another visibility.
    """
    hub = _hub(repo_id, private, token, endpoint)
    try:
        with hub.explained(repo_id, known=""):
            _check_token(hub)
            _check_visibility(hub, _info(hub, repo_id))
    except PushRefusedError:
        raise
    except PushError as error:
        raise PushRefusedError(f"{error}. Nothing was exported or sent") from None


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

    The folder is only read. What is uploaded differs from it: the card's loading code downloads the
    repository, a bundled base goes to a repository of its own, ``NAME-base``, which the adapter's
    configuration then names, and weights of an earlier export that the new one does not replace are
    deleted from the branch (its history keeps them).

    Args:
        folder: The export; refused when it was not verified or was changed since.
        repo_id: ``user/name``; created when it does not exist.
        private: Create the repository private; an existing public one is then refused, and the other way
            round.
        token: Access token with write permission; the one of ``hf auth login`` or ``HF_TOKEN`` when None.
        endpoint: Address of another Hub; ``HF_ENDPOINT`` as it is now, or the public one, when None.
        revision: Branch to write to, created when it does not exist; the main one when None.

    Raises:
        PushRefusedError: Not verified, no token, no name, offline, another visibility, or nobody else could
            load it.
        PushError: Not allowed, not reachable or interrupted; what has arrived is not sent twice.
    """
    folder = Path(folder)
    problem = is_verified(folder)
    if problem is not None:
        raise PushRefusedError(
            f"refusing to push: {problem}. Export it first; only what was read back is published"
        )
    marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    _refuse_local_base(folder, marker)
    hub = _hub(repo_id, private, token, endpoint, folder=folder)
    known = "" if hub.again is None else f". {_kept(folder)}. Push again: {hub.again}"
    with hub.explained(repo_id, known=known):
        base: tuple[str, str | None] | None = None
        if (folder / BUNDLED_BASE).is_dir():
            base_id = f"{repo_id}-base"
            license = ModelCard.load(folder / "README.md", ignore_metadata_errors=True).data
            card = base_card(base_id, repo_id, license_of_card(license))
            files = {**_files(folder / BUNDLED_BASE), "README.md": card.encode()}
            _, commit = _upload(hub, base_id, files, None)
            base = (base_id, commit)
        address, _ = _upload(hub, repo_id, _for_hub(hub, folder, marker, base, revision), revision)
    return address


def can_push(folder: Path) -> bool:
    """Return whether a folder is a verified export that others could load as it is."""
    if is_verified(folder) is not None:
        return False
    try:
        _refuse_local_base(folder, json.loads((folder / MARKER).read_text(encoding="utf-8")))
    except PushRefusedError:
        return False
    return True


# ---- what is known before ----------------------------------------------------------------------------------


def _hub(
    repo_id: str, private: bool, token: str | None, endpoint: str | None, *, folder: Path | None = None
) -> _Hub:
    if constants.HF_HUB_OFFLINE:
        _refuse_offline()
    try:
        validate_repo_id(repo_id)
        validate_repo_id(f"{repo_id}-base")
    except HFValidationError as error:
        raise PushRefusedError(f"{repo_id!r} is not a repository name: write user/name ({error})") from None
    if "/" not in repo_id:
        raise PushRefusedError(f"{repo_id!r} is not a repository name: write user/name, with the account")
    token = token or get_token()
    if not token:
        raise PushRefusedError(
            "no access token: run 'hf auth login', or set HF_TOKEN to a token with write permission "
            "(made at https://huggingface.co/settings/tokens)"
        )
    endpoint = endpoint or os.environ.get("HF_ENDPOINT", "").rstrip("/") or None
    command = None
    if folder is not None:
        command = shlex.join(["posttrain", "export", str(folder), "--push", repo_id])
        command += "" if private else " --public"
    return _Hub(HfApi(endpoint=endpoint, token=token), token, repo_id, private, command)


def _refuse_offline() -> NoReturn:
    raise PushRefusedError(
        "the Hub is switched off: unset HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) to push, or drop the push"
    )


def _check_token(hub: _Hub) -> None:
    """Refuse a token that the Hub does not know, or that may only read; other Hubs need not answer."""
    try:
        who: Mapping[str, Any] = hub.api.whoami()
    except HfHubHTTPError as error:
        if error.response.status_code == 401:
            raise PushRefusedError(
                f"{hub.endpoint} does not accept the access token (401): log in again (hf auth login), or "
                f"set HF_TOKEN to one that is valid"
            ) from None
        return
    except ValueError:
        return
    access = (who.get("auth") or {}).get("accessToken") or {}
    if access.get("role") == "read":
        raise PushRefusedError(
            "the access token may only read: make one with write permission at "
            "https://huggingface.co/settings/tokens"
        )


def _info(hub: _Hub, repo_id: str, revision: str | None = None) -> Any:
    """Return what the Hub tells about a repository, or None where it does not exist or nothing is told."""
    try:
        return hub.api.repo_info(repo_id, revision=revision)
    except HfHubHTTPError as error:
        status = error.response.status_code
        message = error.server_message or ""
        if status == 401 and "credentials" in message.lower():
            raise
        if status in (403, *_PASSING):
            raise
        return None


def _check_visibility(hub: _Hub, info: Any) -> None:
    found = getattr(info, "private", None)
    if hub.private and found is False:
        raise PushRefusedError(
            f"{info.id} exists and is public, but a private push was asked for: push to another name, make "
            f"it private in its settings, or ask for a public push (--public; in a configuration export: "
            f"{{private: false}})"
        )
    if not hub.private and found is True:
        raise PushRefusedError(
            f"{info.id} exists and is private, but a public push was asked for: make it public in its "
            f"settings, push to another name, or drop --public (export: {{private: true}})"
        )


def _refuse_local_base(folder: Path, marker: Mapping[str, Any]) -> None:
    if marker["format"] == "delta" and not is_hub_id(marker["base"]):
        raise PushRefusedError(
            f"the delta's base is the local folder {marker['base']!r}, which nobody else can load: push the "
            f"base, or find it on the Hub, and export again with --base user/name"
        )
    path = folder / ADAPTER_CONFIG
    if not path.is_file() or (folder / BUNDLED_BASE).is_dir():
        return
    base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    if not is_hub_id(base):
        raise PushRefusedError(
            f"the adapter's base is the local folder {base!r}, which nobody else can load: name its address "
            f"on the Hub (posttrain export RUN --base user/name), bring it along (posttrain export RUN "
            f"--push, or bundle_base=True), or export with --format merged"
        )


# ---- what is sent ------------------------------------------------------------------------------------------


def _files(folder: Path) -> dict[str, Path | bytes]:
    names = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file())
    return {name: folder / name for name in names if not name.startswith(".cache/")}


def _for_hub(
    hub: _Hub, folder: Path, marker: dict[str, Any], base: tuple[str, str | None] | None, revision: str | None
) -> dict[str, Path | bytes]:
    """Return what goes into the repository: files of the folder, or content that differs from theirs."""
    files = _files(folder)
    card = for_hub((folder / "README.md").read_text(encoding="utf-8"), hub.repo_id, revision, base=base)
    data = ModelCard(card, ignore_metadata_errors=True).data
    if not license_of_card(data) and is_hub_id(data.to_dict().get("base_model")):
        card = with_license(card, _license_on_hub(hub, data.to_dict()["base_model"]))
    files["README.md"] = card.encode()
    if base is not None:
        files = {name: file for name, file in files.items() if not name.startswith(f"{BUNDLED_BASE}/")}
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        config |= {"base_model_name_or_path": base[0], "revision": base[1]}
        content = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
        hashes = {name: value for name, value in marker["files"].items() if name in files}
        hashes[ADAPTER_CONFIG] = hashlib.sha256(content).hexdigest()
        marker |= {"base": base[0], "base_revision": base[1], "base_bundled": False, "files": hashes}
        files[ADAPTER_CONFIG] = content
        files[MARKER] = (json.dumps(marker, indent=1) + "\n").encode()
    return files


def _license_on_hub(hub: _Hub, base: str) -> dict[str, str]:
    """Read the licence in the card of a base on the Hub; nothing where there is none."""
    try:
        card = ModelCard.load(hub.api.hf_hub_download(base, "README.md"), ignore_metadata_errors=True)
    except (HfHubHTTPError, httpx.HTTPError, OSError, ValueError):
        return {}
    return license_of_card(card.data)


def _upload(
    hub: _Hub, repo_id: str, files: Mapping[str, Path | bytes], revision: str | None
) -> tuple[str, str | None]:
    """Create a repository where there is none, commit files to it, and return its address and the commit.

    The commit is None where the Hub does not say that it is the newest one.
    """
    for wait in (*WAITS, None):
        try:
            with ExitStack() as stack:
                return _upload_once(hub, repo_id, files, revision, stack)
        except (HfHubHTTPError, httpx.TransportError) as error:
            passing = not isinstance(error, HfHubHTTPError) or error.response.status_code in _PASSING
            if wait is None or not passing:
                raise
            time.sleep(wait)
    raise AssertionError("unreachable")


def _upload_once(
    hub: _Hub, repo_id: str, files: Mapping[str, Path | bytes], revision: str | None, stack: ExitStack
) -> tuple[str, str | None]:
    api = hub.api
    api.create_repo(repo_id, private=hub.private, exist_ok=True)
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    info = _info(hub, repo_id, revision)
    _check_visibility(hub, info)
    there = [sibling.rfilename for sibling in getattr(info, "siblings", None) or ()]
    stale = [
        name
        for name in there
        if name not in files and any(fnmatch.fnmatch(Path(name).name, p) for p in _LOADABLE)
    ]
    # an open file is what the client sends the old way, over plain HTTP
    plain = not _has_xet(hub, repo_id, revision)
    if plain:
        stack.enter_context(_without_warnings("huggingface_hub._commit_api"))
    commit = api.create_commit(
        repo_id,
        operations=[
            *(
                CommitOperationAdd(
                    name,
                    stack.enter_context(file.open("rb")) if plain and isinstance(file, Path) else file,
                )
                for name, file in files.items()
            ),
            *(CommitOperationDelete(name) for name in stale),
        ],
        commit_message="Upload an export of posttrain",
        revision=revision,
    )
    newest = getattr(_info(hub, repo_id, revision), "sha", None)
    return str(commit.repo_url), commit.oid if commit.oid == newest else None


def _has_xet(hub: _Hub, repo_id: str, revision: str | None) -> bool:
    """Return whether a Hub takes uploads of Xet's kind: mirrors and private ones may not, and the client,
    where hf_xet is installed, would try nothing else."""
    branch = revision or constants.DEFAULT_REVISION
    address = f"{hub.api.endpoint}/api/models/{repo_id}/xet-write-token/{branch}"
    answer = get_session().get(address, headers=build_hf_headers(token=hub.token))
    if not answer.is_success:
        return False
    try:
        return bool(answer.headers.get("X-Xet-Cas-Url") or answer.json().get("casUrl"))
    except (ValueError, AttributeError):
        return False


@contextlib.contextmanager
def _without_warnings(name: str) -> Iterator[None]:
    """Leave out that buffers are not for Xet: that is what they are used for."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


# ---- words -------------------------------------------------------------------------------------------------


def _kept(folder: Path) -> str:
    return f"The export is complete in {folder}, and files that have arrived are not sent twice"


def _explain(error: HfHubHTTPError, repo_id: str) -> str:
    status = error.response.status_code
    namespace = repo_id.rpartition("/")[0]
    reasons = {
        401: "the Hub does not accept the access token: log in again (hf auth login)",
        403: f"the token may not write to {namespace}: use one with write permission there",
        404: f"{repo_id} was not found, or the token may not see it: check both",
        409: f"{repo_id} was changed by someone else meanwhile",
        413: "a file is too large for the Hub",
        429: "too many requests: wait a few minutes",
        507: "the Hub has no room left for it",
    }
    reason = reasons.get(status, "the Hub answered with an error")
    server = f" [{error.server_message}]" if error.server_message else ""
    return f"push to {repo_id} failed with {status}: {reason}{server}"
