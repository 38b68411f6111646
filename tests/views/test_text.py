"""What is printed of a result; the texts of the commands are looked at where those are tested."""

import json
import math

from consolidate.views.text import json_text, metrics_text, plain
from formats.wording import few


def test_json_has_no_numbers_that_json_lacks() -> None:
    result = {"a": [math.nan, 1.5, {"b": math.inf}], "c": (-math.inf, None), "d": True}
    expected = {"a": [None, 1.5, {"b": None}], "c": [None, None], "d": True}
    assert json.loads(json_text(result)) == expected


def test_what_could_steer_a_terminal_is_escaped() -> None:
    assert plain("a\x1b[31m\nü") == "a\\x1b[31m\nü"
    name = "\x1b[31m\u202eü"
    assert json_text({name: 1}) == '{\n  "\\u001b[31m\\u202eü": 1\n}'
    assert json.loads(json_text({name: 1})) == {name: 1}


def test_what_was_not_measured_of_a_task_is_a_dash() -> None:
    text = metrics_text({"a": {"loss": 1.0, "accuracy": 0.5}, "longer": {"loss": 2.0}})
    assert text.splitlines()[1].split() == ["a", "1.0000", "0.5000"]
    assert text.splitlines()[2].split() == ["longer", "2.0000", "–"]


def test_a_long_list_is_cut_and_counted() -> None:
    assert few(["a", "b", "c"], 3) == "a, b, c"
    assert few(["a", "b", "c"], 1) == "a and 2 more"
