"""README.md: what it says about files, fields, sizes and messages is what the code does."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

import train
from model import ModelConfig, count

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_config_table_is_the_dataclasses_field_by_field():
    found = re.findall(r"^\| `(\w+)` \| `(.*?)` \| (.*) \|$", README, re.M)
    rows = {name: (default, text) for name, default, text in found}
    meaning = train.field_help()
    assert list(rows) == [f.name for f in dataclasses.fields(train.Config)]
    for f in dataclasses.fields(train.Config):
        assert rows[f.name] == (repr(f.default), meaning[f.name].replace("|", r"\|")), f.name


def test_the_file_map_names_every_script_and_its_length_within_a_twentieth():
    lengths = dict(re.findall(r"^\| `(\w+\.py)` \| ([\d,]+) \|", README, re.M))
    assert set(lengths) == {path.name for path in ROOT.glob("*.py")}
    for name, claimed in lengths.items():
        length = len((ROOT / name).read_text().splitlines())
        assert int(claimed.replace(",", "")) == pytest.approx(length, rel=0.05), name


def test_every_picture_and_result_it_shows_is_in_the_repository():
    for path in re.findall(r"\]\((results/[^)]+)\)", README):
        assert (ROOT / path).is_file(), path


def test_the_losses_it_quotes_are_those_of_the_committed_runs():
    for name in ("tiny", "tiny_dense"):
        result = json.loads((ROOT / "results" / name / "result.json").read_text())
        row = re.search(rf"^\| `configs/{name}\.py` \|.*$", README, re.M)[0]
        assert f"{result['loss']:.4f}" in row and f"{result['bits_per_byte']:.4f}" in row
        assert f"{result['n_total'] / 1e6:.2f}M" in row and f"{result['n_active'] / 1e6:.2f}M" in row


def test_the_sizes_of_the_five_architectures_are_what_count_counts():
    rows = re.findall(r"^\| (large-[\w.-]+) \| (\d+) \| (\d+) \| (\d+) x (\d+) \((\d+)\) \| (\d+), (\d+), (\d+) \| "
                      r"([\d,]+)M \| ([\d,]+)M \| ([\d,]+)M \|$", README, re.M)
    assert len(rows) == 5
    fields = "n_layer d_model n_head d_head n_kv_head n_expert top_k d_expert".split()
    for _, *shape, total, active, untied in rows:
        sizes = count(ModelConfig(**dict(zip(fields, map(int, shape))), vocab_size=151_936))
        claimed = tuple(int(n.replace(",", "")) for n in (total, active, untied))
        assert claimed == tuple(round(sizes[k] / 1e6) for k in ("total", "active", "total_untied"))


def test_the_message_it_shows_for_a_misspelt_name_is_the_real_one(capsys):
    with pytest.raises(train.BadInput) as error:
        train.parse_command_line(["configs/tiny.py", "--n_layers=3"])
    assert f"error: {error.value}" in README


@pytest.mark.parametrize("path", sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("configs/**/*.py")))
def test_every_config_is_accepted_as_it_stands(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    train.load_config(path)
