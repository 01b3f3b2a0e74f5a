"""tools/study.py: the study on a few images, and its statistics."""
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TESTS, sample_section, tiny_transformer, torch_model

import drr
from support import common, models
from tools import study

CLASSES = ["n02814860", "n09332890", "n09472597", "n11939491"]                         # those of feature_net
CPU = ["--device", "cpu", "--precision", "fp32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with random weights in `checkpoint`, and val/<class>/*, four classes of one picture."""
    folder = tmp_path_factory.mktemp("study")
    for name in CLASSES:
        (folder / "val" / name).mkdir(parents=True)
        shutil.copy(min((TESTS / "photos" / "train" / name).iterdir()), folder / "val" / name)
    config = common.load_config("smoke")
    torch.manual_seed(0)
    vae = drr.RQVAE(config.vae)
    transformer = drr.ContextualRQTransformer(config.transformer, 4, 64, 4, vae.quantizer.codebook)
    drr.save_vae(folder / "checkpoint" / "vae.safetensors", vae, config)
    path = folder / "checkpoint" / "transformer.safetensors"
    drr.save_transformer(path, transformer, config, CLASSES, CLASSES, vae)
    return folder


@pytest.fixture
def call(monkeypatch, capsys, folder, tmp_path, feature_net):
    """call(...) is `python -m tools.study ...` in this process: what it printed."""
    def call(*arguments):
        values = {"--data": folder, "--checkpoint": folder / "checkpoint", "--features": feature_net}
        given = [word for pair in values.items() if pair[0] not in arguments for word in pair]
        monkeypatch.setattr("sys.argv", ["tools.study", *map(str, [*given, *CPU, *arguments])])
        monkeypatch.chdir(tmp_path)
        study.main()
        return capsys.readouterr().out
    return call


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


def test_study_from_nothing_to_tables_and_on(call, tmp_path, monkeypatch):
    command = ["--out", "study", "--batch", 5, "--images", 5, "--tables", "2,4"]
    assert "1 x 5 images" in call(*command, "--seeds", 1)
    kept = tmp_path / "study" / "t_draft=8_rounds=5-0.npz"
    with np.load(kept) as arrays:
        assert arrays["features"].shape == (6, 5, 6) and arrays["right"].shape == (6, 5)
    written = kept.stat().st_mtime_ns
    text = call(*command, "--seeds", 2)
    assert kept.stat().st_mtime_ns == written                        # drawn once
    for words in ("2 x 5 images", "| T_draft 8, M = 5 |", "| T_revise 8 |", "### 4. "):
        assert words in text
    for name in ("tables.md", "study.png",
                 "t_draft=8_rounds=5-1.npz", "t_draft=8_t_revise=1_rounds=2-1.npz"):
        assert (tmp_path / "study" / name).stat().st_size > 100
    with pytest.raises(drr.UserError, match="another --out"):
        call(*command, "--images", 6)
    monkeypatch.setattr(study, "see", shutil.copy)                   # any other code
    with pytest.raises(drr.UserError, match="another --out"):
        call(*command)


def test_infilling_counts_the_codes_that_come_back(call, folder, tmp_path):
    vae, config = drr.load_vae(folder / "checkpoint" / "vae.safetensors")
    config = common.load_config("smoke", ["transformer.kind=autoregressive"])
    causal = models.build(config.transformer, 4, 64, 4, vae.quantizer.codebook)
    path = tmp_path / "causal" / "transformer.safetensors"
    drr.save_transformer(path, causal, config, CLASSES, CLASSES, vae)
    shutil.copy(folder / "checkpoint" / "vae.safetensors", tmp_path / "causal")
    text = call("--infill", "--against", "causal", "--out", "study")
    assert f"| right half | {folder / 'checkpoint'} |" in text and "| left half | causal |" in text
    assert "| random half | another image |" in text
    assert (tmp_path / "study" / "infill.png").stat().st_size > 100


def test_a_published_model_is_drawn_in_several_orders_with_as_many_updates(call, tmp_path):
    config = common.load_config("smoke-maskgit", ["transformer.n_spatial=1", "vae.ch=32"])
    vae = drr.RQVAE(config.vae)
    transformer = models.build(config.transformer, 4, 64, 1, vae.quantizer.codebook)
    drr.save_vae(tmp_path / "run" / "vae.safetensors", vae, config)
    path = tmp_path / "run" / "transformer.safetensors"
    drr.save_transformer(path, transformer, config, CLASSES, CLASSES, vae)
    text = call("--published", "run", "--out", "study", "--seeds", 1, "--images", 5)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "±" in line]
    rows = [row for row in rows if len(row) == 6]
    assert [row[0] for row in rows] == list(study.PUBLISHED[0].rows) and rows[0][0] == "Halton order"
    assert {row[-1] for row in rows} == {"32.0"} and len({row[1].strip("*") for row in rows}) > 1
    assert (tmp_path / "study" / "tables.md").read_text() in text
    with pytest.raises(drr.UserError, match="with --published"):
        call("--checkpoint", "run")


@pytest.mark.parametrize("arguments, word", [
    (["--seeds", "0"], "--seeds"),
    (["--images", "4"], "--images"),
    (["--tables", "1,11"], "from 1 to 10"),
    (["--features", "inceptoin"], "inceptoin"),
    (["--data", TESTS / "photos"], "at least 4"),
    (["--data", TESTS, "--infill"], "val/<class>"),
    (["--infill", "--against", common.BUNDLED], "same codes"),
    (["--against", common.BUNDLED], "--infill"),
    (["--published", common.BUNDLED, "--tables", "1"], "--tables")])
def test_mistakes_are_one_sentence(call, arguments, word):
    with pytest.raises(drr.UserError, match=word) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
