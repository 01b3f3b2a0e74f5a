"""Exported graphs: parity with PyTorch, all-or-nothing writing, every tampering noticed."""
import ast
import json
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from conftest import REPO, TESTS, sample_section, transformer_section, vae_section

from support import backends
import drr
import export
import sample
from processes import execute

CPU = torch.device("cpu")
CLASSES = ["n01", "n02", "n03"]


def make_checkpoint(folder, depth=4, seed=0):
    """Random weights, large enough that every input matters; 8x8 positions."""
    torch.manual_seed(seed)
    vae_c, transformer_c = vae_section(depth=depth), transformer_section(d_model=64, head_dim=32)
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
    """Of a model with single codes."""
    return make_export(tmp_path_factory.mktemp("export1"), 1)


@pytest.fixture(params=["exported", "exported_single"])
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
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_context_equals_pytorch(pair, rows):
    ours, onnx, _ = pair
    g = torch.Generator().manual_seed(rows)
    codes = torch.randint(64, (rows, 64, ours.depth), generator=g)
    mask, cond = torch.rand(rows, 64, generator=g) < 0.5, torch.randint(4, (rows, 1), generator=g)
    expected = ours.context(codes, mask, cond)
    torch.testing.assert_close(onnx.context(codes, mask, cond), expected, atol=1e-4, rtol=0)
    assert expected.std() > 0.1
    for selected in (1, 2, 5):                                     # 5 are filled up to 8
        positions = torch.rand(rows, 64, generator=g).argsort(1)[:, :selected]
        context = onnx.context(codes, mask, cond, positions)
        torch.testing.assert_close(context, drr.select(expected, positions), atol=1e-4, rtol=0)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_depth_step_equals_pytorch_at_every_depth(pair, rows):
    ours, onnx, _ = pair
    g = torch.Generator().manual_seed(rows)
    h, stacks = torch.randn(rows, 64, generator=g), torch.randint(64, (rows, ours.depth), generator=g)
    expected, cache = ours.transformer.depth_logits(h, stacks), None
    for d in range(ours.depth):
        poisoned = stacks.clone()
        poisoned[:, d:] = 63 - stacks[:, d:]                       # codes not chosen yet must not matter
        logits, cache = onnx.depth_step(h, poisoned, d, cache)
        torch.testing.assert_close(logits, expected[:, d], atol=1e-4, rtol=0)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_decoder_and_encoder_equal_pytorch(pair, rows):
    ours, onnx, _ = pair
    codes = torch.randint(64, (rows, 64, ours.depth), generator=torch.Generator().manual_seed(rows))
    images = ours.decode(codes)
    torch.testing.assert_close(onnx.decode(codes), images, atol=5e-4, rtol=0)
    assert (onnx.encode(images) == ours.encode(images)).float().mean() >= 0.99


@pytest.mark.parametrize("guidance", [1.0, 1.8])
@pytest.mark.parametrize("inpaint", [False, True])
def test_a_whole_decode_draws_the_same_codes(pair, guidance, inpaint):
    ours, onnx, info = pair
    c = sample_section(t_draft=8, revise_guidance=guidance)
    cond, noise = torch.tensor([[0], [1], [2]]), drr.draw_noise(3, range(3), 3, 64, ours.depth)
    codes = region = None
    if inpaint:
        codes = torch.randint(64, (3, 64, ours.depth), generator=torch.Generator().manual_seed(0))
        region = torch.arange(64) % 7 < 3
    results = []
    for model in (ours, onnx):
        *_, last = drr.draft_and_revise(model, cond, noise, c, codes, region)
        results.append(last.codes)
    assert (results[0] == results[1]).float().mean() >= 0.999
    if inpaint:
        assert torch.equal(results[1][:, ~region], codes[:, ~region])
    images = [ours.decode(results[0]), onnx.decode(results[0])]
    torch.testing.assert_close(*images, atol=5e-4, rtol=0)


def test_padding_rows_change_nothing(pair):
    _, onnx, _ = pair
    g = torch.Generator().manual_seed(0)
    h, stacks = torch.randn(13, 64, generator=g), torch.randint(64, (13, onnx.depth), generator=g)
    sizes = []
    session = onnx.parts["depth"]

    class Spy:
        part = session.part

        def __call__(self, *inputs):
            sizes.append(len(inputs[0]))
            return session(*inputs)

    onnx.parts["depth"] = Spy()
    logits, cache = onnx.depth_step(h, stacks, 0, None)            # 13 rows arrive as 16, and come back as 13
    assert sizes == [16] and logits.shape[0] == 13
    alone = session(h, stacks, torch.tensor([0]), torch.zeros_like(cache)[:, :, :13])[0]
    torch.testing.assert_close(logits, alone, atol=1e-5, rtol=0)


