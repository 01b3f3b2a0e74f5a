"""The study's script on a few images, and its statistics."""
import shutil

import numpy as np
import pytest
import torch
from conftest import TESTS
from test_evaluate import net  # a fixture
from test_scripts import execute, run

import drr
import study
from common import BUNDLED, sampling_values


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """DIR with DIR/val/<class>/*, four classes."""
    folder = tmp_path_factory.mktemp("data")
    shutil.copytree(TESTS / "photos" / "train", folder / "val")
    return folder


def test_runs_and_tables_belong_together():
    _, _, info = drr.load_checkpoint(BUNDLED)
    used = set()
    for name, changes in study.RUNS.items():
        c = sampling_values(info.sample, f"{study.PAPER} {changes}".split(), 64)
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


def test_study_from_nothing_to_tables_and_on(net, folder, tmp_path):
    command = ["study.py", "--data", folder, "--out", "study", "--features", net, "--batch", 4, "--images", 4, "--precision", "fp32",
               "--runs", "draft 4,better"]
    run(*command, "--seeds", 1, cwd=tmp_path)
    with np.load(tmp_path / "study" / "draft_4-0.npz") as arrays:
        codes, seconds = arrays["codes"], arrays["seconds"]
    assert codes.shape == (4, 3, 64, 4) and (np.diff(seconds) > 0).all()       # 4 classes; draft and two revisions
    written = (tmp_path / "study" / "draft_4-0.npz").stat().st_mtime_ns
    text = run(*command, "--seeds", 2, cwd=tmp_path).stdout
    assert (tmp_path / "study" / "draft_4-0.npz").stat().st_mtime_ns == written
    assert "| T_draft 4, revised |" in text and "| keep the more likely |" in text and "In-filling" in text
    for name in ("tables.md", "study.png", "infill.png", "draft_4-1.npz", "better-1.npz"):
        assert (tmp_path / "study" / name).stat().st_size > 100
    vae, transformer, info = drr.load_checkpoint(BUNDLED)
    c = sampling_values(info.sample, f"{study.PAPER} {study.RUNS['draft 4']}".split(), 64)
    labels = torch.tensor([info.classes.index(n) for n in sorted(p.name for p in (folder / "val").iterdir())])
    *_, last = drr.draft_and_revise(drr.TorchModel(vae, transformer, torch.device("cpu"), torch.float32), labels[:, None],
                                    drr.draw_noise(0, range(4), 3, 64, 4), c)
    assert np.array_equal(codes[:, 2], last.codes.numpy())                     # what sample.py would draw
    other = execute(*command, "--precision", "bf16", cwd=tmp_path)
    assert other.returncode == 2 and "another" in other.stderr


@pytest.mark.parametrize("arguments,word", [(["--seeds", "-1"], "--seeds"), (["--images", "3"], "--images"), (["--runs", "unheard of"], "unheard of"),
                                            (["--features", "inceptoin"], "inceptoin"), (["--data", TESTS / "photos"], "at least 4")])
def test_mistakes_are_one_sentence(arguments, word, net, folder, tmp_path):
    features = [] if "--features" in arguments else ["--features", net]
    done = execute("study.py", "--data", folder, *features, *arguments, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr and word in done.stderr
