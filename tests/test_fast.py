"""What makes decoding fast draws the same codes: strategies.plain_decode is the reference."""
import functools
import os
import shutil
import sys
from unittest.mock import Mock

import pytest
import torch
from conftest import random_codes, sample_section, tiny_transformer, torch_model
from torch.utils._python_dispatch import TorchDispatchMode

import drr
import sample
from support import common, fast
from tools.strategies import plain_decode

N, D = 16, 4
CPU = torch.device("cpu")


def inputs(c, images=3, positions=N, depth=D):
    cond = torch.arange(images)[:, None] % 5
    return cond, drr.draw_noise(1, range(images), 1 + c.rounds, positions, depth)


def decode(model, c, images=3, update=drr.update):
    cond, noise = inputs(c, images, model.positions, model.depth)
    return list(drr.draft_and_revise(model, cond, noise, c, update=update))


# === What is not needed is left out, and nothing changes ====================================================
@pytest.mark.parametrize("settings", [
    {}, {"t_draft": 16, "t_revise": 5, "rounds": 1}, {"draft_guidance": 2.0, "revise_guidance": 0.5},
    {"revise_guidance": 1.0}, {"t_draft": 1, "t_revise": 1, "top_k": 7, "top_p": 0.9}])
def test_draws_the_codes_of_the_plain_decode(settings):
    """In float64, whose rounding decides no draw."""
    transformer, c = tiny_transformer(N, D).double(), sample_section(**settings)
    codes = decode(torch_model(transformer), c)[-1].codes
    assert torch.equal(codes, plain_decode(transformer, *inputs(c), c))
    assert len(codes.unique()) > 10


class NoWaiting(TorchDispatchMode):
    """Fails where the host would wait for a device: to read a number, or to learn the size of a result."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select",
                            "unique", "_unique2"), name
        assert name != "index" or all(i is None or i.dtype != torch.bool for i in args[1]), "index by a mask"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("settings", [{}, {"draft_guidance": 2.0}, {"top_k": 3, "top_p": 0.5}])
def test_nothing_waits_for_the_device_between_the_first_update_and_the_last(settings):
    c = sample_section(**settings)
    states = drr.draft_and_revise(torch_model(tiny_transformer(N, D)), *inputs(c), c)
    next(states)                                           # what is looked at once, before the first update
    with NoWaiting():
        assert sum(1 for _ in states) == 4 - 1 + 2 * 2
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoWaiting():
        bool(torch.ones(1).any())


def test_an_image_is_never_decoded_alone_nor_in_a_float16_that_cannot_hold_it(monkeypatch, capsys):
    """Alone, its convolutions add up in another order, and --num 1 would not give the bytes of --num 16."""
    vae, transformer, _ = drr.load_checkpoint(common.BUNDLED)
    model, sizes, plain = drr.TorchModel(vae, transformer, CPU, torch.float32), [], vae.decode

    def decode(codes):
        sizes.append(len(codes))
        return plain(codes) / (not torch.is_autocast_enabled("cpu"))         # infinite in float16

    monkeypatch.setattr(vae, "decode", decode)
    codes = random_codes(2, 64, 4, codebook_size=1024)
    one, two = model.decode(codes[:1]), model.decode(codes)
    assert sizes == [2, 2] and one.shape == (1, 3, 64, 64) and one.dtype == torch.float32
    torch.testing.assert_close(one, two[:1], atol=1e-5, rtol=0)
    model.half = True                                        # as on a GPU beside a bf16 transformer
    assert torch.equal(model.decode(codes), two) and torch.equal(model.decode(codes), two)
    assert capsys.readouterr().out.count("float32") == 1


# === Compiled, and captured =================================================================================
@pytest.fixture
def fresh_compiler():
    """torch.compile with nothing compiled yet, whose settings are afterwards what they were."""
    import torch._inductor.config
    torch._dynamo.reset()
    alone = torch._inductor.config.patch(freezing=False, compile_threads=1)    # no pool of processes
    with alone, torch._dynamo.config.patch(recompile_limit=2):
        yield


@pytest.fixture
def only_traced(monkeypatch, fresh_compiler):
    """torch.compile that traces but does not compile: what differs between updates shows there already."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


