"""tools/study.py: the study on a few images, and its statistics."""
import functools
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import random_checkpoint, sample_section, tiny_transformer, torch_model
from processes import PHOTOS

import drr
from support import common, models
from tools import study


@pytest.fixture
def run_study(call, tmp_path, feature_net):
    """run_study(...) is `python -m tools.study ...` with random weights: what it printed."""
    classes = sorted(path.name for path in (PHOTOS / "train").iterdir())       # those of feature_net
    random_checkpoint(tmp_path / "random", classes, classes)
    (tmp_path / "val").symlink_to(PHOTOS / "train")                            # more pictures than its own
    return functools.partial(call, study.main, "--data", tmp_path, "--checkpoint", tmp_path / "random",
                             "--features", feature_net, "--device", "cpu", "--precision", "fp32")


def test_every_row_is_a_way_of_decoding_with_enough_revisions():
    paper = common.load_config(study.PRESET)
    settings = {way: study.settings_of(paper, way, m, 64) for way, m in study.runs_of(study.TABLES).items()}
    rows = [row for table in study.TABLES for row in study.rows_of(table)]
    assert all(0 <= m <= settings[way].rounds for _, way, m in rows)
    assert settings["t_draft=8"].rounds == settings["t_draft=64"].rounds == 5
    assert [row[0] for row in study.rows_of(study.TABLES[1])] == [f"T_draft 8, M = {m}" for m in range(6)]


def test_the_rounds_of_a_run_are_what_sample_draws_with_so_many_revisions():
    model = torch_model(tiny_transformer())
    labels = torch.tensor([1, 2, 3])
    codes = study.draw_rounds(model, labels, 5, range(3), sample_section(rounds=2))
    for m in range(3):
        drawn = drr.sample(model, labels[:, None], 5, range(3), sample_section(rounds=m))
        assert torch.equal(codes[m], drawn)


def test_a_run_in_parts_is_the_run_at_once():
    """Pictures that show the codes; the network sees their first row and takes them for class 0 or 1."""
    model = torch_model(tiny_transformer())
    model.decode = lambda codes: codes.float().mean(2).view(-1, 1, 4, 4).repeat(1, 3, 1, 1) / 12 - 1
    network = SimpleNamespace(extract=lambda x: (x[:, 0, 0], x[:, 0, 0, :1] * torch.tensor([1, -1])))
    conditions, targets = torch.tensor([0, 1, 2, 3, 4]), torch.tensor([0, 1, 0, 1, 0])
    features, right = study.draw_run(model, network, conditions, targets, 0, sample_section(), 2)
    assert features.shape == (3, 5, 4) and right.shape == (3, 5)
    assert np.array_equal(right, (features[:, :, 0] < 0) == (targets.numpy() == 1))
    at_once, _ = study.draw_run(model, network, conditions, targets, 0, sample_section(), 5)
    assert np.isclose(features, at_once).mean() > 0.9       # a near tie may fall otherwise in another batch


def test_jackknife_of_a_mean_is_its_standard_error():
    x = np.random.default_rng(0).normal(size=9)
    leave_one = np.array([np.delete(x, i).mean() for i in range(9)])
    assert study.jackknife(leave_one) == pytest.approx(x.std(ddof=1) / 3)


def test_a_table_marks_what_differs_beyond_its_error():
    """Two runs of 500 images: the features of the second lie farther away, by the same vector."""
    rng = np.random.default_rng(0)
    real = torch.from_numpy(rng.normal(size=(500, 4)))
    features, right = rng.normal(size=(1, 500, 4)), rng.random((1, 500)) < 0.5
    held = {"a": (features, right), "b": (features + 1, right)}
    table = study.Table("T", "", [0], {"A": "a", "B": "b"})
    text = study.markdown(3, table, study.run_metrics(real, held), lambda way, m: {"a": 1, "b": 2}[way])
    title, *_, first, second = text.strip().splitlines()
    a, b = ([cell.strip() for cell in line.split("|")[1:-1]] for line in (first, second))
    assert title == "### 3. T" and a[0] == "A" and a[5:] == ["1.0"]
    assert not any("**" in cell for cell in a)
    assert b[1].startswith("**") and float(b[1][2:6]) == pytest.approx(4, abs=0.7)       # |shift|^2 = 4
    assert b[4] == a[4] and "±" in b[4]                              # the same hits: no difference


def test_study_from_nothing_to_tables_and_on(run_study, tmp_path, monkeypatch):
    command = ["--out", "study", "--batch", 5, "--images", 5, "--tables", "2,4"]
    assert "1 x 5 images" in run_study(*command, "--seeds", 1)
    kept = tmp_path / "study" / "t_draft=8_rounds=5-0.npz"
    with np.load(kept) as arrays:
        assert arrays["features"].shape == (6, 5, 6) and arrays["right"].shape == (6, 5)
    written = kept.stat().st_mtime_ns
    text = run_study(*command, "--seeds", 2)
    assert kept.stat().st_mtime_ns == written                        # drawn once
    for words in ("2 x 5 images", "| T_draft 8, M = 5 |", "| T_revise 8 |", "### 4. "):
        assert words in text
    for name in ("tables.md", "study.png",
                 "t_draft=8_rounds=5-1.npz", "t_draft=8_t_revise=1_rounds=2-1.npz"):
        assert (tmp_path / "study" / name).stat().st_size > 100
    with pytest.raises(drr.UserError, match="another --out"):
        run_study(*command, "--images", 6)
    monkeypatch.setattr(study, "see", shutil.copy)                   # any other code
    with pytest.raises(drr.UserError, match="another --out"):
        run_study(*command)


def test_infilling_counts_the_codes_that_come_back(run_study, tmp_path):
    classes = sorted(path.name for path in (PHOTOS / "train").iterdir())
    random_checkpoint(tmp_path / "causal", classes, classes, "transformer.kind=autoregressive")
    text = run_study("--infill", "--against", tmp_path / "causal", "--out", "study")
    for filler in (tmp_path / "random", tmp_path / "causal", "another image"):
        assert all(f"| {half} half | {filler} |" in text for half in ("right", "left", "top", "random"))
    assert (tmp_path / "study" / "infill.png").stat().st_size > 100
    with pytest.raises(drr.UserError, match="same codes"):
        run_study("--infill", "--against", common.BUNDLED)


def test_a_published_model_is_drawn_in_several_orders_with_as_many_updates(run_study, tmp_path):
    classes = sorted(path.name for path in (PHOTOS / "train").iterdir())
    config = common.load_config("smoke-maskgit", ["transformer.n_spatial=1", "vae.ch=32"])
    vae = drr.RQVAE(config.vae)
    transformer = models.build(config.transformer, 4, 64, 1, vae.quantizer.codebook)
    drr.save_vae(tmp_path / "run" / "vae.safetensors", vae, config)
    path = tmp_path / "run" / "transformer.safetensors"
    drr.save_transformer(path, transformer, config, classes, classes, vae)
    run = functools.partial(run_study.func, *run_study.args[:3], *run_study.args[5:])        # no --checkpoint
    text = run("--published", tmp_path / "run", "--out", "study", "--seeds", 1, "--images", 5)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "±" in line]
    rows = [row for row in rows if len(row) == 6]
    assert [row[0] for row in rows] == list(study.PUBLISHED[0].rows) and rows[0][0] == "Halton order"
    assert {row[-1] for row in rows} == {"32.0"} and len({row[1].strip("*") for row in rows}) > 1
    assert (tmp_path / "study" / "tables.md").read_text() in text
    with pytest.raises(drr.UserError, match="with --published"):
        run_study("--checkpoint", tmp_path / "run")