def test_more_rows_than_exported_is_one_sentence(pair):
    _, onnx, _ = pair
    codes = torch.zeros(11, 64, onnx.depth, dtype=torch.int64)     # 2 * 5 is the most, for guidance
    with pytest.raises(drr.UserError, match="at most 10 rows.*got 11.*--max-batch"):
        onnx.context(codes, torch.ones(11, 64, dtype=torch.bool), torch.zeros(11, 1, dtype=torch.int64))


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


@pytest.mark.parametrize("name", ["spatial.onnx", "decoder.onnx.data"])
@pytest.mark.parametrize("damage", ["flip", "remove"])
def test_a_damaged_file_is_noticed(out, name, damage):
    file, = out.glob(f"*/{name}")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.unlink() if damage == "remove" else file.write_bytes(content)
    with pytest.raises(drr.UserError, match=name):
        backends.load("onnx", out, CPU)


def test_a_changed_manifest_is_noticed(out):
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["sample"]["rounds"] += 1
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(drr.UserError, match="changed after the export"):
        backends.load("onnx", out, CPU)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 99}', '{"version": 3}'])
def test_a_damaged_manifest_is_one_sentence(out, text):
    (out / "manifest.json").write_text(text)
    with pytest.raises(drr.UserError, match="manifest.json"):
        backends.load("onnx", out, CPU)


# === sample.py --backend ====================================================================================
@pytest.fixture
def draw(exported, tmp_path):
    def call(*arguments, source=("--exported", exported[1])):
        return execute("sample.py", "--class", "n02", "--num", 3, "--out", "p.png", "--precision", "fp32",
                       *source, *arguments, cwd=tmp_path)
    return call


def test_sampling_from_graphs_gives_pytorchs_picture(draw, exported, tmp_path):
    done = draw("--backend", "onnx")
    assert done.returncode == 0 and "(onnx, cpu, fp32)" in done.stdout, done.stderr
    ours = sample.np.array(sample.Image.open(tmp_path / "p.png")).astype(int)
    done = draw("--backend", "torch", source=("--checkpoint", exported[0]))
    assert done.returncode == 0, done.stderr
    theirs = sample.np.array(sample.Image.open(tmp_path / "p.png")).astype(int)
    assert abs(ours - theirs).max() <= 1                           # rounding to 8 bits


def test_sampling_from_graphs_imports_only_what_it_uses(exported, tmp_path):
    arguments = "sample.py --class 0 --num 1 --backend onnx --exported".split() + [str(exported[1])]
    program = (f"import sys, runpy, drr\nsys.argv = {arguments}\n"
               "early = 'onnxruntime' in sys.modules\n"               # by drr.py alone
               f"runpy.run_path({str(REPO / 'sample.py')!r}, run_name='__main__')\n"
               "unwanted = ('tensorrt', 'train_vae', 'train_transformer', 'export', 'onnx')\n"
               "print(early, [m for m in unwanted if m in sys.modules])")
    done = execute("-c", program, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "False []", done.stderr


def refused(done, *words):
    assert done.returncode == 2 and done.stderr.count("error:") == 1, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert all(word in done.stderr for word in words), done.stderr


def test_mistakes_with_exported_models_are_one_sentence(draw, tmp_path):
    refused(draw("--backend", "onnx", source=("--exported", tmp_path / "nothing")), "export.py")
    other = make_checkpoint(tmp_path / "other", 4, seed=3)
    refused(draw("--backend", "onnx", "--checkpoint", other), "another checkpoint")
    refused(draw("--backend", "onnx", "--precision", "bf16"), "fp32")
    assert not (tmp_path / "p.png").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_what_needs_a_gpu_says_so(draw, exported, monkeypatch):
    refused(draw("--backend", "onnx", "--device", "cuda"), "cuda")
    refused(draw("--backend", "trt"), "TensorRT")
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

def die_at_call(owner, name, number):
    original, calls = getattr(owner, name), []
    def function(*arguments, **named):
        calls.append(name)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **named)
    setattr(owner, name, function)

