"""tools/study.py: the study on a few images, and its statistics."""
import shutil

import numpy as np
import pytest
import torch
from conftest import TESTS
from processes import execute, run

import drr
from support.common import BUNDLED, load_config
from tools import strategies, study


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """DIR with DIR/val/<class>/*, four classes of one picture: in-filling takes a while."""
    folder = tmp_path_factory.mktemp("data")
    for path in (TESTS / "photos" / "train").iterdir():
        (folder / "val" / path.name).mkdir(parents=True)
        shutil.copy(min(path.iterdir()), folder / "val" / path.name)
    return folder


def values_of(name):
    return strategies.sampling_values(load_config(*study.BASE), study.RUNS[name].split(), 64)


def test_runs_and_tables_belong_together():
    rows = [row for rows in study.TABLES.values() for row in rows]
    assert {name for _, name, _ in rows} == set(study.RUNS)
    assert all(0 <= m <= values_of(name).rounds for _, name, m in rows)
    assert len({study.path_of(TESTS, name, 0) for name in study.RUNS}) == len(study.RUNS)


def test_jackknife_of_a_mean_is_its_standard_error():
    x = np.random.default_rng(0).normal(size=9)
    leave_one = np.array([np.delete(x, i).mean() for i in range(9)])
    assert study.jackknife(leave_one) == pytest.approx(x.std(ddof=1) / 3)


def test_table_marks_what_differs_beyond_its_error():
    """Two runs of five seeds: the features of the second lie farther away, by the same vector."""
    rng = np.random.default_rng(0)
    real = torch.from_numpy(rng.normal(size=(500, 4)))
    features = [rng.normal(size=(1, 100, 4)) for _ in range(5)]
    right = [rng.random((1, 100)) < 0.5 for _ in range(5)]
    held = {"a": list(zip(features, right)), "b": [(x + 1, r) for x, r in zip(features, right)]}
    metrics = study.RunMetrics(real, held)
    costs = {"a": ([0.5], [1.0]), "b": ([0.25], [2.0])}
    *_, first, second = study.table("T", [("A", "a", 0), ("B", "b", 0)], metrics, costs).strip().splitlines()
    a, b = ([cell.strip() for cell in line.split("|")[1:-1]] for line in (first, second))
    assert a[0] == "A" and a[5:] == ["0.500", "1.0"]
    assert not any("**" in cell for cell in a)
    assert b[1].startswith("**") and float(b[1][2:6]) == pytest.approx(4, abs=0.7)       # |shift|^2 = 4
    assert b[4] == a[4] and "±" in b[4]                              # the same hits: no difference
    assert study.table("T", [("C", "c", 0), ("A", "a", 0)], metrics, costs) == ""


def test_study_from_nothing_to_tables_and_on(feature_net, folder, tmp_path):
    command = ["tools.study", "--data", folder, "--out", "study", "--features", feature_net, "--batch", 4,
               "--images", 4, "--precision", "fp32", "--runs", "draft 8,better"]
    run(*command, "--seeds", 1, cwd=tmp_path)
    kept = tmp_path / "study" / "draft_8-0.npz"
    with np.load(kept) as arrays:
        codes, seconds = arrays["codes"], arrays["seconds"]
    assert codes.shape == (4, 6, 64, 4) and (np.diff(seconds) > 0).all()       # draft and five revisions
    written = kept.stat().st_mtime_ns
    text = run(*command, "--seeds", 2, cwd=tmp_path).stdout
    assert kept.stat().st_mtime_ns == written                        # drawn once
    for words in ("2 seeds of 4 images", "| T_draft 8, revised |", "| keep the more likely |", "In-filling"):
        assert words in text
    for name in ("tables.md", "study.png", "infill.png", "draft_8-1.npz", "better-1.npz"):
        assert (tmp_path / "study" / name).stat().st_size > 100

    vae, transformer, info = drr.load_checkpoint(BUNDLED)
    names = sorted(path.name for path in (folder / "val").iterdir())
    labels = torch.tensor([info.classes.index(name) for name in names])
    model = drr.TorchModel(vae, transformer, torch.device("cpu"), torch.float32)
    last = drr.sample(model, labels[:, None], 0, range(4), values_of("draft 8"))
    assert np.array_equal(codes[:, 5], last.numpy())                 # what sample.py would draw
    other = execute(*command, "--precision", "bf16", cwd=tmp_path)
    assert other.returncode == 2 and "another" in other.stderr


@pytest.mark.parametrize("arguments, word", [
    (["--seeds", "-1"], "--seeds"),
    (["--images", "3"], "--images"),
    (["--runs", "unheard of"], "unheard of"),
    (["--features", "inceptoin"], "inceptoin"),
    (["--data", TESTS / "photos"], "at least 4")])
def test_mistakes_are_one_sentence(arguments, word, feature_net, folder, tmp_path):
    features = [] if "--features" in arguments else ["--features", feature_net]
    done = execute("tools.study", "--data", folder, *features, *arguments, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr and word in done.stderr
