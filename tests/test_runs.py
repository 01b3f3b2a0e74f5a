"""What training promises beyond its losses: whose state is resumed, what is random, what memory it takes."""
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import TESTS, transformer_section
from safetensors.torch import load_file

import drr
import train_transformer
import train_vae
from drr import UserError
from processes import PHOTOS, assert_same, finished, train, weights
from support import common, data, runs
from support.common import BUNDLED, load_config
from tools import estimate


# === States: whose they are, which is good ==================================================================
@pytest.fixture
def begin(tmp_path):
    """begin(resume=..., force=...): the States of a run in the same folder, and the step it begins with."""
    def call(resume=False, force=False):
        options = SimpleNamespace(data="x", init=None, resume=resume, force=force)
        states = runs.States(tmp_path, "vae", options, 2)
        states.lock()
        return states, states.begin({"vae": torch.nn.Linear(1, 1)}, {})
    return call


def test_a_run_that_was_started_over_never_comes_back(begin, tmp_path):
    """Killed before its first save, the new run must not go on from the old one's last state."""
    begin()[0].save(40)                      # the lock ends with the object, as it does with a process
    begin(force=True)
    with pytest.raises(UserError, match="nothing to resume"):
        begin(resume=True)
    assert (tmp_path / "vae_state_000000040.pt.old").exists()  # until the new run has saved
    begin(force=True)[0].save(5)
    assert begin(resume=True)[1] == 5
    assert [f.name for f in tmp_path.glob("*state*")] == ["vae_state_000000005.pt"]


def test_only_a_state_that_a_step_has_succeeded_from_is_called_good(begin):
    states, _ = begin()
    states.save(1)
    assert states.good(1) is None            # the step after it has failed
    states.save(2)
    assert str(states.good(3)).endswith("vae_state_000000002.pt")
    del states
    advice = begin(resume=True)[0].good(2)
    assert advice.startswith("delete vae_state_000000002.pt") and advice.endswith("vae_state_000000001.pt")


