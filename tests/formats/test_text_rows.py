import csv
import hashlib
import io
import json
import pickle
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from formats.data import open_data
from formats.errors import InputError
from formats.text_rows import CsvRows, JsonArrayRows, JsonLinesRows


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# JSON Lines


def test_json_lines_rows_columns_and_places(tmp_path):
    path = write(
        tmp_path / "train.jsonl",
        '{"text": "a", "label": 0}\n\n  \n'
        '{"text": "é\\n", "label": 1}\r\n{"text": "c", "extra": [1]}',
    )
    rows = open_data(path)
    assert rows.name == "train.jsonl"
    assert rows.columns == ["text", "label", "extra"]
    assert len(rows) == 3
    assert list(rows) == [
        {"text": "a", "label": 0, "extra": None},
        {"text": "é\n", "label": 1, "extra": None},
        {"text": "c", "label": None, "extra": [1]},
    ]
    assert rows[-1]["text"] == "c"
    assert [row["text"] for row in rows[:2]] == ["a", "é\n"]
    assert rows.where(0) == "train.jsonl, row 1 (line 1)"
    assert rows.where(1, "text") == "train.jsonl, row 2 (line 4), column 'text'"
    assert rows.where(2) == "train.jsonl, row 3 (line 5)"
    with pytest.raises(IndexError):
        rows[3]
    with pytest.raises(IndexError):
        rows[-4]
    assert rows.digest() == hashlib.sha256(path.read_bytes()).hexdigest()
    assert rows.tensors is None
    assert rows.label_names("label") is None


def test_keys_first_met_after_the_first_hundred_rows_stay_in_their_rows(tmp_path):
    lines = ['{"a": 1}\n'] * 100 + ['{"b": 2}\n']
    rows = open_data(write(tmp_path / "x.jsonl", "".join(lines)))
    assert rows.columns == ["a"]
    assert rows[100] == {"a": None, "b": 2}


@pytest.mark.parametrize("start", [b"\xef\xbb\xbf", b"\xef\xbb\xbf\n", b"\n \n"])
def test_json_lines_with_a_byte_order_mark_or_blank_lines_at_the_start(tmp_path, start):
    rows = open_data(write(tmp_path / "x.jsonl", start + b'{"a": 1}\n{"a": 2}\n\x0b\n'))
    assert [row["a"] for row in rows] == [1, 2]


def test_line_separators_inside_strings_do_not_end_a_row(tmp_path):
    text = "one\u2028two\x85three\u000bfour"
    rows = open_data(
        write(tmp_path / "x.jsonl", json.dumps({"t": text}, ensure_ascii=False) + "\n")
    )
    assert rows[0]["t"] == text


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ('{"a": 1', "line 3, character 8: not valid JSON (Expecting ',' delimiter)"),
        ("[1, 2]", "line 3: expected a JSON object"),
        ("null", "found null"),
        ('{"a": 1} {"a": 2}', "line 3, character 10: not valid JSON (Extra data)"),
        ('{"a": ' + "9" * 5000 + "}", "line 3: not valid JSON"),
        ("[" * 200_000, "line 3: not valid JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path, bad, said):
    path = write(tmp_path / "x.jsonl", '{"a": 1}\n\n' + bad + '\n{"a": 2}\n')
    with pytest.raises(InputError) as error:
        open_data(path)
    assert str(path) in str(error.value)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_bad_line_further_down_is_named_when_it_is_read(tmp_path):
    path = write(tmp_path / "x.jsonl", '{"a": 1}\n' * 150 + "{,\n")
    rows = open_data(path)
    assert rows[149] == {"a": 1}
    with pytest.raises(InputError, match="line 151, character 2"):
        rows[150]


def test_bytes_that_are_not_utf8_are_named_by_line(tmp_path):
    path = write(tmp_path / "x.jsonl", b'{"a": "x"}\n\n{"a": "caf\xe9"}\n')
    with pytest.raises(InputError, match=r"x\.jsonl, line 3: byte 0xe9 is not UTF-8"):
        open_data(path)
    with pytest.raises(InputError, match="not UTF-8"):
        open_data(write(tmp_path / "utf16.jsonl", '{"a": 1}\n'.encode("utf-16")))


@pytest.mark.parametrize("content", ["", "\n\n", "\ufeff", "{}\n{}\n"])
def test_empty_json_lines_are_refused(tmp_path, content):
    with pytest.raises(InputError, match=r"is empty|expected rows with columns"):
        open_data(write(tmp_path / "x.jsonl", content))


def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path):
    path = write(tmp_path / "x.jsonl", '{"a": 1}\n{"a": 2}\n')
    rows = open_data(path)
    write(path, '{"b": 100}\n{"a": 2}\n')
    with pytest.raises(InputError, match="changed while"):
        rows[1]


