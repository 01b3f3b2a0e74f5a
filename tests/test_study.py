"""The study's script on a few images, and its statistics."""
import shutil

import numpy as np
import pytest
import torch
from conftest import TESTS
from test_evaluate import net  # a fixture
from processes import execute, run

import drr
from tools import study
from support.common import BUNDLED, load_config, sampling_values


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """DIR with DIR/val/<class>/*, four classes of one picture."""
    folder = tmp_path_factory.mktemp("data")
    for path in (TESTS / "photos" / "train").iterdir():      # one picture each: in-filling takes a while
        (folder / "val" / path.name).mkdir(parents=True)
        shutil.copy(min(path.iterdir()), folder / "val" / path.name)
    return folder


def test_runs_and_tables_belong_together():
    used = set()
    for name, changes in study.RUNS.items():
        c = sampling_values(load_config(*study.BASE).sample, changes.split(), 64)
        for rows in study.TABLES.values():
            for _, run_name, m in rows:
                if run_name == name:
                    used.add(name)
                    assert 0 <= m <= c.rounds
    assert used == set(study.RUNS)
    assert {run_name for rows in study.TABLES.values() for _, run_name, _ in rows} == used
    assert len({study.path_of(TESTS, name, 0) for name in study.RUNS}) == len(study.RUNS)


def test_jackknife_of_a_mean_is_its_standard_error():
    x = np.random.default_rng(0).normal(size=9)
    leave = np.array([np.delete(x, i).mean() for i in range(9)])
    assert study.jackknife(leave) == pytest.approx(x.std(ddof=1) / 3)


class Gaussians:
    """Two runs of five seeds: the second one's features lie farther away, by the same vector."""
    def __init__(self):
        rng = np.random.default_rng(0)
        self.real = torch.from_numpy(rng.normal(size=(500, 4)))
        base = [rng.normal(size=(100, 4)) for _ in range(5)]
        right = [rng.random(100) < 0.5 for _ in range(5)]
        self.held = {"a": [(x[None], r[None]) for x, r in zip(base, right)], "b": [(x[None] + 1, r[None]) for x, r in zip(base, right)]}


def test_table_marks_what_differs_beyond_its_error():
    g = Gaussians()
    measured = study.Measured(g.real, g.held)
    costs = {"a": ([0.5], [1.0]), "b": ([0.25], [2.0])}
    *_, first, second = study.table("T", [("A", "a", 0), ("B", "b", 0)], measured, costs).strip().splitlines()
    a, b = ([cell.strip() for cell in line.split("|")[1:-1]] for line in (first, second))
    assert a[0] == "A" and not any("**" in cell for cell in a) and a[5:] == ["0.500", "1.0"]
    assert b[1].startswith("**") and float(b[1][2:6]) == pytest.approx(4, abs=0.7)          # |shift|^2 = 4
    assert b[4] == a[4] and "±" in b[4]                                                      # the same hits: no difference
    assert study.table("T", [("C", "c", 0), ("A", "a", 0)], measured, costs) == ""


def test_study_from_nothing_to_tables_and_on(net, folder, tmp_path):
    command = ["tools.study", "--data", folder, "--out", "study", "--features", net, "--batch", 4, "--images", 4, "--precision", "fp32",
               "--runs", "draft 8,better"]
    run(*command, "--seeds", 1, cwd=tmp_path)
    with np.load(tmp_path / "study" / "draft_8-0.npz") as arrays:
        codes, seconds = arrays["codes"], arrays["seconds"]
    assert codes.shape == (4, 6, 64, 4) and (np.diff(seconds) > 0).all()       # 4 classes; draft and five revisions
    written = (tmp_path / "study" / "draft_8-0.npz").stat().st_mtime_ns
    text = run(*command, "--seeds", 2, cwd=tmp_path).stdout
    assert "2 seeds of 4 images" in text
    assert (tmp_path / "study" / "draft_8-0.npz").stat().st_mtime_ns == written
    assert "| T_draft 8, revised |" in text and "| keep the more likely |" in text and "In-filling" in text
    for name in ("tables.md", "study.png", "infill.png", "draft_8-1.npz", "better-1.npz"):
        assert (tmp_path / "study" / name).stat().st_size > 100
    vae, transformer, info = drr.load_checkpoint(BUNDLED)
    c = sampling_values(load_config(*study.BASE).sample, study.RUNS["draft 8"].split(), 64)
    labels = torch.tensor([info.classes.index(n) for n in sorted(p.name for p in (folder / "val").iterdir())])
    *_, last = drr.draft_and_revise(drr.TorchModel(vae, transformer, torch.device("cpu"), torch.float32), labels[:, None],
                                    drr.draw_noise(0, range(4), 6, 64, 4), c)
    assert np.array_equal(codes[:, 5], last.codes.numpy())                     # what sample.py would draw
    other = execute(*command, "--precision", "bf16", cwd=tmp_path)
    assert other.returncode == 2 and "another" in other.stderr


@pytest.mark.parametrize("arguments,word", [(["--seeds", "-1"], "--seeds"), (["--images", "3"], "--images"), (["--runs", "unheard of"], "unheard of"),
                                            (["--features", "inceptoin"], "inceptoin"), (["--data", TESTS / "photos"], "at least 4")])
def test_mistakes_are_one_sentence(arguments, word, net, folder, tmp_path):
    features = [] if "--features" in arguments else ["--features", net]
    done = execute("tools.study", "--data", folder, *features, *arguments, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr and word in done.stderr
