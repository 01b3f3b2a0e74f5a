"""What makes decoding fast gives the same codes: the plain decode of tests/plain.py is the reference."""
import functools
import os

import numpy as np
import pytest
import torch
from conftest import random_codes, sample_section, tiny_transformer
from PIL import Image
from tools.strategies import plain_decode
from processes import execute
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tools.machine import CPU_ATTENTION
from support import common
import drr
from support import fast

N, D = 16, 4
CPU = torch.device("cpu")


class Model:
    """The decoding loop's side of a TorchModel, without an RQ-VAE."""
    positions, depth = N, D

    def __init__(self, transformer):
        self.transformer, self.null = transformer, transformer.null
        self.context, self.depth_step = transformer.context, transformer.depth_step


def inputs(c, images=3, classes=5):
    cond = torch.arange(images)[:, None] % classes
    return cond, drr.draw_noise(1, range(images), 1 + c.rounds, N, D)


def decode(model, c, images=3):
    *_, last = drr.draft_and_revise(model, *inputs(c, images), c)
    return last


# === What nobody asks for is left out, and nothing changes ==========================================================
@pytest.mark.parametrize("n_spatial", [1, 3])
@pytest.mark.parametrize("n", [1, 5, N])
@torch.no_grad()
def test_context_of_some_positions_is_theirs_among_all(n_spatial, n):
    transformer, codes = tiny_transformer(N, D, n_spatial=n_spatial), random_codes(3, N, D)
    mask, cond = torch.rand(3, N, generator=torch.Generator().manual_seed(0)) < 0.5, torch.tensor([[0], [3], [5]])
    positions = torch.rand(3, N, generator=torch.Generator().manual_seed(1)).argsort(1)[:, :n]
    whole = transformer.context(codes, mask, cond)
    torch.testing.assert_close(transformer.context(codes, mask, cond, positions), drr.pick(whole, positions), atol=2e-5, rtol=1e-5)
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as all_positions:
        transformer.context(codes, mask, cond)
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as some:
        transformer.context(codes, mask, cond, positions)
    assert some.get_total_flops() < all_positions.get_total_flops()           # with n = N all but the condition's token


@pytest.mark.parametrize("settings", [
    {}, {"t_draft": 16, "t_revise": 5, "rounds": 1}, {"draft_guidance": 2.0, "revise_guidance": 0.5}, {"revise_guidance": 1.0},
    {"t_draft": 1, "t_revise": 1, "top_k": 7, "top_p": 0.9}])
def test_draws_the_codes_of_the_plain_decode(settings):
    transformer, c = tiny_transformer(N, D), sample_section(**settings)
    codes = decode(Model(transformer), c).codes
    assert torch.equal(codes, plain_decode(transformer, *inputs(c), c))
    assert len(codes.unique()) > 10


class NoWaiting(TorchDispatchMode):
    """Fails where the host would wait for a device: to read a number, or to learn the size of a result."""
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "_unique2"), name
        assert name != "index" or all(i is None or i.dtype != torch.bool for i in args[1]), "index by a mask"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("settings", [{}, {"draft_pool": 0.5}, {"draft_growing": True, "draft_ramp": True, "draft_guidance": 2.0},
                                      {"revise_share": 0.5, "revise_better": True}, {"order": "sobol", "top_k": 3, "top_p": 0.5}])
def test_nothing_waits_for_the_device_between_the_first_update_and_the_last(settings):
    states = drr.draft_and_revise(Model(tiny_transformer(N, D)), *inputs(sample_section(**settings)), sample_section(**settings))
    next(states)                                               # what is looked at once, before the first update
    with NoWaiting():
        assert sum(1 for _ in states) == 4 - 1 + 2 * 2
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoWaiting():
        bool(torch.ones(1).any())


def test_a_picture_is_never_decoded_alone(monkeypatch):
    """Alone, its convolutions add up in another order, and --num 1 would not give the bytes of --num 16."""
    vae, transformer, _ = drr.load_checkpoint(common.BUNDLED)
    model, sizes, decode = drr.TorchModel(vae, transformer, CPU, torch.float32), [], vae.decode
    monkeypatch.setattr(vae, "decode", lambda codes: sizes.append(len(codes)) or decode(codes))
    codes = random_codes(2, 64, 4, codebook_size=1024)
    one, two = model.decode(codes[:1]), model.decode(codes)
    assert sizes == [2, 2] and one.shape == (1, 3, 32, 32) and one.dtype == torch.float32
    torch.testing.assert_close(one, two[:1], atol=1e-5, rtol=0)


