"""Who may write where on the hub is known before anything is uploaded."""

from __future__ import annotations

import pytest
from local_hub import ACCOUNT, join, serving

from distprune import InputError
from distprune.checkpoint import check_may_write


@pytest.fixture
def hub(sharded, tmp_path, monkeypatch):
    with serving(sharded) as hub:
        join(hub, tmp_path / "cache", monkeypatch)
        yield hub


def with_token(**token) -> dict:
    return ACCOUNT | {"auth": {"accessToken": token}}


def fine_grained(*scopes) -> dict:
    scoped = [{"entity": {"name": name}, "permissions": permissions} for name, *permissions in scopes]
    return with_token(role="fineGrained", fineGrained={"scoped": scoped})


@pytest.mark.parametrize("repository", ["me/model", "me/", "model", "org/model", "org/"])
def test_a_token_may_write_to_its_owners_and_their_organizations_repositories(hub, repository):
    check_may_write(repository)


@pytest.mark.parametrize(
    ("account", "repository", "reason"),
    [
        (ACCOUNT, "others/model", "the token is of me and of library, org, and not of others"),
        (ACCOUNT, "library/", "me may only read in library"),
        (with_token(role="read"), "me/model", "the token may not write there. Make one"),
        (fine_grained(), "me/model", "the token may not write"),
        (fine_grained(("me", "repo.content.read")), "me/model", "the token may not write"),
        (fine_grained(("me", "repo.write")), "org/model", "the token may not write"),
    ],
)
def test_a_token_that_may_not_is_refused_with_the_reason(hub, account, repository, reason):
    hub.account = account
    with pytest.raises(InputError, match=f"hf://{repository}: {reason}"):
        check_may_write(repository)


@pytest.mark.parametrize(
    "account",
    [fine_grained(("org", "repo.write")), fine_grained(("org/model", "repo.write")), with_token(), {"name": "org"}],
)
def test_a_token_of_fine_grain_or_of_an_unknown_kind_may_write_where_it_says_or_the_hub_decides(hub, account):
    hub.account = account
    check_may_write("org/model")


def test_no_token_a_wrong_one_and_no_hub_are_named(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    with pytest.raises(InputError, match=r"hf://me/model: the hub does not take the token, .*Set HF_TOKEN"):
        check_may_write("me/model")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("distprune.checkpoint.hub_access.get_token", lambda: None)
    with pytest.raises(InputError, match="hf://me/model: the hub asks for a token"):
        check_may_write("me/model")