export.write_graph, export.verify = quick, lambda *a, **k: "not verified in this test"
owner, name, number, checkpoint = sys.argv[1:]
die_at_call({"export": export, "drr": drr}[owner], name, int(number))
sys.argv = ["export.py", "--checkpoint", checkpoint, "--out", "out"]
export.main()
"""


@pytest.mark.parametrize("moment, replaced", [("export write_graph 2", False), ("export verify 4", False),
                                              ("drr replacing 1", False), ("export remove_unnamed 1", True)])
def test_a_killed_export_leaves_a_whole_one_and_is_cleaned_up(exported, out, tmp_path, moment, replaced):
    before = (out / "manifest.json").read_text()
    done = execute("-c", KILLED, *moment.split(), exported[0], cwd=tmp_path)
    assert done.returncode == -signal.SIGKILL, done.stderr
    manifest = backends.read_manifest(out)
    if replaced:                                                   # the new export, complete
        assert all((out / name).read_bytes() == b"new" for name in files_of(manifest))
    else:
        assert (out / "manifest.json").read_text() == before
    assert files_in(out) > files_of(manifest) | {"manifest.json"}
    kept = {name.partition("/")[0] for name in files_of(manifest)}
    left_over, = (path for path in out.glob("graphs-*") if path.name not in kept)
    (left_over / "thesis.txt").write_text("years of work")
    export.remove_unnamed(out)                                     # what an export does last
    assert files_in(out) == {"manifest.json", f"{left_over.name}/thesis.txt", *files_of(manifest)}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_export_replaces_one_of_an_older_version(out, tmp_path, monkeypatch):
    (out / "manifest.json").write_text('{"version": 2, "graphs": {}}')
    for path in out.glob("*/*"):
        path.rename(out / path.name)                               # the layout of version 2
    with pytest.raises(drr.UserError, match="version 2.*export it again"):
        backends.read_manifest(out)
    export.check_target(out)
    export.remove_unnamed(out)
    assert not {*out.glob("*.onnx*")}


LIMITED = """
import resource, signal, sys
import export
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))      # the disk is full in the middle of a file
sys.argv = ["export.py", "--checkpoint", sys.argv[1], "--out", "out"]
export.run(export.main)
"""


def test_a_full_disk_is_one_sentence_and_leaves_the_earlier_export(exported, out, tmp_path):
    before = (out / "manifest.json").read_text()
    refused(execute("-c", LIMITED, exported[0], cwd=tmp_path), "could not be written", "untouched")
    assert (out / "manifest.json").read_text() == before
    assert files_in(out) == {"manifest.json", *files_of(backends.read_manifest(out))}


def test_a_first_export_that_fails_leaves_nothing(exported, tmp_path, monkeypatch):
    def full(*a):
        raise OSError(28, "No space left on device")

    model = drr.load_checkpoint(exported[0])
    monkeypatch.setattr(export, "write_graph", full)
    with pytest.raises(drr.UserError, match="No space left"):
        export.export(*model, tmp_path / "out", "fp32", 2)
    assert list(tmp_path.iterdir()) == []


def only(monkeypatch, *names):
    """Exports these graphs alone, where the others would add nothing but time."""
    modules, describe = export.make_modules, export.describe

    def described(*arguments):
        manifest = describe(*arguments)
        return {**manifest, "parts": {name: manifest["parts"][name] for name in names}}

    monkeypatch.setattr(export, "make_modules", lambda *a: [(n, m) for n, m in modules(*a) if n in names])
    monkeypatch.setattr(export, "describe", described)


def test_a_graph_over_its_bound_is_an_error(exported, tmp_path, monkeypatch):
    step = export.DepthStep.forward

    def wrong(self, h, stacks, position, cache):
        logits, new = step(self, h, stacks, position, cache)
        return logits + 0.01, new

    monkeypatch.setattr(export.DepthStep, "forward", wrong)
    only(monkeypatch, "depth")
    with pytest.raises(drr.UserError, match="depth"):
        export.export(*drr.load_checkpoint(exported[0]), tmp_path / "out", "fp32", 2)
    assert list(tmp_path.iterdir()) == []


def test_export_never_replaces_another_folder(exported, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    refused(execute("export.py", "--checkpoint", exported[0], "--out", "mine", cwd=tmp_path), "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_export_trt_without_a_gpu_keeps_the_graphs_and_says_what_is_missing(exported, out, tmp_path):
    done = execute("export.py", "--checkpoint", exported[0], "--out", "out", "--max-batch", 5, "--trt",
                   cwd=tmp_path)
    refused(done, "TensorRT")
    assert "up to date" in done.stdout and backends.read_manifest(out)["max_batch"] == 5


def test_half_precision_graphs_stay_near_pytorch(exported, tmp_path, monkeypatch):
    only(monkeypatch, "spatial", "depth")
    manifest = export.export(*drr.load_checkpoint(exported[0]), tmp_path / "out", "fp16", 2)   # raises if not
    assert manifest["parts"]["depth"]["inputs"][0][2] == "float16"
    spatial = manifest["parts"]["spatial"]
    assert 0 < spatial["max_difference"] < 0.05
    inputs = export.example_inputs(spatial, 2, manifest["model"], 64)
    context, = backends.OnnxSession(tmp_path / "out", spatial, CPU)(*inputs)
    assert context.dtype == torch.float16 and context.isfinite().all()


# === TensorRT ===============================================================================================
def tensorrt_names(source):
    """Every chain of attributes after `trt.` in a source text."""
    tree = ast.parse(source)
    chains = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return {c.split("trt.", 1)[1] for c in chains if c.startswith(("trt.", "self.trt."))}


OBJECTS = {"builder": "Builder", "parser": "OnnxParser", "config": "IBuilderConfig",
           "profile": "IOptimizationProfile", "self.runtime": "Runtime",
           "self.engine": "ICudaEngine", "context": "IExecutionContext"}


def test_every_tensorrt_name_exists_in_every_version():
    """tests/fixtures/tensorrt-names.json lists what TensorRT 10.9 to 11.4 have."""
    versions = json.loads((TESTS / "fixtures" / "tensorrt-names.json").read_text())
    used = set()
    for file, functions in (("export.py", {"build_engine"}),
                            ("support/backends.py", {"TensorRTEngine", "engine_key", "read_plan"})):
        for node in ast.parse((REPO / file).read_text()).body:
            if getattr(node, "name", None) in functions:
                source = ast.unparse(node)
                used |= {tuple(name.split(".")) for name in tensorrt_names(source)}
                chains = {ast.unparse(n) for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Attribute)}
                for chain in chains:
                    for variable, kind in OBJECTS.items():
                        if chain.startswith(variable + "."):
                            used.add((kind, re.match(r"\w+", chain[len(variable) + 1:])[0]))
    used -= {("__version__",)}
    assert {("Builder", "build_serialized_network"), ("OnnxParser", "parse_from_file"),
            ("BuilderFlag", "TF32"), ("IExecutionContext", "execute_async_v3"),
            ("Runtime", "deserialize_cuda_engine"),
            ("ICudaEngine", "get_device_memory_size_for_profile_v2")} <= used
    for version, names in versions.items():
        for kind, *members in used:
            assert kind in names, (version, kind)
            assert not members or members[0] in names[kind], (version, kind, members)


@pytest.fixture
def fake_trt(monkeypatch):
    """As much of TensorRT as building needs: it takes every call, and every engine is the same."""
    trt = MagicMock(__version__="10.9.0")
    trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED = 1
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
              for name in ("h", "position", "cache", "positions")}                # few rows, then many
    assert ranges == {"h": [([1, 64], [32, 64], [64, 64]), ([1, 64], [160, 64], [640, 64])],
                      "position": 2 * [([1], [1], [1])],
                      "cache": [tuple([2, 2, n, 2, 4, 32] for n in (1, 32, 64)),
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


def has_tensorrt():
    try:
        backends.import_tensorrt()
        return True
    except drr.UserError:
        return False


def share_of_equal_codes(exported, model, info):
    """Of a decode by `model`, and by PyTorch in float32, on the GPU."""
    device = torch.device("cuda")
    vae, transformer, _ = drr.load_checkpoint(exported[0])
    ours = drr.TorchModel(vae, transformer, device, torch.float32)
    cond = torch.tensor([[0], [1], [2]], device=device)
    ours, theirs = (drr.sample(m, cond, 3, range(3), info.sample) for m in (ours, model))
    return (ours == theirs).float().mean()


@pytest.mark.skipif(not has_tensorrt(), reason="needs an NVIDIA GPU and TensorRT")
@pytest.mark.parametrize("of", ["exported", "exported_single"])
def test_a_whole_decode_through_tensorrt(of, request, tmp_path, monkeypatch):
    exported, device = request.getfixturevalue(of), torch.device("cuda")
    export.build_engines(exported[1], backends.read_manifest(exported[1]), tmp_path, 1)
    model, info = backends.load("trt", exported[1], device, tmp_path)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)             # which the engines do without
    assert share_of_equal_codes(exported, model, info) >= 0.99
    codes = torch.randint(64, (3, 64, model.depth), device=device)
    images = drr.load_checkpoint(exported[0])[0].to(device).decode(codes)
    torch.testing.assert_close(model.decode(codes), images, atol=5e-3, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("of", ["exported", "exported_single"])
def test_a_whole_decode_through_onnx_runtime_on_cuda(of, request):
    exported = request.getfixturevalue(of)
    model, info = backends.load("onnx", exported[1], torch.device("cuda"))
    assert share_of_equal_codes(exported, model, info) >= 0.99