def test_json_lines_keep_offsets_only(tmp_path):
    path = tmp_path / "large.jsonl"
    line = json.dumps({"text": "x" * 2000}) + "\n"
    count = 15_000
    with path.open("w") as file:
        for _ in range(count):
            file.write(line)
    tracemalloc.start()
    rows = open_data(path)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(rows) == count
    assert path.stat().st_size > 30e6
    # 12 bytes a row, the arrays' room to grow, one read buffer of 1 MiB
    assert kept < 15 * count + 100_000
    assert peak < 30 * count + 2 * 2**20
    assert rows.where(count - 1) == f"large.jsonl, row {count} (line {count})"


def test_rows_can_be_read_from_threads_and_pickled(tmp_path):
    path = write(tmp_path / "x.jsonl", "".join(json.dumps({"i": i}) + "\n" for i in range(2000)))
    rows = open_data(path)
    with ThreadPoolExecutor(8) as pool:
        assert [row["i"] for row in pool.map(rows.__getitem__, range(2000))] == list(range(2000))
    assert pickle.loads(pickle.dumps(rows))[7] == {"i": 7}


# JSON arrays


def test_json_array_and_json_lines_under_the_suffix_json(tmp_path):
    array = open_data(write(tmp_path / "a.json", '\ufeff \n[{"a": 1},\n {"b": "é"}]'))
    assert isinstance(array, JsonArrayRows)
    assert list(array) == [{"a": 1, "b": None}, {"a": None, "b": "é"}]
    assert array.where(1, "b") == "a.json, row 2, column 'b'"
    lines = open_data(write(tmp_path / "l.json", '{"a": 1}\n{"a": 2}\n'))
    assert isinstance(lines, JsonLinesRows)
    assert [row["a"] for row in lines] == [1, 2]


def test_changing_a_row_does_not_change_the_data(tmp_path):
    array = open_data(write(tmp_path / "a.json", '[{"a": 1}]'))
    array[0]["a"] = 2
    assert array[0] == {"a": 1}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[]", "empty"),
        (b"[{}]", "empty"),
        (b'[{"a": 1}, 2]', "row 2: expected an object, found a number"),
        (b'[{"a": 1},\n{"a": }]', "line 2, character 7: not valid JSON"),
        (b'[{"a": 1},\n{"a": "\xff"}]', "line 2: byte 0xff is not UTF-8"),
        (b'\xef\xbb\xbf[\n{"a": "\xff"}]', "line 2: byte 0xff is not UTF-8"),
        (b"", "is empty"),
        (b'{\n  "a": 1\n}', "line 1, character 2: not valid JSON"),
    ],
)
def test_bad_json_is_refused(tmp_path, content, said):
    with pytest.raises(InputError) as error:
        open_data(write(tmp_path / "a.json", content))
    assert said in str(error.value)


def test_a_large_json_array_is_refused(tmp_path):
    path = tmp_path / "a.json"
    with path.open("wb") as file:
        file.write(b"[")
        file.truncate(300 * 2**20)  # sparse: takes no disk
    with pytest.raises(InputError, match=r"300 MiB.*JSON Lines"):
        open_data(path)


# CSV


