"""The estimate of a training's cost, beside what real tensors take and what the formulas say."""
import gc
import math
import sys

import pytest
import torch

from support import common
from tools import estimate
from support.common import load_config
from processes import run

CPU = torch.device("cpu")
SIZES = {"vae": ["vae.ch=32", "vae.perceptual_weight=1"], "transformer": ["transformer.d_model=128"]}


def small(stage, recompute=False):
    config = load_config("smoke", SIZES[stage])
    config.transformer.recompute = recompute
    return config


def allocated(events):
    """The most bytes held at once, by the allocations and releases that the profiler saw."""
    held = most = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.mark.parametrize("stage, dtype, recompute", [
    ("vae", torch.float32, False), ("transformer", torch.bfloat16, False), ("transformer", torch.bfloat16, True)])
def test_the_activations_are_those_of_a_real_step(stage, dtype, recompute):
    config = small(stage, recompute)
    config.vae.perceptual_weight = 0       # VGG16 is so large beside this RQ-VAE that its kernels' own memory counts
    guess = estimate.memory(stage, config, 1, "cpu", dtype, batch=8).activations
    parts = estimate.build(stage, config)
    own = {t.untyped_storage()._cdata for m in (parts.trained, parts.frozen or parts.trained)
           for t in (*m.parameters(), *m.buffers())}
    saved = {}

    def keep(t):
        if t.untyped_storage()._cdata not in own:
            saved[t.untyped_storage()._cdata] = t.untyped_storage()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):      # makes the gradients, too
        estimate.forward_backward(stage, config, parts, 8, CPU, dtype)
    kept = sum(s.nbytes() for s in saved.values())
    saved.clear()
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        estimate.forward_backward(stage, config, parts, 8, CPU, dtype)
    assert guess == pytest.approx(allocated(profiler.profiler.kineto_results.events()), rel=0.08)
    assert recompute or guess / 2 < kept < 1.1 * guess      # more: the adversary's graph, made when the other is gone


@pytest.mark.parametrize("stage", ["vae", "transformer"])
def test_the_state_is_that_of_a_real_step(stage):
    config = small(stage)
    parts = estimate.build(stage, config)
    opt = torch.optim.AdamW(parts.trained.parameters())
    estimate.forward_backward(stage, config, parts, 2, CPU, torch.float32)
    opt.step()
    modules = [parts.trained, parts.frozen] + [parts.trained] * (stage == "transformer")   # again: the moving average
    tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    tensors += [p.grad for p in parts.trained.parameters()]
    tensors += [t for state in opt.state.values() for t in state.values() if t.dim()]         # without the step counts
    m = estimate.memory(stage, config, 1, "cpu", torch.float32, batch=1)
    assert m.state == sum(t.numel() * t.element_size() for t in tensors)
    assert m.parameters == sum(p.numel() for p in parts.trained.parameters())


def test_sharding_divides_what_belongs_to_the_weights():
    config = small("transformer")
    one = estimate.memory("transformer", config, 8, "cpu", torch.float32, batch=1)
    config.transformer.shard = True
    eighth = estimate.memory("transformer", config, 8, "cpu", torch.float32, batch=1)
    assert one.state - eighth.state == pytest.approx(7 / 8 * 20 * one.parameters, rel=1e-6)
    assert one.activations == eighth.activations


def test_operations_are_six_a_parameter_and_token_and_the_attention():
    config = load_config("imagenet-371m", ["transformer.n_spatial=3", "transformer.n_depth=2"])
    c, v, N = config.transformer, config.vae, 64
    hidden = round(64 * 2 / math.pi + 0.5)
    block = 12 * c.d_model ** 2
    spatial = c.n_spatial * (6 * block * (N + 1) + 12 * (N + 1) ** 2 * c.d_model)
    depth = hidden * v.depth * (c.n_depth * (6 * block + 12 * v.depth * c.d_model) + 6 * c.d_model * v.codebook_size)
    flops = estimate.flops_per_image("transformer", config)
    assert flops == pytest.approx(spatial + depth, rel=0.03)
    # Recomputation is the forward pass of the blocks once more, but for fc2: it stops when all that is kept is there.
    c.recompute = True
    block *= 2 / 3
    again = (c.n_spatial * (2 * block * (N + 1) + 4 * (N + 1) ** 2 * c.d_model)
             + hidden * v.depth * c.n_depth * (2 * block + 4 * v.depth * c.d_model))
    assert estimate.flops_per_image("transformer", config) - flops == pytest.approx(again, rel=0.03)


def test_the_adversary_and_the_perceptual_loss_are_counted():
    plain = estimate.flops_per_image("vae", load_config("smoke", ["vae.disc_weight=0"]))
    adversary = estimate.flops_per_image("vae", load_config("smoke"))
    both = estimate.flops_per_image("vae", small("vae"))
    assert 0 < plain < adversary < both


def test_a_gpu_keeps_no_attention_matrices_and_normalises_in_float32():
    long = load_config("smoke", ["vae.resolution=128", "transformer.n_spatial=8"])                # 1024 positions
    scores = lambda kind: estimate.memory("transformer", long, 1, kind, torch.bfloat16, batch=1).activations
    assert scores("cpu") - scores("cuda") > 7 * 2 * 1025 ** 2      # at least one bf16 matrix a block
    kept = scores("cuda")
    long.transformer.recompute = True
    assert scores("cuda") < 0.7 * kept
    norms = lambda kind: estimate.memory("vae", small("vae"), 1, kind, torch.bfloat16, batch=1).activations
    assert norms("cuda") > 1.05 * norms("cpu")


def test_a_batch_that_the_gpus_cannot_share_is_refused():
    assert estimate.micro_batch("transformer", load_config("smoke", ["transformer.micro_batch=4"]).transformer, 2) == 4
    with pytest.raises(estimate.UserError, match="no multiple of the 3"):
        estimate.micro_batch("transformer", load_config("smoke").transformer, 3)


def test_the_script(monkeypatch, capsys):
    def execute(*words):
        monkeypatch.setattr(sys, "argv", ["tools.estimate", *words])
        estimate.main()
        return capsys.readouterr().out

    rows = [line.split()[:4] for line in execute("smoke", "cc3m-366m", "vae.ch=64", "--tflops", "9").splitlines()[2:]]
    assert rows == [["smoke", s, n, m] for s in ("vae", "transformer") for n, m in (("1", "16"), ("8", "2"))]
    monkeypatch.setattr(estimate, "matrix_rate", lambda *_: 1e12)
    shown = execute("smoke", "--check", "--batch", "2", "--device", "cpu", "--precision", "fp32")
    assert "step 2: loss" in shown and "GB measured" in shown
    for words in (["--check"], ["smoke", "--gpus", "0"], ["smoke", "--mfu", "2"], ["smoke", "vae.chh=3"]):
        with pytest.raises(estimate.UserError):
            execute(*words)


def test_the_memory_of_the_starting_process_does_not_count(tmp_path):
    held = torch.ones(100_000_000)                                 # 0.4 GB
    child = int(run("-c", "import common; print(common.peak_ram())", cwd=tmp_path).stdout)
    assert child < common.peak_ram() - held.nbytes / 2
