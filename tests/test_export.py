"""Exported graphs: parity with PyTorch, all-or-nothing writing, every tampering noticed."""
import itertools
import json
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from conftest import REPO, TESTS, sample_section, transformer_section, vae_section
from PIL import Image
from processes import execute, refused

import drr
import export
from support import backends

CPU = torch.device("cpu")
CLASSES = ["n01", "n02", "n03"]


def make_checkpoint(folder, depth=4, seed=0):
    """Random weights, large enough that every input matters; 8x8 positions."""
    torch.manual_seed(seed)
    vae_c = vae_section(depth=depth, resolution=16, ch_mult=[1, 2], upscale=2 if depth == 1 else 1)
    transformer_c = transformer_section(d_model=64, head_dim=32)
    vae = drr.RQVAE(vae_c).eval()
    vae.quantizer.codebook.mul_(0.5)
    transformer = drr.ContextualRQTransformer(transformer_c, len(CLASSES), 64, depth, vae.quantizer.codebook)
    with torch.no_grad():
        for p in transformer.parameters():
            p.add_(torch.randn(p.shape), alpha=0.1)
    transformer_c.half = False
    config = SimpleNamespace(vae=vae_c, transformer=transformer_c, sample=sample_section(t_draft=8))
    drr.save_vae(folder / "vae.safetensors", vae, config)
    drr.save_transformer(folder / "transformer.safetensors", transformer, config, CLASSES, CLASSES, vae)
    return folder


def make_export(folder, depth):
    """(checkpoint, exported folder) of a small model."""
    checkpoint = make_checkpoint(folder / "checkpoint", depth)
    export.export(*drr.load_checkpoint(checkpoint), folder / "out", "fp32", 5)
    return checkpoint, folder / "out"


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """Of a model with stacks of 4 codes."""
    return make_export(tmp_path_factory.mktemp("export4"), 4)


@pytest.fixture(scope="session")
def exported_single(tmp_path_factory):
    """Of a model with single codes, whose decoder draws larger than its encoder sees."""
    return make_export(tmp_path_factory.mktemp("export1"), 1)


@pytest.fixture(scope="session", params=["exported", "exported_single"])
def pair(request):
    """The same model twice: in PyTorch, and as ONNX graphs."""
    checkpoint, folder = request.getfixturevalue(request.param)
    vae, transformer, info = drr.load_checkpoint(checkpoint)
    return drr.TorchModel(vae, transformer, CPU, torch.float32), backends.load("onnx", folder, CPU)[0], info


@pytest.fixture
def out(exported, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(exported[1], tmp_path / "out"))


# === Parity =================================================================================================
@pytest.mark.parametrize("rows", [1, 2, 5])                        # 5 are filled up to 8
def test_every_part_equals_pytorch(pair, rows):
    ours, onnx, _ = pair
    g = torch.Generator().manual_seed(rows)
    codes = torch.randint(64, (rows, 64, ours.depth), generator=g)
    mask, cond = torch.rand(rows, 64, generator=g) < 0.5, torch.randint(4, (rows, 1), generator=g)
    expected = ours.context(codes, mask, cond)
    assert expected.std() > 0.1
    torch.testing.assert_close(onnx.context(codes, mask, cond), expected, atol=1e-4, rtol=0)
    for selected in (1, 2, 5):
        positions = torch.rand(rows, 64, generator=g).argsort(1)[:, :selected]
        context = onnx.context(codes, mask, cond, positions)
        torch.testing.assert_close(context, drr.select(expected, positions), atol=1e-4, rtol=0)

    h, stacks = torch.randn(rows, 64, generator=g), codes[:, 0]
    expected, cache = ours.transformer.depth_logits(h, stacks), None
    for d in range(ours.depth):
        poisoned = stacks.clone()
        poisoned[:, d:] = 63 - stacks[:, d:]                       # codes not chosen yet must not matter
        logits, cache = onnx.depth_step(h, poisoned, d, cache)
        torch.testing.assert_close(logits, expected[:, d], atol=1e-4, rtol=0)

    images = ours.decode(codes)
    torch.testing.assert_close(onnx.decode(codes), images, atol=5e-4, rtol=0)
    assert (onnx.encode(images) == ours.encode(images)).float().mean() >= 0.99