def test_looking_and_saving_are_left_out_of_the_speed(tmp_path, monkeypatch):
    c = SimpleNamespace(batch_size=8, steps=9)
    clock = iter([0, 1, 5, 6, 9])              # made; a step; saved; a step; saved
    monkeypatch.setattr(runs, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    log = runs.Log(tmp_path, "vae", torch.nn.Linear(1, 1), c, 0, 1, 1, torch.device("cpu"), torch.float32)
    for step in (1, 2):
        log.count(step)
        log.end_step(look=False)
    assert log.seconds == 2 and log.images == 16


# === Dropout, Muon ==========================================================================================
def test_dropout_and_muon_resume_to_the_bit(arguments, tmp_path):
    run = arguments("transformer", tmp_path / "run", "transformer.dropout=0.3", "transformer.muon_lr=0.01")
    finished(train("transformer", *run))
    shutil.copytree(tmp_path / "run", tmp_path / "whole")
    (tmp_path / "run" / "transformer_state_000000006.pt").unlink()
    finished(train("transformer", *run, "--resume"))
    assert_same(tmp_path / "whole", tmp_path / "run", "transformer")


def test_dropout_is_of_what_blocks_add_and_in_training_alone():
    block, x = drr.Block(32, 16), torch.randn(2, 3, 32)
    plain = block(x)
    block.dropout.p = 1 - 1e-9
    assert torch.equal(block(x), x)
    assert torch.equal(block.eval()(x), plain)


def test_muon_has_the_whole_matrices_of_the_blocks_and_adamw_all_else(call):
    model = drr.ContextualRQTransformer(transformer_section(), 3, 16, 4, torch.randn(24, 8))
    c = load_config("smoke", ["transformer.muon_lr=0.02"]).transformer
    adamw, muon = train_transformer.optimizers(model, c)
    names = {p: name for name, p in model.named_parameters()}
    by = [sorted(names[p] for group in o.param_groups for p in group["params"]) for o in (adamw, muon)]
    assert sorted(by[0] + by[1]) == sorted(names.values())
    assert by[1] == sorted(name for name, p in model.named_parameters() if "." in name and p.dim() == 2
                           and name.startswith(("spatial", "depthwise")))
    with pytest.raises(UserError, match="Muon needs whole matrices"):
        call(train_transformer.main, "smoke", "--data", PHOTOS, "--device", "cpu", "transformer.muon_lr=0.01",
             "transformer.shard=true")


# === As published: the codebook, the adversary, precisions ==================================================
def test_the_codebook_moves_once_for_each_depth(arguments, tmp_path):
    one_step = "vae.steps=1", "vae.quantize_start=0", "vae.ema_decay=0.5", "vae.restart_below=0"
    finished(train("vae", *arguments("vae", tmp_path, *one_step)))
    counts = weights(tmp_path, "vae")["quantizer.cluster_size"]
    assert counts.sum().item() == pytest.approx(8 * 64 * (1 - 0.5 ** 4))


def test_the_updates_are_the_official_ones_depth_by_depth():
    official = load_file(TESTS / "fixtures" / "rqvae.safetensors")
    q = drr.ResidualQuantizer(64, 32, 1, official["ema.decay"].item())
    q.cluster_size.copy_(official["ema.before.cluster_size_ema"])
    q.embed_sum.copy_(official["ema.before.embed_ema"])
    q.codebook.copy_(official["ema.before.weight"][:64])
    residual = official["ema.x"].flatten(0, 2)
    for d in range(4):
        codes, partial_sums = q.quantize(residual)
        assert torch.equal(codes, official["ema.rq.codes"][..., d].view(-1, 1))
        q.update_codebook(residual, codes[:, 0])
        residual = residual - partial_sums[:, 0]
        theirs = official[f"ema.rq.after_depth{d}.weight"][:64]
        torch.testing.assert_close(q.codebook, theirs, atol=1e-5, rtol=1e-5)


def test_codes_restart_at_the_given_count():
    q = drr.ResidualQuantizer(8, 2, 1, 0.9975)
    q.cluster_size.copy_(torch.tensor([0.2, 0.3] * 4))
    vectors = torch.randn(40, 2, generator=torch.Generator().manual_seed(0)) + 50
    q.update_codebook(vectors, torch.ones(40).long(), torch.Generator().manual_seed(0), 0.25)
    assert torch.all(q.cluster_size[::2] == 0.25) and torch.all(q.cluster_size[1::2] > 0.29)
    assert all(torch.isclose(vectors, code).all(1).any() for code in q.embed_sum[::2] / 0.25)


def test_the_adversary_begins_as_in_the_official_code():
    torch.manual_seed(0)
    state = train_vae.Discriminator("patchgan", 64, 2).state_dict()
    assert state["layers.1.0.weight"].std().item() == pytest.approx(0.02, rel=0.02)            # a convolution
    assert (state["layers.2.1.weight"] - 1).std().item() == pytest.approx(0.02, rel=0.2)       # a BatchNorm
    w = torch.tensor([1.0], requires_grad=True)
    assert train_vae.adaptive_weight(w.sum(), 1e-4 * w.sum(), w).item() == pytest.approx(1 / 2e-4)


def test_stage_one_and_the_codes_are_float32_where_bf16_is_faster(call, monkeypatch):
    seen = []

    def look(*arguments):
        seen.extend(str(argument) for argument in arguments if str(argument).startswith("torch."))
        if len(seen) != 2:
            raise StopIteration
        return {}
    monkeypatch.setattr(common, "bf16_pays", lambda device: True)
    monkeypatch.setattr(runs, "settings_of", look)
    monkeypatch.setattr(data, "cached_codes", look)
    for script, more in (train_vae, []), (train_transformer, ["--vae", BUNDLED / "vae.safetensors"]):
        with pytest.raises(StopIteration):
            call(script.main, "smoke", "--data", PHOTOS, "--out", "run", "--device", "cpu", *more)
    assert seen == ["torch.float32", "torch.bfloat16", "torch.float32"]


def test_gradients_live_in_the_buckets_and_shards_on_the_device_asked_for(monkeypatch):
    seen = []
    monkeypatch.setattr(runs, "ranks", lambda: (1, 2))
    monkeypatch.setattr(runs, "DistributedDataParallel", lambda *_, **options: seen.append(options))
    monkeypatch.setattr(runs, "init_device_mesh", lambda kind, shape: (kind, shape), raising=False)
    monkeypatch.setattr(runs, "fully_shard", lambda module, **options: seen.append(options))
    runs.parallel(torch.nn.Linear(1, 1), torch.device("cpu"))
    assert seen.pop()["gradient_as_bucket_view"]
    runs.shard(*2 * [SimpleNamespace(spatial=[0], depthwise=[1])], torch.device("cpu"))
    assert seen == 6 * [{"mesh": ("cpu", (2,))}]


def test_pictures_take_a_copy_of_the_average_in_the_decodes_precision(monkeypatch, tmp_path):
    vae, transformer, info = drr.load_checkpoint(BUNDLED)
    given = []

    def torch_model(vae, transformer, device, dtype):
        given.extend(transformer.parameters())
        raise StopIteration
    monkeypatch.setattr(drr, "TorchModel", torch_model)
    with pytest.raises(StopIteration):
        train_transformer.save_samples(transformer, None, vae, info.sample, None, "cpu", torch.bfloat16,
                                       tmp_path)
    assert {p.dtype for p in given} == {torch.bfloat16}
    config = load_config("imagenet-1.4b", ["transformer.shard=true"])          # on rank 0: all of the average
    assert estimate.memory("transformer", config, 8, batch=1).activations > 6 * 1.38e9
