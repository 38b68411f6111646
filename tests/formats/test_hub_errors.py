"""A Hub that fails, lies or hangs: the exit code, what is said, and that nothing was changed."""

from pathlib import Path

import pytest
from huggingface_hub import HfApi

from formats import hub_errors
from formats.errors import InputError, NetworkError
from formats.hub_errors import AccessError, hub_call
from scripts.robustness.lying_hub import (
    CASES,
    LIMIT,
    ODD,
    PORTAL,
    answer,
    info,
    make_checkpoint,
    outcomes,
    status,
)
from scripts.robustness.records import Record
from support.loopback_hub import ALWAYS, HANG, TOKEN, Hub, run, run_python


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("made") / "checkpoint")


@pytest.fixture(scope="module")
def found(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    return outcomes(tmp_path_factory.mktemp("cases"), checkpoint)


@pytest.mark.parametrize(
    "number", range(len(CASES)), ids=[f"{n} {what}" for n, (what, *_) in enumerate(CASES)]
)
def test_a_hub_that_fails_lies_or_hangs(number: int, found: list[Record]) -> None:
    assert found[number]["right"], found[number]
    assert not found[number]["changed"], found[number]


def test_a_wrong_token_is_told_as_such(checkpoint: Path, tmp_path: Path, hub: Hub) -> None:
    hub.put("user/model", checkpoint)
    wrong = {"HF_ENDPOINT": hub.address, "HF_TOKEN": "hf_expired"}
    code, _, err = run(tmp_path, "verify", "user/model", **wrong)
    told = "the Hub rejects the token of {} (Invalid credentials in Authorization header)"
    assert (code, told.format("HF_TOKEN") in err) == (3, True), err
    assert "`hf auth login`" in err
    (tmp_path / "cache").mkdir(exist_ok=True)
    (tmp_path / "cache" / "token").write_text("hf_expired")
    words = (
        "evaluate",
        checkpoint,
        "--model",
        "support.networks:make_network",
        "--data",
        "user/rows",
    )
    code, _, err = run_python(tmp_path, "-m", "consolidate", *words, HF_ENDPOINT=hub.address)
    assert (code, f"user/rows: {told.format('`hf auth login`')}" in err) == (3, True), err
    words = ("push", checkpoint, "user/model", "--public", "--token", "hf_other")
    code, _, err = run(tmp_path, *words, HF_ENDPOINT=hub.address)
    assert (code, f"user/model: {told.format('--token')}" in err) == (3, True), err


def test_a_hub_that_answers_401_to_everything(tmp_path: Path, hub: Hub) -> None:
    hub.fail("", 401, times=ALWAYS)
    for token, words in (
        ("", "requires a login; use `hf auth login`, or set HF_TOKEN"),
        ("hf_expired", "rejects the token of HF_TOKEN; set a valid one"),
        ("hf_\u00e9", "it contains invalid characters"),
    ):
        variables = {"HF_ENDPOINT": hub.address, "HF_TOKEN": token}
        code, _, err = run(tmp_path, "verify", "user/model", **variables)
        assert (code, words in err) == (3, True), err


def test_what_the_cache_holds_is_read_when_the_hub_fails(
    checkpoint: Path, tmp_path: Path, hub: Hub
) -> None:
    hub.put("user/model", checkpoint)
    assert run(tmp_path, "verify", "user/model", HF_ENDPOINT=hub.address)[0] == 0
    for failure, token, why in (
        (status(503), TOKEN, "the Hub responds with status 503"),
        (answer(PORTAL), TOKEN, "is not JSON"),
        (None, "hf_expired", "rejects the token of HF_TOKEN"),
    ):
        hub.failures.clear()
        if failure is not None:
            hub.fail("^GET /api/", times=ALWAYS, **failure)
        variables = {"HF_ENDPOINT": hub.address, "HF_TOKEN": token}
        code, _, err = run(tmp_path, "verify", "user/model", **variables)
        assert code == 0, err
        assert "user/model: " in err
        assert why in err
        assert "; using the copy in the cache" in err


def test_a_repository_that_cannot_be_made(checkpoint: Path, tmp_path: Path, hub: Hub) -> None:
    variables = {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN}
    words = ("-m", "consolidate", "push", checkpoint, "user/model")
    for failure, expected, said in ((answer({}), 3, ODD), ({"status": HANG}, 75, "ReadTimeout")):
        hub.fail("^POST /api/repos/create", **failure)
        # An interpreter of its own: a process reads the limit once.
        code, _, err = run_python(tmp_path, *words, **variables, **{LIMIT: "0.5"})
        assert (code, said in err) == (expected, True), err
        assert "sets no option" not in err
    code, _, err = run_python(tmp_path, *words, **variables, **{LIMIT: "soon"})
    assert (
        code,
        "CONSOLIDATE_HUB_TIMEOUT: expected a number of seconds above 0, found 'soon'" in err,
    ) == (2, True), err


def test_a_tag_that_fails_is_set_by_the_next_push(
    checkpoint: Path, tmp_path: Path, hub: Hub
) -> None:
    variables = {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN}
    hub.fail("^POST .*/tag/", 403, message="tags are for owners")
    words = ("push", checkpoint, "user/model", "--tag", "v1")
    code, _, err = run(tmp_path, *words, **variables)
    commit = hub.repositories["user/model"].branches["main"]
    told = f"user/model: the commit {commit} was made, but not the tag 'v1': "
    assert (code, told in err, "tags are for owners" in err) == (3, True, True), err
    code, _, err = run(tmp_path, *words, **variables)
    assert (code, hub.repositories["user/model"].tags) == (0, {"v1": commit}), err


def test_what_is_not_the_hubs_passes(checkpoint: Path, tmp_path: Path, hub: Hub) -> None:
    with pytest.raises(KeyError), hub_call("user/model: "):
        {}["ours"]
    hub.put("user/model", checkpoint)
    (tmp_path / "file").touch()
    api = HfApi(endpoint=hub.address, token=False)
    with pytest.raises(NotADirectoryError), hub_call("user/model: "):
        api.hf_hub_download("user/model", "config.json", cache_dir=tmp_path / "file" / "cache")


def test_a_revision_of_a_dataset_for_which_the_hub_names_no_commit(
    tmp_path: Path, hub: Hub
) -> None:
    hub.fail("^GET /api/datasets/user/rows", times=ALWAYS, **info(sha=None))
    script = "from formats.hub_dataset import open_hub; open_hub('user/rows', revision='main')"
    variables = {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN}
    code, _, err = run_python(tmp_path, "-c", script, **variables)
    assert code == 1
    assert "InputError: user/rows: a response of the Hub names no commit" in err


def test_a_proxy_that_cannot_be_used_is_no_answer_of_the_hub(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hub_errors, "_in_client", lambda error: True)
    found = hub_errors.explain(ImportError("Using SOCKS proxy, but 'socksio' is not installed"))
    assert type(found) is NetworkError
    assert "install socksio" in str(found)


@pytest.mark.parametrize("kind", [OSError, RuntimeError])
@pytest.mark.parametrize(
    ("text", "full"),
    [
        ("I/O error: No space left on device (os error 28)", True),
        ("I/O error: quota (os error 122)", True),
        ("connection reset (os error 104)", False),
    ],
)
def test_a_transfer_that_fills_the_disk_is_not_tried_again(
    kind: type[Exception], text: str, full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """hf_xet has a message alone, and no number."""
    monkeypatch.setattr(hub_errors, "_in_client", lambda error: True)
    found = hub_errors.explain(kind(text))
    assert type(found) is (InputError if full else NetworkError)


def test_what_the_storage_refuses_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_errors, "_in_client", lambda error: True)
    assert type(hub_errors.explain(PermissionError("xet: no"))) is AccessError
