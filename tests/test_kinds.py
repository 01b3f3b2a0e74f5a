"""What every kind of transformer does: it trains, is resumed, draws, and is exported."""
import numpy as np
import pytest
from conftest import arguments_for
from PIL import Image
from processes import assert_same, finished, receives, run, train

AUTOREGRESSIVE = "transformer.kind=autoregressive", "transformer.cond_dropout=0"
SETTINGS = {"contextual": (), "autoregressive": AUTOREGRESSIVE, "maskgit": ("transformer.kind=maskgit",),
            "unconditional": (*AUTOREGRESSIVE, "transformer.cond=none", "transformer.soft_labels=true",
                              "transformer.stochastic_codes=true")}


@pytest.fixture(scope="module", params=SETTINGS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def arguments(kind, whole, tmp_path_factory):
    """arguments(out) of a short training of this kind."""
    folder = whole.vae
    if kind == "maskgit":                                      # it draws stacks of one code
        folder = tmp_path_factory.mktemp("vae")
        finished(train("vae", *arguments_for("vae", None, folder, "vae.depth=1")))
    return lambda out, *more: arguments_for("transformer", folder / "vae.safetensors", out, *SETTINGS[kind],
                                            *more)


@pytest.fixture(scope="module")
def trained(kind, whole, arguments, tmp_path_factory):
    """The folder of such a run."""
    if kind == "contextual":
        return whole.transformer
    out = tmp_path_factory.mktemp(kind)
    finished(train("transformer", *arguments(out)))
    return out


@pytest.fixture
def draw(kind, trained, tmp_path):
    """The pixels of one picture by sample.py."""
    def draw(*more):
        chosen = [] if kind == "unconditional" else ["--class", 0]
        run("sample.py", *chosen, "--num", 1, "--precision", "fp32", "--out-dir", "x", *more, cwd=tmp_path)
        return np.array(Image.open(tmp_path / "x" / "000.png")).astype(int)
    return draw


def test_a_run_that_was_interrupted_ends_with_the_same_weights(trained, arguments, tmp_path):
    stopped = train("transformer", *arguments(tmp_path), before=receives("SIGTERM", step=3))
    assert stopped.returncode == 128 + 15, stopped.output
    finished(train("transformer", *arguments(tmp_path, "--resume")))
    assert_same(trained, tmp_path, "transformer")


def test_a_training_shows_pictures_and_its_result_draws(trained, draw):
    assert Image.open(trained / "samples_000006.png").width == 4 * 130 - 2
    picture = draw("--checkpoint", trained)
    assert picture.shape == (32, 32, 3) and picture.std() > 1


@pytest.mark.parametrize("kind", ["contextual", "autoregressive", "maskgit"], indirect=True)
def test_graphs_draw_pytorchs_picture(trained, draw, tmp_path):
    run("export.py", "--checkpoint", trained, "--out", "exported", "--max-batch", 4, cwd=tmp_path)
    ours = draw("--checkpoint", trained, "--m", 0)
    theirs = draw("--backend", "onnx", "--exported", "exported", "--m", 0)
    assert abs(ours - theirs).max() <= 1                       # of 255
