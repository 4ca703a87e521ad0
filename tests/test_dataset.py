"""From a config's data section to training and held-out clips."""

import numpy as np
import pytest
import soundfile
from runs import tiny_config

from beats_jax.data.dataset import open_data


def write_set(folder, names, columns):
    folder.mkdir()
    rng = np.random.default_rng(0)
    header = ",".join(["filename", *columns])
    rows = [header]
    for i, name in enumerate(names):
        soundfile.write(folder / name, rng.normal(0, 0.1, 8000), 16000)
        rows.append(",".join([name, *(values[i] for values in columns.values())]))
    (folder / "metadata.csv").write_text("\n".join(rows))
    return folder


def test_several_folders_are_one_set_and_groups_stay_together(tmp_path):
    names = [f"{i}.wav" for i in range(12)]
    sources = [f"rec{i // 3}" for i in range(12)]
    write_set(tmp_path / "street", names, {"src_file": sources})
    write_set(tmp_path / "voices", names, {"speaker": ["x"] * 12})
    config = tiny_config(data__source="folder", data__group="src_file", data__val_fraction=0.4)
    config.data.dir = f"{tmp_path / 'street'}, {tmp_path / 'voices'}"
    train, val = open_data(config.data, tmp_path / "run")
    assert sorted(train.ids + val.ids) == sorted(
        f"{folder}/{name}" for folder in ("street", "voices") for name in names
    )
    both = set(train.columns["src_file"]) & set(val.columns["src_file"])
    assert both <= {""}  # a recording is on one side; files without one are groups of their own
    assert 0 < val.columns["src_file"].count("") < 12
    again, _ = open_data(config.data, tmp_path / "run")  # prepared once, then read
    assert again.fingerprint == train.fingerprint

    config.data.dir = str(tmp_path / "run" / "data" / "street")  # a prepared folder, where it is
    config.data.filter = "src_file=rec0|rec1"
    train, val = open_data(config.data, tmp_path / "elsewhere")
    assert len(train) + len(val) == 6
    assert not (tmp_path / "elsewhere").exists()


def test_two_folders_of_one_name_are_refused(tmp_path):
    config = tiny_config(data__source="folder")
    config.data.dir = f"{tmp_path}/a/audio,{tmp_path}/b/audio"
    with pytest.raises(ValueError, match="different names, got audio, audio"):
        open_data(config.data, tmp_path)
