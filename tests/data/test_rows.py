import io
import json

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from flextron_lit.data import TextDomain, rows
from flextron_lit.data.formats import documents_in
from flextron_lit.data.texts import documents

TEXTS = ["one", "two", "thrée", "four"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLEXTRON_CACHE", str(tmp_path / "cache"))


def read(source, **settings):
    return list(documents(TextDomain(source=str(source), **settings)))


# --- parquet ----------------------------------------------------------------------------------------------------


def written(path, columns, **settings):
    parquet.write_table(pyarrow.table(columns), path, **settings)
    return path


def test_parquet_is_one_document_a_row_of_one_column(tmp_path):
    path = written(tmp_path / "a.parquet", {"id": [1, 2, 3, 4], "text": TEXTS, "body": TEXTS[::-1]}, row_group_size=2)
    assert parquet.ParquetFile(path).num_row_groups == 2
    assert read(path, format="parquet") == TEXTS
    assert read(path, format="parquet", field="body") == TEXTS[::-1]
    written(tmp_path / "b.parquet", {"text": pyarrow.array(["five"], pyarrow.large_string())})
    assert read(tmp_path, format="parquet", files="*.parquet") == [*TEXTS, "five"]


def test_rows_are_the_same_however_many_are_read_at_once(tmp_path, monkeypatch):
    path = written(tmp_path / "a.parquet", {"text": [f"row {i}" for i in range(10)]}, row_group_size=4)
    whole = read(path, format="parquet")
    monkeypatch.setattr(rows, "ROWS", 3)
    assert read(path, format="parquet") == whole == [f"row {i}" for i in range(10)]


def test_only_the_column_asked_for_is_read():
    class Counting(io.BytesIO):
        taken = 0

        def read(self, size=-1):
            data = super().read(size)
            Counting.taken += len(data)
            return data

    made = io.BytesIO()
    written(made, {"text": TEXTS, "ballast": [bytes([i]) * 200_000 for i in range(4)]}, compression="none")
    domain = TextDomain(source="x", format="parquet")
    assert list(documents_in("file", Counting(made.getvalue()), domain)) == TEXTS
    # the footer is looked for in the last 64 KB
    assert Counting.taken < 100_000 < 800_000 < len(made.getvalue())


@pytest.mark.parametrize(
    ("columns", "settings", "message"),
    [
        ({"id": [1], "body": ["x"]}, {}, "a.parquet has no column 'text'; it has id, body: set field"),
        ({"text": [7]}, {}, r"row 0 \(from 0\), has no text in field 'text'; it has a int there"),
        (
            {"text": pyarrow.array([], pyarrow.string())},
            {},
            "a.parquet .* holds no text: all 1 files or rows are empty",
        ),
        ({"text": ["", None, " "]}, {}, "a.parquet .* holds no text: all 3 files or rows are empty"),
    ],
)
def test_a_wrong_parquet_file_is_refused_by_place(tmp_path, columns, settings, message):
    path = written(tmp_path / "a.parquet", columns)
    with pytest.raises(ValueError, match=message):
        read(path, format="parquet", **settings)


@pytest.mark.parametrize(
    "damage",
    [lambda b: b"", lambda b: b"no parquet", lambda b: b[:-3], lambda b: b[: len(b) // 2], lambda b: b[:4] + b[12:]],
    ids=["empty", "text", "tail", "half", "hole"],
)
def test_what_is_not_parquet_or_cut_off_is_refused(tmp_path, damage):
    path = written(tmp_path / "a.parquet", {"text": [f"{i} {i**9}" for i in range(1000)]})
    assert len(read(path, format="parquet")) == 1000
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="a.parquet is not parquet, or damaged: "):
        read(path, format="parquet")


def test_a_flipped_bit_is_noticed_where_the_file_has_checksums(tmp_path):
    path = tmp_path / "a.parquet"
    plain = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    written(path, {"text": ["a needle in a page"]}, **plain, write_page_checksum=True)
    content = bytearray(path.read_bytes())
    assert content.count(b"needle") == 1
    content[content.index(b"needle")] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="a.parquet is not parquet, or damaged: .*CRC"):
        read(path, format="parquet")


# --- Hugging Face data sets -------------------------------------------------------------------------------------


def made(texts=TEXTS):
    return datasets.Dataset.from_dict({"id": list(range(len(texts))), "text": texts})


def test_a_saved_data_set_is_one_document_a_row(tmp_path):
    made().save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=made(), test=made(["x", "y"])).save_to_disk(tmp_path / "two")
    assert read(tmp_path / "one", format="dataset") == TEXTS
    assert read(tmp_path / "two", format="dataset") == TEXTS
    assert read(tmp_path / "two", format="dataset", split="test") == ["x", "y"]


