"""What the tests share: the path to the scripts, small configurations, small models, a short training."""
import json
import os
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

if "PYTEST_XDIST_WORKER" in os.environ:      # several workers share the cores: one thread each
    os.environ["OMP_NUM_THREADS"] = "1"      # of their children, too

import pytest
import torch

REPO = Path(__file__).resolve().parent.parent
TESTS = REPO / "tests"
sys.path.insert(0, str(REPO))
sys.dont_write_bytecode = True

import drr  # after the path to it
import processes
from processes import PHOTOS, STAGES
from support import common, models


def pytest_configure(config):
    config.option.loadscopereorder = False   # pytest-xdist: not the files with the most tests first


def pytest_collection_modifyitems(items):
    """The longest files first, so that two workers finish at about the same time."""
    longest = [f"test_{name}.py" for name in "training ranks study scripts evaluate export".split()]
    items.sort(key=lambda item: [*longest, item.path.name].index(item.path.name))


@pytest.fixture(autouse=True, scope="session")
def two_threads():
    torch.set_num_threads(min(2, torch.get_num_threads()))


def vae_section(**changes):
    """A section `vae` of the sizes of fixtures/rqvae.safetensors."""
    values = dict(resolution=32, ch=32, ch_mult=[1, 2, 2], num_res_blocks=1, attn_resolutions=[8],
                  z_channels=32, code_dim=32, codebook_size=64, depth=4, ema_decay=0.99, upscale=1)
    return SimpleNamespace(**{**values, **changes})


def transformer_section(**changes):
    values = dict(n_spatial=2, n_depth=2, d_model=32, head_dim=16, cond="class", text_length=3, text_vocab=11)
    return SimpleNamespace(**{**values, **changes})


def sample_section(**changes):
    values = dict(t_draft=4, t_revise=2, rounds=2, draft_temperature=1.0, revise_temperature=0.8,
                  draft_guidance=1.0, revise_guidance=1.8, top_k=0, top_p=1.0, batch_size=16)
    return SimpleNamespace(**{**values, **changes})


def tiny_transformer(positions=16, depth=4, classes=5, codebook_size=24, code_dim=8, seed=0, std=0.2,
                     **changes):
    """A transformer with weights large enough that every input matters visibly."""
    generator = torch.Generator().manual_seed(seed)
    codebook = torch.randn(codebook_size, code_dim, generator=generator)
    torch.manual_seed(seed)
    model = drr.ContextualRQTransformer(transformer_section(**changes), classes, positions, depth, codebook)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=std)
    return model.requires_grad_(False).eval()


def random_checkpoint(folder, classes, titles, *overrides):
    """Random weights of the preset `smoke`."""
    config = common.load_config("smoke", overrides)
    torch.manual_seed(0)
    vae = drr.RQVAE(config.vae)
    transformer = models.build(config.transformer, len(classes), 64, 4, vae.quantizer.codebook)
    drr.save_vae(folder / "vae.safetensors", vae, config)
    drr.save_transformer(folder / "transformer.safetensors", transformer, config, classes, titles, vae)


def torch_model(transformer):
    """The model as the decoding loop sees it, without an RQ-VAE."""
    names = ("context", "depth_step", "null", "positions", "depth")
    return SimpleNamespace(transformer=transformer, **{name: getattr(transformer, name) for name in names})


def teacher_forced(transformer, codes, hidden, positions, cond, guidance, temperature):
    """log p (B, n) of the stacks at `positions`, with them and `hidden` hidden, by depth_logits."""
    hidden = hidden.scatter(1, positions, True)
    stacks = drr.select(codes, positions).flatten(0, 1)                        # (B n, D)
    logits = []
    for c in (cond, torch.full_like(cond, transformer.null)):
        h = drr.select(transformer.context(codes, hidden, c), positions)
        logits.append(transformer.depth_logits(h.flatten(0, 1), stacks))
    guided = logits[1] + guidance * (logits[0] - logits[1])                    # (B n, D, K)
    log_p = (guided / temperature).log_softmax(-1)
    return log_p.gather(2, stacks[..., None]).sum((1, 2)).view(positions.shape)


def random_codes(*shape, codebook_size=24, seed=0):
    return torch.randint(codebook_size, shape, generator=torch.Generator().manual_seed(seed))


class FeatureNet(torch.nn.Module):
    """images (B, 3, S, S) -> six features, four logits: for tools/evaluate.py and tools/study.py."""

    def forward(self, images):
        features = torch.cat([images.mean((2, 3)), images.std((2, 3))], 1)
        return features, features[:, :4] * 5


@pytest.fixture(scope="session")
def feature_net(tmp_path_factory):
    """FeatureNet as a program of torch.export that says what it is."""
    path = tmp_path_factory.mktemp("feature_net") / "net.pt2"
    batch = torch.export.Dim("B")
    program = torch.export.export(FeatureNet(), (torch.zeros(2, 3, 32, 32),), dynamic_shapes=({0: batch},))
    about = {"classes": ["n02814860", "n09332890", "n09472597", "n11939491"], "size": 32}
    torch.export.save(program, path, extra_files={"about.json": json.dumps(about)})
    return path


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """call(main, ...) is a script with these arguments, in this process and an empty folder: its output."""
    def call(main, *arguments):
        monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
        monkeypatch.chdir(tmp_path)
        main()
        return capsys.readouterr().out
    return call


# === A short run of either stage ============================================================================
def arguments_for(stage, vae, out, *more):
    """Six steps, the adversary's first the third; each is logged, the state of every other is saved."""
    short = ["steps=6", "warmup=3", "save_every=2", "log_every=1", "batch_size=8"]
    if stage == "vae":       # no decay: the first steps are those of a shorter run, too
        short += ["micro_batch=4", "decay=false", "picture_every=4", "quantize_start=1", "disc_start=2"]
    else:
        more = ("--vae", vae, *more)
    return ("smoke", "--data", PHOTOS, "--out", out, "--precision", "fp32",
            *(f"{stage}.{setting}" for setting in short), *more)


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The folder of whole/STAGE, such runs from beginning to end. Of each also: what it printed, seconds."""
    folder, printed, seconds = tmp_path_factory.mktemp("whole"), {}, {}
    processes.server()       # its start is not the run's
    for stage in STAGES:
        start = time.time()
        out = folder / stage
        done = processes.train(stage, *arguments_for(stage, folder / "vae" / "vae.safetensors", out))
        printed[stage] = processes.finished(done).output
        seconds[stage] = time.time() - start
    return SimpleNamespace(folder=folder, vae=folder / "vae", transformer=folder / "transformer",
                           printed=printed, seconds=seconds)


@pytest.fixture
def arguments(whole):
    """arguments(stage, out, ...): such a run; what is given later counts."""
    return lambda stage, *rest: arguments_for(stage, whole.vae / "vae.safetensors", *rest)


@pytest.fixture
def resume(whole, arguments, tmp_path):
    """resume(stage, ...) goes on with a copy of those runs, whose folder is resume.out."""
    def call(stage, *more, **options):
        return processes.train(stage, *arguments(stage, call.out, "--resume", *more), **options)
    call.out = tmp_path / "run"
    for stage in STAGES:
        shutil.copytree(whole.folder / stage, call.out, dirs_exist_ok=True)
    return call