def test_rows_are_filled_up_to_a_power_of_two_and_too_many_are_refused(pair, monkeypatch):
    _, onnx, _ = pair
    session = onnx.parts["depth"]
    spy = MagicMock(side_effect=session, part=session.part)
    monkeypatch.setitem(onnx.parts, "depth", spy)
    codes = torch.zeros(13, 64, onnx.depth, dtype=torch.int64)
    logits, _ = onnx.depth_step(torch.zeros(13, 64), codes[:, 0], 0, None)
    assert len(spy.call_args.args[0]) == 16 and len(logits) == 13
    with pytest.raises(drr.UserError, match="at most 10 rows.*--max-batch"):       # 2 * 5, for guidance
        onnx.context(codes, torch.ones(13, 64, dtype=torch.bool), codes[:, 0, :1])


# === The manifest and what it protects ======================================================================
def files_of(manifest):
    return {name for part in manifest["parts"].values() for name in part["sha256"]}


def files_in(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir()}


def test_manifest_says_what_the_graphs_are(exported):
    import onnx
    manifest = json.loads((exported[1] / "manifest.json").read_text())
    assert files_in(exported[1]) == {"manifest.json", *files_of(manifest)}
    assert list(manifest["parts"]) == list(backends.PARTS)
    for name, part in manifest["parts"].items():
        model = onnx.load(exported[1] / part["file"], load_external_data=False)
        assert model.opset_import[0].version == part["opset"]
        for side, values in (("inputs", model.graph.input), ("outputs", model.graph.output)):
            dims = [v.type.tensor_type.shape.dim for v in values]
            found = [(v.name, [d.dim_value or d.dim_param for d in of]) for v, of in zip(values, dims)]
            assert found == [(n, shape) for n, shape, _ in part[side]]
        assert part["max_difference"] < 1e-3
    assert {"torch", "onnx", "onnxruntime", "onnxscript"} <= manifest["versions"].keys()


@pytest.mark.parametrize("name, damage", [
    *[(f"graphs-*/{name}", lambda content: content[:-1] + bytes([content[-1] ^ 1]))
      for name in ("spatial.onnx", "decoder.onnx.data")],
    ("graphs-*/depth.onnx", None), ("graphs-*/encoder.onnx.data", None),                   # not there
    ("manifest.json", lambda content: content.replace(b'"rounds": 2', b'"rounds": 3')),
    *[("manifest.json", lambda _, text=text: text) for text in (b"", b"[]", b"{}", b'{"version": 3}')]])
def test_a_damaged_or_changed_file_is_noticed(out, name, damage):
    path, = out.glob(name)
    content = path.read_bytes()
    path.unlink()
    if damage:
        path.write_bytes(damage(content))
    with pytest.raises(drr.UserError, match=path.name):
        backends.load("onnx", out, CPU)


# === sample.py --backend ====================================================================================
@pytest.fixture
def draw(exported, tmp_path):
    def call(*arguments, source=("--exported", exported[1]), **options):
        return execute("sample.py", "--class", "n02", "--num", 3, "--out", "p.png", "--precision", "fp32",
                       *source, *arguments, cwd=tmp_path, **options)
    return call


def test_sampling_from_graphs_gives_pytorchs_picture(draw, exported, tmp_path):
    """In one update, so that a near tie that falls the other way changes no other stack. Neither backend
    imports what only the other, the export or a training needs."""
    pictures = []
    sources = {"onnx": ("--exported", exported[1]), "torch": ("--checkpoint", exported[0])}
    unneeded = ["tensorrt", "train_vae", "train_transformer", "export", "onnx"]
    for backend, source in sources.items():
        without = unneeded + ["onnxruntime"] * (backend == "torch")
        done = draw("--backend", backend, "--t-draft", 1, "--m", 0, "--draft-guidance", 1.8, source=source,
                    without=without)
        assert done.returncode == 0 and f"({backend}, cpu, fp32)" in done.stdout, done.stderr
        pictures.append(np.array(Image.open(tmp_path / "p.png")).astype(int))
    assert (abs(pictures[0] - pictures[1]) <= 1).mean() > 0.95     # rounding to 8 bits