@pytest.fixture
def loadable(tmp_path):
    """A folder as on the Hub: two configurations, one of them with two splits."""
    folder = tmp_path / "hub"
    for name, texts in {"a/train": TEXTS, "a/test": ["x"], "b/train": ["y", "z"]}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    configs = "".join(f"- config_name: {name}\n  data_dir: {name}\n" for name in "ab")
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    return folder


def test_a_data_set_that_load_dataset_reads(loadable, tmp_path):
    assert read(loadable, format="dataset", subset="a") == TEXTS
    assert read(loadable, format="dataset", subset="a", split="test") == ["x"]
    assert read(loadable, format="dataset", subset="b") == ["y", "z"]
    assert list((tmp_path / "cache" / "datasets").iterdir())
    (loadable / "b" / "train.jsonl").write_text('{"text": "new"}\n')
    assert read(loadable, format="dataset", subset="b") == ["new"]


def test_a_data_set_of_the_hub_is_fetched_at_its_revision(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *args, **settings: asked.append((args, settings)) or {"train": made()}
    )
    assert read("hub:ORG/name@v1", format="dataset", subset="b") == TEXTS
    assert asked[0] == (("ORG/name", "b"), {"revision": "v1", "cache_dir": str(tmp_path / "cache" / "datasets")})


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("two", {"split": "valid"}, "two has no split 'valid'; it has train, test: set split"),
        ("two", {"field": "body"}, "two, split train has no column 'body'; it has id, text: set field"),
        ("two", {"field": "id"}, r"two, split train, row 0 \(from 0\), has no text in field 'id'; it has a int there"),
        ("two", {"subset": "a"}, "subset 'a' has no effect: .*two was saved as one"),
        ("one", {"split": "test"}, "split 'test' has no effect: .*one was saved as one"),
        ("none", {}, "cannot read a data set from .*none"),
        ("hub", {}, r"cannot read a data set from .*hub \(subset not set\): .*available configs: \['a', 'b'\]"),
        ("hub", {"subset": "c"}, r"\(subset c\): .*'c' not found. Available: \['a', 'b'\]"),
        ("hub", {"subset": "a", "split": "dev"}, "hub has no split 'dev'; it has train, test"),
        ("empty", {}, "cannot read a data set from .*empty .*doesn't contain any data files"),
        ("hub/a/train.jsonl", {}, "train.jsonl is a file; format dataset reads a folder"),
    ],
)
def test_a_wrong_data_set_is_refused_with_what_exists(loadable, tmp_path, name, settings, message):
    made().save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=made(), test=made()).save_to_disk(tmp_path / "two")
    made().select([]).save_to_disk(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name, format="dataset", **settings)


@pytest.mark.parametrize("keep", [0, 3, 0.5, None])
def test_a_damaged_data_set_is_one_clear_error(tmp_path, keep):
    made().save_to_disk(tmp_path / "one")
    (path,) = (tmp_path / "one").glob("*.arrow")
    content = path.read_bytes()
    if keep is None:
        path.unlink()
    else:
        path.write_bytes(content[: keep if isinstance(keep, int) else int(len(content) * keep)])
    with pytest.raises(ValueError, match="cannot read a data set from .*one|one, split train is damaged"):
        read(tmp_path / "one", format="dataset")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (f"pypi:w==1.0#sha256={'0' * 64}", "is a wheel, which holds files; read them with another format"),
        ("random:x", "is a model, not a text"),
    ],
)
def test_a_source_that_is_no_data_set_is_refused(source, message):
    with pytest.raises(ValueError, match=message):
        read(source, format="dataset")


# --- read twice -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("later", [["a", "b", "x"], ["a", "b"], ["a", "b", "c", "d"]], ids=["other", "fewer", "more"])
def test_text_that_changes_while_it_is_read_is_noticed(tmp_path, later):
    path = tmp_path / "rows.jsonl"

    def write(texts):
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    write(["a", "b", "c"])
    found = documents(TextDomain(source=str(path), format="jsonl"))
    assert list(found) == list(found) == ["a", "b", "c"]
    write(later)
    with pytest.raises(ValueError, match="rows.jsonl changed while it was read"):
        list(found)
