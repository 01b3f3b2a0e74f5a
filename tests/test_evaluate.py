"""Class accuracy: what counts as a hit, and every mistake in one sentence."""
import importlib.util

import pytest
import torch
from conftest import TESTS, sample_section, tiny_transformer
from test_scripts import execute

import data
import drr
import evaluate

NO_CLASSIFIER = importlib.util.find_spec("efficientnet_lite_pytorch") is None


def test_score_counts_first_places_first_five_and_first_among_the_chosen():
    chosen = torch.tensor([2, 5, 9])
    logits = torch.zeros(3, 12)
    logits[0, [2, 3]] = torch.tensor([3.0, 2.0])                   # class 2 comes first
    logits[1, [0, 1, 3, 4, 5]] = torch.tensor([9.0, 8.0, 7.0, 6.0, 5.0])     # class 5 is fifth, the first of the chosen
    logits[2, [0, 1, 3, 4, 6, 2, 9]] = torch.arange(9.0, 2.0, -1)  # class 9 is seventh, and second of the chosen
    labels = torch.tensor([2, 5, 9])
    batches = [(logits[:2], labels[:2]), (logits[2:], labels[2:])]
    assert evaluate.score(lambda x: x, batches, 3, "test", chosen).tolist() == pytest.approx([1 / 3, 2 / 3, 2 / 3])


def test_samples_are_those_of_the_seed_whatever_the_batch():
    transformer = tiny_transformer()

    class Model:
        null, positions, depth = transformer.null, transformer.positions, transformer.depth
        context, depth_step, decode = transformer.context, transformer.depth_step, staticmethod(lambda codes: codes)

    labels, results = torch.tensor([0, 1, 2, 3, 4]), []
    for batch_size in (2, 5):
        info = type("info", (), {"sample": sample_section(batch_size=batch_size)})
        parts = list(evaluate.samples(Model, info, labels, 7, torch.device("cpu")))
        assert torch.equal(torch.cat([y for _, y in parts]), labels)
        results.append(torch.cat([x for x, _ in parts]))
    assert torch.equal(*results)


@pytest.mark.parametrize("arguments,word", [
    ([], "--data"), (["--class", "0", "--data", "."], "either"), (["--class", "0", "--num", "0"], "--num"),
    (["--class", "0", "nonsense=1"], "nonsense"), (["--class", "0", "t_draft=many"], "t_draft"),
    (["--data", "."], "val"), (["--class", "unheard of"], "unheard"),
    pytest.param(["--class", "0"], "requirements-evaluate.txt",
                 marks=pytest.mark.skipif(not NO_CLASSIFIER, reason="the classifier is installed here"))])
def test_mistakes_are_one_sentence(arguments, word, tmp_path):
    done = execute("evaluate.py", *arguments, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr and word in done.stderr, done.stderr


@pytest.mark.skipif(NO_CLASSIFIER, reason="needs pip install -r requirements-evaluate.txt")
def test_the_classifier_knows_real_photographs(tmp_path):
    """Four photographs of classes that the classifier was trained on; at 128x128 it names at least one of them."""
    files = sorted((TESTS / "photos" / "train").rglob("*.JPEG"))
    _, _, info = drr.load_checkpoint(evaluate.BUNDLED)
    labels = torch.tensor([info.classes.index(f.parent.name) for f in files])
    images = torch.stack([data.crop(data.open_image(f), 128) for f in files])
    hits = evaluate.score(evaluate.load_classifier(torch.device("cpu")), [(data.to_float(images, "cpu"), labels)], len(files),
                          "photographs", labels.unique())
    assert hits[1] > 0.25                                          # chance is 0.5%