def test_mistakes_with_exported_models_are_one_sentence(draw, exported, tmp_path):
    other = make_checkpoint(tmp_path / "other", seed=1)
    for flag, value, word in (("--checkpoint", other, "another checkpoint"), ("--precision", "bf16", "fp32")):
        done = draw("--backend", "onnx", flag, value)
        refused(done, word)
    assert not (tmp_path / "p.png").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_what_needs_a_gpu_says_so(exported, out, monkeypatch):
    with pytest.raises(drr.UserError, match="TensorRT"):
        backends.load("trt", exported[1], CPU)
    done = execute("export.py", "--checkpoint", exported[0], "--out", out, "--max-batch", 5, "--trt",
                   cwd=out.parent)
    refused(done, "TensorRT")
    assert "up to date" in done.stdout                             # the graphs, which are kept
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(cuda_stream=0))
    with pytest.raises(drr.UserError, match="CUDA"):               # never a silent fall back to the CPU
        part = backends.read_manifest(exported[1])["parts"]["decoder"]
        backends.OnnxSession(exported[1], part, SimpleNamespace(type="cuda", index=0))


def test_bench_times_graphs_and_keeps_them(exported, tmp_path):
    shutil.copytree(exported[1], tmp_path / "kept" / "fp32")       # as an earlier run has left them
    arguments = "--exported kept --t-draft 8 --repeat 1 --precision fp32 --mode eager,onnx rounds=1".split()
    done = execute("tools.bench", "--checkpoint", exported[0], "--batch", "1,5", *arguments, cwd=tmp_path)
    assert done.returncode == 0 and "is up to date" in done.stdout, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith(("| eager", "| onnx"))]
    assert [row[:3] for row in rows] == [[f"| {mode}", "fp32", n] for n in "15" for mode in ("eager", "onnx")]


# === export.py: all or nothing ==============================================================================
KILLED = """
import os, signal, sys
import drr, export

def quick(module, part, inputs, path):
    for suffix in ("", ".data"):
        path.with_name(path.name + suffix).write_bytes(b"new")

export.write_graph, export.verify = quick, lambda *a, **k: "not verified in this test"
owner, name, checkpoint = sys.argv[1:]
setattr({"export": export, "drr": drr}[owner], name, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
sys.argv = ["export.py", "--checkpoint", checkpoint, "--out", "out"]
export.main()
"""


@pytest.mark.parametrize("moment", ["export verify", "drr replacing", "export remove_unnamed"])
def test_a_killed_export_leaves_a_whole_one_and_is_cleaned_up(exported, out, tmp_path_factory, moment):
    script = tmp_path_factory.mktemp("script") / "script.py"
    script.write_text(KILLED)
    before = (out / "manifest.json").read_text()
    done = execute(str(script), *moment.split(), exported[0], cwd=out.parent)
    assert done.returncode == -signal.SIGKILL, done.stderr
    manifest = backends.read_manifest(out)
    if "remove" in moment:                                         # the new export, complete
        assert all((out / name).read_bytes() == b"new" for name in files_of(manifest))
    else:
        assert (out / "manifest.json").read_text() == before
    assert files_in(out) > files_of(manifest) | {"manifest.json"}
    kept = {name.partition("/")[0] for name in files_of(manifest)}
    left_over, = (path for path in out.glob("graphs-*") if path.name not in kept)
    (left_over / "thesis.txt").write_text("years of work")
    export.remove_unnamed(out)                                     # what an export does last
    assert files_in(out) == {"manifest.json", f"{left_over.name}/thesis.txt", *files_of(manifest)}
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_an_export_replaces_one_of_an_older_version(out):
    (out / "manifest.json").write_text('{"version": 2, "graphs": {}}')
    for path in out.glob("*/*"):
        path.rename(out / path.name)                               # the layout of version 2
    with pytest.raises(drr.UserError, match="version 2.*export it again"):
        backends.read_manifest(out)
    export.check_target(out)
    export.remove_unnamed(out)
    assert not {*out.glob("*.onnx*")}


