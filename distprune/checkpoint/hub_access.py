"""Whether this machine's token may write to a place on the Hugging Face hub, as far as the hub tells beforehand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub import HfApi, get_token

from distprune.errors import InputError

TOKENS = "https://huggingface.co/settings/tokens"
WRITE = "repo.write"


def check_may_write(repository: str) -> None:
    """See that the token is there and may write to a repository, or to any in a namespace.

    Args:
        repository: ``NAMESPACE/NAME``, ``NAMESPACE/``, or ``NAME`` in the namespace of the token's owner.

    Raises:
        InputError: there is no token, or it may not; names the fix.
    """
    if get_token() is None:
        raise InputError(f"hf://{repository}: the hub asks for a token. Set HF_TOKEN, or log in with `hf auth login`.")
    try:
        account = HfApi().whoami()
    except Exception as error:  # the hub's client and its transport share no base class
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"hf://{repository}: the hub does not take the token, or can't be reached. Set HF_TOKEN, or log in with "
            f"`hf auth login`, and check the network. What was said: {reason}"
        ) from error
    owner = account["name"]
    namespace = repository.partition("/")[0] if "/" in repository else owner
    roles = {org["name"]: org.get("roleInOrg") for org in account.get("orgs", ())}
    if namespace != owner and namespace not in roles:
        members = f" and of {', '.join(sorted(roles))}" if roles else ""
        raise InputError(
            f"hf://{repository}: the token is of {owner}{members}, and not of {namespace}. Choose a repository of "
            "theirs, or set HF_TOKEN to another token."
        )
    if roles.get(namespace) == "read":
        raise InputError(f"hf://{repository}: {owner} may only read in {namespace}. Ask for the role to write there.")
    if not token_may_write(account.get("auth", {}).get("accessToken", {}), namespace, repository):
        raise InputError(f"hf://{repository}: the token may not write there. Make one that may at {TOKENS}.")


def token_may_write(token: Mapping[str, Any], namespace: str, repository: str) -> bool:
    """Whether a token's role lets it write; of one whose role is unknown the hub will tell."""
    if token.get("role") != "fineGrained":
        return token.get("role") != "read"
    scopes = token.get("fineGrained", {}).get("scoped", ())
    return any(
        WRITE in scope["permissions"] and scope["entity"].get("name") in (namespace, repository) for scope in scopes
    )