# === Compiled, and captured =========================================================================================
@pytest.fixture
def fresh_compiler():
    """torch.compile with nothing compiled yet, whose settings are afterwards what they were."""
    import torch._inductor.config
    torch._dynamo.reset()
    with torch._inductor.config.patch(freezing=False), torch._dynamo.config.patch(recompile_limit=8):
        yield


SLOW = pytest.mark.skipif("SLOW" not in os.environ, reason="takes a minute; SLOW=1 pytest runs it, with a C++ compiler")


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=SLOW)])
def test_a_compiled_update_is_compiled_once_a_phase_and_draws_the_same_codes(backend, monkeypatch, fresh_compiler):
    """Backend eager traces only, which is where what differs between updates would show."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    c = sample_section(draft_guidance=1.5, rounds=2)
    model = Model(tiny_transformer(N, D, n_spatial=1, n_depth=1))
    expected = decode(model, c)
    torch._dynamo.utils.counters.clear()
    fast.speed_up(model, c)
    states = list(drr.draft_and_revise(model, *inputs(c), c))
    assert torch.equal(states[-1].codes, expected.codes)
    torch.testing.assert_close(states[-1].log_p, expected.log_p, atol=1e-4, rtol=1e-4)
    assert [(s.phase, s.round) for s in states] == [("draft", 0)] * 4 + [("revise", 1)] * 2 + [("revise", 2)] * 2
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    codes, region = expected.codes[:1].expand(3, -1, -1), torch.ones(N, dtype=torch.bool)      # in-painting: not contiguous
    *_, last = drr.draft_and_revise(model, *inputs(c), c, codes, region)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2 and torch.equal(last.codes, expected.codes)
    assert torch._inductor.config.freezing


@pytest.mark.parametrize("settings", [{"draft_guidance": 1.5}, {"t_draft": 5, "revise_better": True}])
def test_captured_updates_draw_the_same_codes(settings, monkeypatch):
    """A graph's replay is played by doing the work again into the tensors that were there at the capture, as a GPU does."""
    captured, replayed = [], []

    def capture(work, pool):
        output = work()
        captured.append(output)

        def replay():
            replayed.append(1)
            for old, new in zip(output[2:], work()[2:]):
                old.copy_(new)
        for tensor in output[2:]:
            tensor.zero_()                                     # a capture computes nothing
        return replay, output

    monkeypatch.setattr(fast, "capture", capture)
    c, model = sample_section(**settings), Model(tiny_transformer(N, D))
    expected = list(drr.draft_and_revise(model, *inputs(c), c))
    fast.speed_up(model, c, compiled=False, graphs=True)
    for trial in range(2):
        states = list(drr.draft_and_revise(model, *inputs(c), c))              # all kept: none may be written over
        assert all(torch.equal(a, b) for x, y in zip(states, expected, strict=True) for a, b in zip(x[2:], y[2:]))
    sizes = len({s.shape for s in drr.partition(torch.zeros(3, N), c.t_draft)})
    assert len(captured) == sizes + 1 and len(replayed) == 2 * len(expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("compiled", [False, True])
def test_cuda_graphs_draw_the_same_codes(compiled):
    c, model = sample_section(draft_guidance=1.5), Model(tiny_transformer(N, D).cuda())
    cond, noise = inputs(c)
    *_, expected = drr.draft_and_revise(model, cond.cuda(), noise, c)
    fast.speed_up(model, c, compiled, graphs=True)
    *_, last = drr.draft_and_revise(model, cond.cuda(), noise, c)
    assert (last.codes == expected.codes).float().mean() > 0.9                 # near ties may fall either way


def test_more_shapes_than_torchs_limit_are_compiled(monkeypatch, fresh_compiler):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    c, model = sample_section(rounds=0, t_draft=1), Model(tiny_transformer(N, D, n_spatial=1, n_depth=1))
    fast.speed_up(model, c)
    for images in range(1, 10):
        assert decode(model, c, images).codes.shape == (images, N, D)


@pytest.mark.parametrize("settings", [{"draft_pool": 0.5}, {"draft_growing": True}, {"draft_ramp": True}])
def test_updates_that_differ_are_not_compiled(settings):
    with pytest.raises(drr.UserError, match="alike"):
        fast.speed_up(Model(tiny_transformer(N, D)), sample_section(**settings))


@pytest.mark.parametrize("option", [["--compile"], ["--precision", "fp8"]])
def test_fast_ways_go_with_pytorch_only(option, tmp_path):
    done = execute("sample.py", "--class", 1, *option, "--backend", "onnx", cwd=tmp_path)
    assert done.returncode == 2 and option[-1] in done.stderr and "Traceback" not in done.stderr


@SLOW
def test_compiled_samples_are_those_that_are_not(tmp_path):
    common = ["sample.py", "--class", 1, "--num", 3, "--t-draft", 2, "--m", 1, "--precision", "fp32", "batch_size=2"]
    for name, more in (("eager", []), ("compiled", ["--compile"])):
        done = execute(*common, "--out", f"{name}.png", *more, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    one, two = (np.array(Image.open(tmp_path / f"{name}.png")) for name in ("eager", "compiled"))
    assert (one == two).mean() > 0.9                                           # near ties may fall either way


def test_samples_in_float8(tmp_path):
    done = execute("sample.py", "--class", 1, "--num", 1, "--t-draft", 2, "--m", 0, "--precision", "fp8", cwd=tmp_path)
    assert done.returncode == 0 and "fp8" in done.stdout and (tmp_path / "samples" / "1_seed0.png").exists(), done.stderr


# === Precision ======================================================================================================
@torch.no_grad()
def test_float8_products_are_near_the_exact_ones():
    generator = torch.Generator().manual_seed(0)
    linear, x = torch.nn.Linear(64, 48), torch.randn(3, 5, 64, generator=generator)
    linear.weight.copy_(torch.randn(48, 64, generator=generator) * torch.logspace(-3, 3, 48)[:, None])   # a scale for each output
    exact, rough = linear(x), fast.Float8Linear(linear)(x.bfloat16()).float()
    error = (rough - exact).norm(dim=(0, 1)) / exact.norm(dim=(0, 1))
    # Either factor is off by 2^-4 at most, by 0.026 in the root mean square: a sum of 64 products by about 0.037.
    assert rough.shape == exact.shape and 0.01 < error.mean() < 0.05 and error.max() < 0.125


@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs a GPU that has float8")
@torch.no_grad()
def test_float8_on_a_gpu_is_the_cpus():
    linear, x = torch.nn.Linear(64, 48), torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    module = fast.Float8Linear(linear)
    torch.testing.assert_close(module.cuda()(x.cuda()).cpu(), fast.Float8Linear(linear)(x), atol=0.02, rtol=0.02)


@torch.no_grad()
def test_float8_takes_all_spatial_blocks_but_the_last():
    transformer = tiny_transformer(N, D, n_spatial=3).bfloat16()
    codes, mask, cond = random_codes(2, N, D), torch.zeros(2, N, dtype=torch.bool), torch.zeros(2, 1, dtype=torch.int64)
    exact = transformer.context(codes, mask, cond).float()
    fast.to_float8(transformer)
    kinds = [type(getattr(b, name)) for b in transformer.spatial for name in ("qkv", "proj", "fc1", "fc2")]
    assert kinds == [fast.Float8Linear] * 8 + [torch.nn.Linear] * 4
    rough = transformer.context(codes, mask, cond).float()
    assert 0.001 < (rough - exact).norm() / exact.norm() < 0.1


@pytest.mark.parametrize("rates, expected", [((300e9, 100e9), True), ((110e9, 100e9), False), ((170e9, 320e9), False)])
def test_bf16_on_a_cpu_has_to_be_faster_than_float32(rates, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    monkeypatch.setattr(common, "matrix_rate", lambda device, dtype, *_: rates[dtype == torch.float32])
    assert common.bf16_pays(CPU) is expected
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True}, raising=False)
    assert common.bf16_pays(CPU) is False
