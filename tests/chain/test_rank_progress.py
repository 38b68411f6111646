"""What several processes keep belongs together, whatever becomes of each of them."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
TESTS = Path(__file__).parent.parent
Found = dict[str, Any]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What became of the commands of parts_cases."""
    folder = tmp_path_factory.mktemp("parts")
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    subprocess.run(
        [sys.executable, str(TESTS / "support" / "parts_cases.py"), str(folder)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        check=True,
    )
    return json.loads((folder / "found.json").read_text())


def refused(found: Found, message: str) -> bool:
    """Whether every process left for wrong input, and one said why."""
    said = found["said"]
    return set(found["codes"]) == {3} and said.count("error:") == 1 and message in said


def test_whole_models_go_on_to_the_same_bytes(found: Found) -> None:
    found = found["whole_models"]
    assert found["undisturbed"]["codes"] == [0, 0]
    assert found["killed"]["codes"] == [1, -signal.SIGKILL]
    assert found["killed"]["left"] == [".out.consolidate-partial"]
    assert "resuming from step 2 of 6" in found["terminated"]["said"]
    assert "resuming from step 4 of 6" in found["interrupted"]["said"]
    assert "resuming from step 6 of 6" in found["killed measuring"]["said"]
    assert found["killed measuring"]["codes"] == [1, -signal.SIGKILL]
    assert "resuming after the last of 6 steps" in found["resumed"]["said"]
    assert "resuming after 24 of 26 examples" in found["resumed"]["said"]
    assert found["resumed"]["codes"] == [0, 0]
    assert found["same"]


def test_a_signal_to_one_stops_all_at_one_step(found: Found) -> None:
    for case, code, last in (
        ("terminated", 143, "terminated"),
        ("interrupted", 130, "interrupted"),
    ):
        stopped = found["whole_models"][case]
        assert stopped["codes"] == [code, code], stopped["said"]
        assert stopped["said"].split("\n").count(last) == 1
    said = found["whole_models"]["terminated"]["said"]
    assert said.count("stopped after step 4 of 6: the same command resumes from there") == 1


def test_other_processes_are_refused(found: Found) -> None:
    whole = found["whole_models"]
    assert refused(
        whole["one"],
        "(changed: processes 2 → 1): start that command again, or discard it with --restart",
    )
    assert refused(whole["three"], "(changed: processes 2 → 3)")
    assert refused(whole["shards"], "(changed: shard False → True)")
    assert whole["alone"]["codes"] == [-signal.SIGKILL]
    assert refused(whole["two"], "(changed: processes 1 → 2)")
    assert refused(found["shards"]["whole models"], "(changed: shard True → False")
    for kind, then in (("shards", True), ("whole models", False)):
        measured = found["fisher"][kind]
        assert refused(measured["three"], "(changed: processes 2 → 3): start that command again")
        assert refused(measured["other"], f"(changed: shard {then} → {not then})")


def test_a_restart_throws_away_what_others_have_kept(found: Found) -> None:
    whole, shards = found["whole_models"], found["shards"]
    assert whole["two"]["left"] == [".out-3.consolidate-partial"]
    assert whole["restarted"]["codes"] == [0, 0]
    assert not re.search("going on|resuming", whole["restarted"]["said"])
    assert whole["same restarted"]
    assert ".out-2.consolidate-partial-1" in shards["killed again"]["left"]
    alone = shards["restarted alone"]
    assert alone["codes"] == [0]
    assert alone["left"] == []
    assert not re.search("going on|resuming", alone["said"])


def test_torchrun_is_stopped_and_goes_on(found: Found) -> None:
    # Stopped by SIGTERM, torchrun exits with 1, but now and then aborts as it exits.
    for name, codes in (("SIGTERM", (1, -signal.SIGABRT)), ("SIGKILL", (-signal.SIGKILL,))):
        stopped = found["whole_models"][f"torchrun {name}"]
        assert stopped["codes"][0] in codes
        lines = stopped["said"].splitlines()
        assert lines.count("stopped after step 3 of 6: the same command resumes from there") == 1
        assert lines.count("stopping at the next point to resume from") == 1
        assert lines.count("terminated") == 1
        assert "resuming from step 3 of 6" in found["whole_models"][f"resumed from {name}"]["said"]
        assert found["whole_models"][f"same from {name}"]


def test_processes_that_choose_alpha_go_on_to_the_same_bytes(found: Found) -> None:
    found = found["interpolated"]
    assert found["undisturbed"]["codes"] == found["resumed"]["codes"] == [0, 0]
    tried = [f"α = {i / 10:g}: new" for i in range(1, 11)]
    assert [found["undisturbed"]["said"].count(one) for one in tried] == [1] * 10
    assert found["terminated"]["codes"] == [143, 143]
    stops = [found[name]["said"] for name in ("terminated", "killed again", "killed measuring")]
    assert [any(one in said for one in tried) for said in stops] == [True] * 3
    assert "resuming after the last of 4 steps" in found["killed again"]["said"]
    assert all(said.count("after: old") == 0 for said in stops[:2])
    assert "resuming after the last of 4 steps" in found["resumed"]["said"]
    assert found["same"]
    for name in ("killed before", "killed between", "killed after"):
        assert sorted(found[name]["codes"]) == [-signal.SIGKILL, 1], found[name]["said"]
    assert "α = 0.1: new" not in found["killed before"]["said"]
    assert "resuming after 24 of 26 examples" in found["killed between"]["said"]
    assert "of 10" in found["killed after"]["said"]
    assert found["same weighted"]


def test_processes_whose_lambda_follows_a_budget_go_on_to_the_same_bytes(found: Found) -> None:
    found = found["budgeted"]
    assert found["undisturbed"]["codes"] == found["resumed"]["codes"] == [0, 0]
    assert "nats of old loss, λ = " in found["undisturbed"]["said"]
    assert found["terminated"]["codes"] == [143, 143]
    assert sorted(found["killed"]["codes"]) == [-signal.SIGKILL, 1], found["killed"]["said"]
    assert "resuming from step" in found["killed"]["said"] + found["resumed"]["said"]
    assert found["same"]


def test_shards_go_on_to_the_same_bytes(found: Found) -> None:
    found = found["shards"]
    # Of the third moment one part was published and the other prepared only.
    assert found["killed"]["codes"] == [1, -signal.SIGKILL]
    assert ".out.consolidate-partial-1-new" in found["killed"]["left"]
    assert "resuming from step 3 of 6" in found["terminated"]["said"]
    assert found["terminated"]["codes"] == [143, 143]
    assert "resuming from step 6 of 6" in found["killed measuring"]["said"]
    assert "resuming after the last of 6 steps" in found["resumed"]["said"]
    assert "resuming after 12 of 15 examples" in found["resumed"]["said"]
    assert found["resumed"]["codes"] == [0, 0]
    assert found["same"]


def test_parts_without_the_others_are_refused(found: Found) -> None:
    said = "no saved progress is complete over all processes: restore the missing files"
    assert refused(found["shards"]["incomplete"], said)


def test_where_one_part_cannot_be_kept_none_is(found: Found) -> None:
    undisturbed = found["shards"]["undisturbed"]
    assert undisturbed["codes"] == [0, 0]
    note = "the training continues: another process could not save its part"
    assert undisturbed["said"].count(note) == 1


def test_a_measurement_goes_on_to_the_same_bytes(found: Found) -> None:
    for kind, codes, done in (
        ("shards", [-signal.SIGKILL, 1], "12 of 21"),
        ("whole models", [1, -signal.SIGKILL], "24 of 26"),
    ):
        measured = found["fisher"][kind]
        assert measured["undisturbed"]["codes"] == [0, 0]
        assert measured["killed"]["codes"] == codes
        assert f"resuming after {done} examples" in measured["resumed"]["said"]
        assert measured["same"]