def test_a_full_disk_is_one_sentence_and_leaves_the_earlier_export(exported, out):
    before = (out / "manifest.json").read_text()
    limited = ("import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
               "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))")      # full in mid-file
    done = execute("export.py", "--checkpoint", exported[0], "--out", out, cwd=out.parent, before=limited)
    refused(done, "could not be written")
    assert (out / "manifest.json").read_text() == before
    assert files_in(out) == {"manifest.json", *files_of(backends.read_manifest(out))}


def test_a_graph_over_its_bound_is_an_error(exported, tmp_path, monkeypatch):
    linear = export.FlatLinear.forward
    monkeypatch.setattr(export.FlatLinear, "forward", lambda self, x: linear(self, x) + 0.001)
    with pytest.raises(drr.UserError, match="what PyTorch does.*spatial"):
        export.export(*drr.load_checkpoint(exported[0]), tmp_path / "out", "fp32", 2)
    assert list(tmp_path.iterdir()) == []


def test_half_precision_graphs_stay_near_pytorch(exported, tmp_path, monkeypatch):
    modules = export.make_modules                                  # two of them: the RQ-VAE stays float32
    monkeypatch.setattr(export, "make_modules", lambda *arguments: itertools.islice(modules(*arguments), 2))
    manifest = export.export(*drr.load_checkpoint(exported[0]), tmp_path / "out", "fp16", 2)   # raises if not
    spatial, depth = (manifest["parts"][name] for name in ("spatial", "depth"))
    assert spatial["outputs"][0][2] == depth["inputs"][0][2] == "float16"
    assert 0 < spatial["max_difference"] < 0.05 and depth["max_difference"] > 0


# === TensorRT ===============================================================================================
OBJECTS = {"builder": "Builder", "parser": "OnnxParser", "config": "IBuilderConfig",
           "profile": "IOptimizationProfile", "self.runtime": "Runtime",
           "self.engine": "ICudaEngine", "context": "IExecutionContext"}


def test_every_tensorrt_name_exists_in_every_version():
    """tests/fixtures/tensorrt-names.json lists what TensorRT 10.9 to 11.4 have."""
    versions = json.loads((TESTS / "fixtures" / "tensorrt-names.json").read_text())
    source = (REPO / "export.py").read_text().partition("# === Command line")[0]
    source += (REPO / "support" / "backends.py").read_text()
    used = set(re.findall(r"\btrt\.([A-Z]\w+)\.?(\w*)", source))
    for variable, kind in OBJECTS.items():
        used |= {(kind, name) for name in re.findall(rf"(?<![\w.]){variable}\.(\w+)", source)}
    assert {("Builder", "build_serialized_network"), ("BuilderFlag", "TF32"),
            ("IExecutionContext", "execute_async_v3")} <= used
    for version, names in versions.items():
        missing = [(kind, name) for kind, name in used if name not in ["", *names.get(kind, ())]]
        assert not missing, version
        assert {kind for kind, _ in used} <= names.keys(), version


@pytest.fixture
def fake_trt(monkeypatch):
    """As much of TensorRT as building needs: it takes every call, and every engine is the same."""
    trt = MagicMock(__version__="10.9.0")
    builder = trt.Builder.return_value
    builder.build_serialized_network.return_value = b"a plan"
    config = builder.create_builder_config.return_value
    config.add_optimization_profile.return_value = 0
    monkeypatch.setattr(backends, "import_tensorrt", lambda: trt)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Toy GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    return trt


