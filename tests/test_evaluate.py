"""tools/evaluate.py: metrics against formulas and recorded numbers, the command on real files."""
import functools
import json
import re
import zipfile

import numpy as np
import pytest
import torch
from conftest import random_checkpoint
from PIL import Image
from processes import PHOTOS, execute

import drr
from support import common
from tools import evaluate, train_classifier

TRAIN = PHOTOS / "train"
DRAW = f"--reference {TRAIN} --crop --precision fp32 --device cpu t_draft=2 rounds=0 batch_size=4".split()


# === Helpers and fixtures ===================================================================================
def noise_pictures(folder, n, seed=0, least=None):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(n):
        tint = rng.integers(0, 128, 3) if least is None else least
        noise = rng.integers(0, 256, (32, 32, 3)) // 2 + tint
        Image.fromarray(noise.astype(np.uint8)).save(folder / f"{i}.png")


def numbers(printed):
    """{name: value} of the printed lines that end in a number."""
    rows = re.findall(r"^(\S.*?) +(-?\d+\.\d{4})$", printed, re.MULTILINE)
    return {name: float(value) for name, value in rows}


def parts_of(folder):
    return {path.name: path.read_bytes() for path in folder.glob("part-*")}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder with random weights for five classes, of which the photographs show the last four."""
    folder = tmp_path_factory.mktemp("checkpoint")
    classes = ["n00", *sorted(path.name for path in TRAIN.iterdir())]
    random_checkpoint(folder, classes, classes)
    return folder


@pytest.fixture
def measure(call, monkeypatch, feature_net, checkpoint):
    """measure(...) is `python -m tools.evaluate ...`, its default the checkpoint above: what it printed."""
    monkeypatch.setattr(evaluate, "BUNDLED", checkpoint)
    return functools.partial(call, evaluate.main, "--features", feature_net)


@pytest.fixture
def two_folders(tmp_path):
    """Folders a and b, of 20 different pictures each."""
    noise_pictures(tmp_path / "a", 20)
    noise_pictures(tmp_path / "b", 20, seed=1)


# === Arithmetic =============================================================================================
def test_numbers_are_those_of_torch_fidelity():
    """Recorded from its fid_statistics_to_metric, prc_features_to_metric and isc_features_to_metric."""
    i = torch.arange(480.0).view(60, 8)
    j = torch.arange(400.0).view(50, 8)
    real = torch.sin(i * 1.3) + 0.3 * torch.cos(i * i * 0.01)
    fake = 0.8 * torch.sin(j * 0.9 + 0.5) + 0.4 * torch.cos(j * j * 0.02) + 0.2
    fid = evaluate.fid(*evaluate.statistics(real), *evaluate.statistics(fake))
    assert fid == pytest.approx(2.6594208919820383, abs=1e-6)
    assert evaluate.precision_recall(real, fake) == pytest.approx((0.04, 0.13333334028720856), abs=1e-6)
    assert evaluate.inception_score(3 * fake, 1) == pytest.approx((2.324631790496568, 0), abs=1e-6)


def test_fid_of_equal_gaussians_is_zero_and_not_negative():
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).double())[0]
    covariance = turn @ torch.tensor([4.0, 1, 16]).double().diag() @ turn.T
    mean = torch.tensor([1.0, 2.0, 2.0]).double()
    for scale in range(1, 20):                                     # rounding makes some of these -1e-13
        assert 0 <= evaluate.fid(mean, scale * covariance, mean, scale * covariance) < 1e-9


def test_mean_and_covariance_of_batches_by_hand():
    """1, 2, 6 beside 5, 5, 2, far from 0: means 3 and 4, variances 14 / 2 and 6 / 2, covariance -9 / 2."""
    moments = evaluate.Moments()
    for batch in ([[1.0, 5.0], [2.0, 5.0]], [[6.0, 2.0]]):
        moments.add(torch.tensor(batch) + 2 ** 20)
    mean, covariance = moments.result()
    assert mean.tolist() == [2 ** 20 + 3, 2 ** 20 + 4] and covariance.tolist() == [[7, -4.5], [-4.5, 3]]


@pytest.mark.parametrize("count, away", [(2500, 0), (100, 3000)])      # more than a block; far from 0
def test_precision_is_that_of_distances_in_float64(count, away):
    g = torch.Generator().manual_seed(0)
    real = torch.randn(count + 50, 4, generator=g) + away
    fake = torch.randn(count, 4, generator=g) * 1.4 + away
    radius = torch.cdist(real.double(), real.double()).sort(1).values[:, 3]
    expected = (torch.cdist(fake.double(), real.double()) <= radius).any(1).double().mean().item()
    assert evaluate.precision_recall(real, fake)[0] == pytest.approx(expected, abs=1.1 / count)     # one tie


def test_class_accuracy_counts_first_places_and_first_five():
    logits = torch.zeros(3, 12)
    classes = [f"c{i}" for i in range(12)]
    logits[0, [2, 3]] = torch.tensor([3.0, 2.0])                 # class 2 comes first
    logits[1, [0, 1, 3, 4, 5]] = torch.tensor([9.0, 8, 7, 6, 5])       # class 5 is fifth
    logits[2, [0, 1, 3, 4, 6, 2, 9]] = torch.arange(9.0, 2, -1)  # class 9 is seventh
    shares = evaluate.class_accuracy(logits, ["c2", "c5", "c9"], classes)
    assert shares == {"top-1 accuracy": pytest.approx(1 / 3), "top-5 accuracy": pytest.approx(2 / 3)}
    assert evaluate.class_accuracy(logits, ["c2", "c5", "dog"], classes) == {}


# === The command ============================================================================================
def test_a_set_against_itself_and_another_and_their_subsets(measure, two_folders, tmp_path, monkeypatch):
    same = numbers(measure("--reference", "a", "--samples", "a"))
    assert same["FID-like"] == pytest.approx(0, abs=1e-4) and same["precision-like"] == 1
    other = measure("--reference", "a", "--samples", "b", "--json", "r.json")
    assert numbers(other)["FID-like"] > 1e-3 and "warning" not in other
    held = json.loads((tmp_path / "r.json").read_text())
    assert held["results"]["FID-like"] == pytest.approx(numbers(other)["FID-like"], abs=1e-4)
    assert "net.pt2" in held["protocol"]["features"] and "20 pictures of b" in held["protocol"]["pictures"]
    assert "20 pictures of a (as they are)" in other and "3, among 20 reference" in other
    monkeypatch.setattr(evaluate, "SUBSET", 6)               # precision and recall are of these, FID of all
    some = measure("--reference", "a", "--samples", "b", "--save-reference", "a.npz")
    assert numbers(some)["FID-like"] == numbers(other)["FID-like"]
    assert "among 6 reference pictures and 6 others" in some
    assert np.load(tmp_path / "a.npz")["features"].shape == (6, 6)
    again = measure("--reference", "a.npz", "--samples", "b")                # the same six
    assert numbers(again) == numbers(some) and "20 pictures of a" in again
    noise_pictures(tmp_path / "five", 5)
    assert "warning: 5 pictures for 6 features" in measure("--reference", "a", "--samples", "five")


def test_statistics_and_pictures_of_one_file_are_both_used(measure, two_folders, tmp_path):
    """As in the files that the ADM evaluator reads: mu and sigma of a training set, here b's, and arr_0."""
    measure("--reference", "b", "--samples", "b", "--save-reference", "b.npz")
    b = np.load(tmp_path / "b.npz")
    pixels = [np.array(Image.open(tmp_path / "a" / f"{i}.png")) for i in range(20)]
    np.savez(tmp_path / "alone.npz", mu=b["mu"], sigma=b["sigma"])
    np.savez(tmp_path / "both.npz", mu=b["mu"], sigma=b["sigma"], arr_0=np.stack(pixels))
    plain = numbers(measure("--reference", "a", "--samples", "b"))
    both = numbers(measure("--reference", "both.npz", "--samples", "b"))
    assert both == {**plain, "FID-like": 0}                              # precision and recall are a's
    alone = numbers(measure("--reference", "alone.npz", "--samples", "b"))
    assert alone["FID-like"] == 0 and "precision-like" not in alone
    assert "reconstructions by" in measure("--reference", "both.npz", "--reconstructions")