def graphs_traced():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_a_compiled_update_is_compiled_once_a_phase_and_draws_the_same_codes(only_traced):
    c = sample_section(draft_guidance=1.5, rounds=2)
    model = torch_model(tiny_transformer(8, 2, n_spatial=1, n_depth=1))
    expected = decode(model, c)[-1]
    torch._dynamo.utils.counters.clear()
    update = fast.compiled_update(model)
    states = decode(model, c, update=update)
    assert torch.equal(states[-1].codes, expected.codes)
    torch.testing.assert_close(states[-1].log_p, expected.log_p, atol=1e-4, rtol=1e-4)
    phases = [(state.phase, state.round) for state in states]
    assert phases == [("draft", 0)] * 4 + [("revise", 1)] * 2 + [("revise", 2)] * 2
    assert graphs_traced() == 2
    known, region = expected.codes[:1].expand(3, -1, -1), torch.ones(8, dtype=torch.bool)     # not contiguous
    *_, last = drr.draft_and_revise(model, *inputs(c, 3, 8, 2), c, known, region, update)
    assert graphs_traced() == 2 and torch.equal(last.codes, expected.codes)
    assert torch._inductor.config.freezing
    decode(model, c, 2, update)                              # more shapes than torch's limit, which is 2 here
    assert graphs_traced() == 4


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="there is no C++ compiler")
def test_a_really_compiled_update_draws_the_same_codes(fresh_compiler):
    """By a C++ compiler, which takes its time: one shape of a model as small as they come."""
    c = sample_section(t_draft=2, rounds=0)
    model = torch_model(tiny_transformer(4, 1, n_spatial=1, n_depth=1))
    expected, torch._dynamo.utils.counters["stats"]["unique_graphs"] = decode(model, c)[-1], 0
    *_, last = decode(model, c, update=fast.compiled_update(model))
    assert graphs_traced() == 1 and torch._dynamo.utils.counters["inductor"]
    assert torch.equal(last.codes, expected.codes)
    torch.testing.assert_close(last.log_p, expected.log_p, atol=1e-4, rtol=1e-4)


def test_the_states_of_captured_updates_are_not_overwritten(monkeypatch):
    """By the replay of a CUDA graph, which writes to the same tensors each time; played by one that does."""
    results = {}

    def replay(*inputs):
        new = drr.update(*inputs)
        old = results.setdefault(inputs[2].shape, new)
        for tensor, x in zip(old[2:], new[2:]):
            tensor.copy_(x)
        return old

    c, model = sample_section(t_draft=5), torch_model(tiny_transformer(N, D))
    expected = decode(model, c)
    monkeypatch.setattr(torch, "compile", lambda *_, **how: replay)
    states = decode(model, c, update=fast.compiled_update(model, graphs=True))
    for ours, theirs in zip(states, expected, strict=True):
        assert ours[:2] == theirs[:2] and all(torch.equal(a, b) for a, b in zip(ours[2:], theirs[2:]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("compiled", [False, True])
def test_cuda_graphs_draw_the_same_codes(compiled):
    c, model = sample_section(draft_guidance=1.5), torch_model(tiny_transformer(N, D).cuda())
    cond, noise = inputs(c)
    expected = list(drr.draft_and_revise(model, cond.cuda(), noise, c))
    update = fast.compiled_update(model, compiled, graphs=True)
    for _ in range(3):                                       # warms up, captures, replays
        states = list(drr.draft_and_revise(model, cond.cuda(), noise, c, update=update))
        for ours, theirs in zip(states, expected, strict=True):
            assert (ours.codes == theirs.codes).float().mean() > 0.9       # near ties may fall either way


def test_sample_py_decodes_by_compiled_updates(monkeypatch, tmp_path):
    update = Mock(side_effect=drr.update)
    monkeypatch.setattr(fast, "compiled_update", lambda model: update)
    command = "sample.py --class 1 --num 2 --t-draft 2 --t-revise 1 --m 1 --device cpu --compile --out"
    monkeypatch.setattr(sys, "argv", [*command.split(), str(tmp_path / "x.png")])
    sample.main()
    assert update.call_count == 3 and (tmp_path / "x.png").exists()


# === Precision ==============================================================================================
@pytest.mark.parametrize("rates, expected", [
    ((300e9, 100e9), True), ((110e9, 100e9), False), ((170e9, 320e9), False)])
def test_bf16_on_a_cpu_has_to_be_faster_than_float32(rates, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    monkeypatch.setattr(common, "matrix_rate", lambda device, dtype, *_: rates[dtype == torch.float32])
    assert common.bf16_pays(CPU) is expected
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True}, raising=False)
    assert common.bf16_pays(CPU) is False