def test_csv_rows_columns_and_places(tmp_path):
    path = write(
        tmp_path / "train.csv",
        '\ufefftext,label\r\n"a ""quoted"", one",0\r\n\r\n"two\r\nlines, ü",1\r\n,"3"\n"\r",5',
    )
    rows = open_data(path)
    assert rows.columns == ["text", "label"]
    assert list(rows) == [
        {"text": 'a "quoted", one', "label": "0"},
        {"text": "two\r\nlines, ü", "label": "1"},
        {"text": "", "label": "3"},
        {"text": "\r", "label": "5"},
    ]
    assert rows.where(0) == "train.csv, row 1 (line 2)"
    assert rows.where(1, "text") == "train.csv, row 2 (line 4), column 'text'"
    assert rows.where(2) == "train.csv, row 3 (line 6)"
    assert rows.digest() == hashlib.sha256(path.read_bytes()).hexdigest()


def test_tsv(tmp_path):
    rows = open_data(write(tmp_path / "x.TSV", "text\tlabel\na, b\t1\n"))
    assert rows[0] == {"text": "a, b", "label": "1"}


def test_huge_fields(tmp_path):
    text = 'word "and" quote,\n' * 50_000
    path = tmp_path / "x.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["id", "text"], ["1", text], ["2", "short"]])
    rows = open_data(path)
    assert rows[0]["text"] == text
    assert rows[1] == {"id": "2", "text": "short"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty: expected a header"),
        (b"\n\n", "is empty: expected a header"),
        (b"text,label\n\n", "has a header (text, label) but no rows"),
        (b"text,label,text\na,1,b\n", "line 1: the header names column 'text' 2 times"),
        (
            b'text,label\n"a\nb",1\nc\n',
            "line 4: expected 2 fields as in the header (text, label), found 1",
        ),
        (
            b"text,label\na,1\nb,c,2\n",
            "line 3: expected 2 fields as in the header (text, label), found 3",
        ),
        (b'text,label\na,1\n"b,2\nc,3\n', "line 3: a quoted field begins in this row"),
        (b'text,label\n"b"x,2\n', "line 2: "),
        (b"text,label\ra,1\r", "found a lone carriage return"),
        (b"text,label\na,1\nb\xfc,2\n", "line 3: byte 0xfc is not UTF-8"),
    ],
)
def test_bad_csv_is_refused(tmp_path, content, said):
    path = write(tmp_path / "x.csv", content)
    with pytest.raises(InputError) as error:
        open_data(path)
    assert said in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.slow
def test_csv_keeps_offsets_only(tmp_path):
    path = tmp_path / "large.csv"
    count = 5_000
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["text", "label"]] + [['x", \n' * 300, "1"]] * count)
    tracemalloc.start()
    rows = open_data(path)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert path.stat().st_size > 9e6
    assert len(rows) == count
    assert kept < 15 * count + 100_000
    assert peak < 30 * count + 2 * 2**20
    assert rows[count - 1] == {"text": 'x", \n' * 300, "label": "1"}


FIELD = st.text(st.sampled_from('ab,"\n\r\t ;é\u2028\x0b'), max_size=6)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(FIELD, FIELD), min_size=1, max_size=6), st.sampled_from(["\n", "\r\n"]))
def test_csv_agrees_with_reading_it_whole(tmp_path, records, line_end):
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator=line_end, quoting=csv.QUOTE_MINIMAL)
    writer.writerows([["p", "q"], *records])
    # some versions of the writer leave a lone carriage return unquoted
    if any("\r" in field for record in records for field in record):
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator=line_end, quoting=csv.QUOTE_ALL).writerows(
            [["p", "q"], *records]
        )
    path = write(tmp_path / "x.csv", text.getvalue())
    rows = CsvRows(path, ",")
    assert [tuple(row.values()) for row in rows] == records


def test_a_header_of_very_many_columns_is_checked_in_linear_time(tmp_path):
    names = [f"c{i}" for i in range(200_000)]
    path = tmp_path / "wide.csv"
    path.write_text(",".join(names) + "\n" + ",".join("1" for _ in names) + "\n")
    started = time.process_time()
    assert open_data(path).columns == names
    assert time.process_time() - started < 20  # it took minutes
    path.write_text(",".join([*names, "c7"]) + "\n")
    with pytest.raises(InputError, match="the header names column 'c7' 2 times"):
        open_data(path)