def test_samples_are_resumed_and_extended(measure, tmp_path):
    command = [*DRAW, "--out", "drawn"]
    measure(*command, "--number", 6, "--save-reference", "ref.npz")
    parts = parts_of(tmp_path / "drawn")
    assert sorted(parts) == ["part-000000.npy", "part-000001.npy"]
    (tmp_path / "drawn" / "part-000000.npy").unlink()
    drawn = measure(*command, "--number", 12, "--npz", "all.npz", "--reference", "ref.npz")
    again = parts_of(tmp_path / "drawn")
    assert len(again) == 3 and again.items() > parts.items()
    with np.load(tmp_path / "all.npz") as arrays:
        images, labels = arrays["arr_0"], arrays["arr_1"]
    assert images.shape == (12, 32, 32, 3) and images.dtype == np.uint8
    assert labels.tolist() == 3 * [1, 2, 3, 4]                               # the reference's classes
    assert len(np.unique(images.reshape(12, -1), axis=0)) == 12              # no picture twice
    flat = measure("--reference", TRAIN, "--crop", "--samples", "all.npz")
    assert numbers(flat)["FID-like"] == numbers(drawn)["FID-like"]


def test_two_ranks_draw_what_one_draws_and_one_reads_a_reference(measure, tmp_path, feature_net, checkpoint):
    """With one thread each: more threads add in another order."""
    command = [*DRAW, "--number", 8, "--features", feature_net, "--checkpoint", checkpoint, "--out"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    one = measure(*command, "one")
    torch.set_num_threads(threads)
    two = execute("tools.evaluate", *command, "two", cwd=tmp_path, ranks=2, before=(
        "import os, support.data\nif os.environ['RANK'] == '1':\n    support.data.find_images = None"))
    assert two.returncode == 0, two.output
    assert parts_of(tmp_path / "two") == parts_of(tmp_path / "one")
    assert numbers(two.output)["FID-like"] == numbers(one)["FID-like"]


@pytest.mark.parametrize("target, name, other", [
    (evaluate, "to_pixels", lambda images: 255 - common.to_pixels(images)), (torch, "__version__", "2.99.0")])
def test_pictures_of_other_code_or_torch_are_not_reused(target, name, other, measure, tmp_path, monkeypatch):
    for commit in ("c0ffee", "decade"):                                      # the second draws nothing
        monkeypatch.setattr(evaluate, "commit", lambda: commit)
        printed = measure(*DRAW, "--number", 4)
    assert "drawn by commit c0ffee" in printed and "measured by:  commit decade" in printed
    (folder,) = (tmp_path / "samples").iterdir()
    assert "cpu" in json.loads((folder / "settings.json").read_text())["about"]
    monkeypatch.setattr(target, name, other)
    changed = measure(*DRAW, "--number", 4)
    assert "drawn by commit decade" in changed and len(list((tmp_path / "samples").iterdir())) == 2
    with pytest.raises(drr.UserError, match="version of this code"):
        measure(*DRAW, "--number", 4, "--out", folder)


def test_other_strategies_and_classes_are_drawn(measure, tmp_path):
    command = [*DRAW, "--number", 4, "--class", "1,none", "--out"]
    plain, sobol = measure(*command, "1"), measure(*command, "2", "order=sobol")
    assert "2 classes" in plain and "top-1 accuracy" not in numbers(plain)               # null has no name
    assert "order=sobol" in sobol and parts_of(tmp_path / "1") != parts_of(tmp_path / "2")


# === Networks ===============================================================================================
@pytest.mark.parametrize("name, size, d, C, least", [
    ("classifier", 32, 64, 200, 2), ("efficientnet", 128, 1280, 1000, 5)])           # by chance, 0.1 of 15
def test_a_network_recognises_photographs_of_its_classes(name, size, d, C, least):
    if name == "efficientnet":
        pytest.importorskip("efficientnet_lite_pytorch")
    network = evaluate.load_features(name, torch.device("cpu"))
    pictures = evaluate.in_folder(TRAIN, size)
    features, logits = evaluate.extract_features(network, pictures, "photographs", "cpu")
    assert features.shape == (pictures.count, d) and logits.shape == (pictures.count, C)
    recognised = [network.classes[k] == name for k, name in zip(logits.argmax(1), pictures.labels)]
    assert len(set(network.classes)) == C and sum(recognised) >= least


def test_our_classifier_sees_larger_pictures_reduced():
    network = evaluate.load_features("classifier", torch.device("cpu"))
    large = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    small = torch.nn.functional.interpolate(large, (32, 32), mode="bicubic", antialias=True).clamp(-1, 1)
    assert torch.equal(network.extract(large)[0], network.extract(small)[0])


def test_a_classifier_is_trained_and_used(call, measure, tmp_path):
    """Two classes that a glance tells apart: dark and bright noise."""
    for split, n in (("train", 100), ("val", 20)):
        noise_pictures(tmp_path / "data" / split / "dark", n, least=0)
        noise_pictures(tmp_path / "data" / split / "bright", n, least=128)
    train = functools.partial(call, train_classifier.main, "--data", "data", "--precision", "fp32",
                              "--epochs", 1, "--out", "net.pt2", "--batch-size")
    with pytest.raises(drr.UserError, match="--batch-size 300"):
        train(300)
    assert "validation accuracy 100" in train(20)
    with zipfile.ZipFile(tmp_path / "net.pt2") as archive:         # no path of this machine is in it
        assert not any(b"train_classifier.py" in archive.read(name) for name in archive.namelist())
    result = numbers(measure("--reference", "data/val", "--samples", "data/val", "--features", "net.pt2"))
    assert result["top-1 accuracy"] == 1 and result["FID-like"] == pytest.approx(0, abs=1e-4)