def test_engines_are_built_once_and_loaded_only_as_built(exported, tmp_path, fake_trt, monkeypatch):
    out, manifest = exported[1], backends.read_manifest(exported[1])
    build = fake_trt.Builder.return_value.build_serialized_network
    export.build_engines(out, manifest, tmp_path, 3)
    assert build.call_count == 4
    set_shape = fake_trt.Builder.return_value.create_optimization_profile.return_value.set_shape
    ranges = {name: [call.args[1:] for call in set_shape.call_args_list if call.args[0] == name]
              for name in ("cache", "positions")}                  # few rows, then many
    assert ranges == {"cache": [tuple([2, 2, n, 2, 4, 32] for n in (1, 32, 64)),
                                tuple([2, 2, n, 2, 4, 32] for n in (1, 160, 640))],
                      "positions": [([1, 1], [2, 8], [4, 64]), ([1, 1], [2, 8], [10, 64])]}
    export.build_engines(out, manifest, tmp_path, 3)
    assert build.call_count == 4                                   # the second call finds them
    export.build_engines(out, manifest, tmp_path, 5)
    assert build.call_count == 8                                   # another level is another engine
    assert backends.read_plan(fake_trt, tmp_path, manifest, "spatial") == b"a plan"
    for plan in tmp_path.glob("spatial-*.plan"):
        plan.write_bytes(b"b plan")                                # as a full disk or a bad copy leaves it
    with pytest.raises(drr.UserError, match="no engine of the spatial part"):
        backends.read_plan(fake_trt, tmp_path, manifest, "spatial")
    export.build_engines(out, manifest, tmp_path, 5)
    assert build.call_count == 9
    assert backends.read_plan(fake_trt, tmp_path, manifest, "spatial") == b"a plan"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Other GPU")
    with pytest.raises(drr.UserError, match="Other GPU"):
        backends.read_plan(fake_trt, tmp_path, manifest, "depth")


def test_the_shapes_of_a_profile_share_their_scratch_memory(exported, fake_trt, monkeypatch):
    for name in ("Stream", "stream", "current_stream", "CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    manifest = backends.read_manifest(exported[1])
    part = manifest["parts"]["depth"]
    built = fake_trt.Runtime.return_value.deserialize_cuda_engine.return_value
    built.num_io_tensors = 0
    built.get_device_memory_size_for_profile_v2.side_effect = [100, 900]
    engine = backends.TensorRTEngine(fake_trt, b"a plan", "depth", part, CPU)
    for rows in (1, 2, 100, 2, 200):                               # up to 64 are few
        engine(*export.example_inputs(part, rows, manifest["model"], 64))
    set_memory = built.create_execution_context.return_value.set_device_memory
    places = [call.args for call in set_memory.call_args_list]     # one for each context
    assert [size for _, size in places] == [100, 100, 900, 900] and len(set(places)) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("backend", ["onnx", "trt"])
@pytest.mark.parametrize("of", ["exported", "exported_single"])
def test_a_whole_decode_on_a_gpu_draws_pytorchs_codes(of, backend, request, tmp_path, monkeypatch):
    (checkpoint, folder), device = request.getfixturevalue(of), torch.device("cuda")
    if backend == "trt":
        pytest.importorskip("tensorrt")
        monkeypatch.setattr(backends, "engine_folder", lambda directory: tmp_path)
        export.build_engines(folder, backends.read_manifest(folder), tmp_path, 1)
    model, info = backends.load(backend, folder, device)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)             # which the engines do without
    vae, transformer, _ = drr.load_checkpoint(checkpoint)
    ours = drr.TorchModel(vae, transformer, device, torch.float32)
    cond = torch.tensor([[0], [1], [2]], device=device)
    codes, others = (drr.sample(m, cond, 3, range(3), info.sample) for m in (ours, model))
    assert (codes == others).float().mean() >= 0.99
    torch.testing.assert_close(model.decode(codes), ours.decode(codes), atol=5e-3, rtol=0)
