"""Splits the model into four ONNX graphs, checks them against PyTorch, and compiles them with TensorRT.

    python export.py                            # exported/: four ONNX files and manifest.json
    python sample.py --class 980 --backend onnx
    python export.py --trt                      # also TensorRT engines, on a machine with an NVIDIA GPU
    python sample.py --class 980 --backend trt

    spatial   codes (B, N, D), mask (B, N), cond (B, L), positions (B, n)   -> context (B, n, d_model)
    depth     h (P, d_model), stacks (P, D), position (1,), cache           -> logits (P, K), new in the cache
    decoder   codes (B, N, D)                                               -> images (B, 3, S, S)
    encoder   images (B, 3, S, S)                                           -> codes (B, N, D)

Dynamic are B pictures or P stacks, the rows of a graph, and n positions per picture; `depth` is called D
times. The loop and every random number stay in Python (drr.py): a seed's picture is the same on all backends.
Another kind of transformer than the paper's (support/models.py) may bring a `spatial` or `depth` of its own.
"""
import contextlib
import copy
import hashlib
import io
import json
import logging
import signal
import sys
import uuid
import warnings
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import drr
from drr import UserError
from support import backends, models
from support.common import BUNDLED, HERE, PRECISIONS, run

# The largest difference to PyTorch in float32 that a graph may show: absolute for outputs of ordinary size,
# times a tenth of the standard deviation for large ones (a context may reach hundreds, where float32 is no
# finer than 2e-5), in standard deviations in lower precision. Of codes, the share that differs (near ties).
BOUNDS = {"decoder": 5e-4, "encoder": 0.01, "fp32": 1e-4, "fp16": 0.05, "bf16": 0.3}


# === The graphs: PyTorch modules whose forward is what is exported ==========================================
class Part(nn.Module):
    """A module whose forward is another one's method."""

    def __init__(self, method):
        super().__init__()
        self.network = method.__self__
        self.forward = method


class DepthStep(nn.Module):
    """`ContextualRQTransformer.depth_step` with `position` as a tensor, (1,), and a cache of fixed size, so
    that one graph serves all D steps. Its new keys and values are returned, not written."""

    def __init__(self, transformer):
        super().__init__()
        self.network = transformer
        self.register_buffer("depths", torch.arange(transformer.depth), persistent=False)

    def forward(self, h, stacks, position, cache):
        t = self.network
        v = h                                                             # (P, d_model)
        if t.depth > 1:
            chosen = (self.depths < position)[:, None].to(h.dtype)        # (D, 1): 1 for the codes so far
            e = (F.embedding(stacks, t.codebook) * chosen).sum(1)         # (P, n_z)
            v = torch.where(position == 0, h, t.w_depth(e))
        v, new = models.one_token(t.depthwise, v + t.depth_pos[position], cache, self.depths < position)
        return t.classifier(t.ln(v)).float(), new


class FlatLinear(nn.Linear):
    """A linear layer as a product of two matrices, to which ONNX Runtime adds the bias in the same pass."""

    def forward(self, x):
        return super().forward(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


def make_modules(vae, transformer, dtype):
    """Yields each graph's name and module. The transformer is a copy in `dtype`, the spatial blocks' linear
    layers FlatLinear; in float32 the copy shares the weights."""
    shared = () if dtype != torch.float32 else (*transformer.parameters(), *transformer.buffers())
    transformer = copy.deepcopy(transformer, {id(tensor): tensor for tensor in shared}).to(dtype)
    for module in transformer.spatial.modules():
        if isinstance(module, nn.Linear):
            module.__class__ = FlatLinear
    graph = models.kind_of(transformer).graph
    yield "spatial", (graph(transformer, "")[0] if graph else Part(transformer.context)).eval()
    yield "depth", (models.kind_of(transformer).head or DepthStep)(transformer).eval()
    yield "decoder", Part(vae.decode).eval()
    yield "encoder", Part(vae.encode).eval()


def describe(vae, transformer, info, precision, max_batch):
    """The manifest without files and hashes: what the parts are, with inputs and outputs as [name, shape,
    type]. A dimension that is a name is dynamic, from 1 to its entry in `max_sizes`."""
    t = transformer
    K, N, D, d, S = len(t.codebook), t.positions, t.depth, t.pos.shape[1], vae.size
    cache = [max(1, len(t.depthwise)), 2, "rows", t.heads, D, t.head_dim]
    kind = str(PRECISIONS[precision]).removeprefix("torch.")
    codes = ["codes", ["rows", N, D], "int64"]
    images = ["images", ["rows", 3, S, S], "float32"]
    graph = models.kind_of(t).graph
    if graph:                                                     # a stack at a time, without guidance
        _, inputs, outputs = graph(t, kind)
        spatial, stacks = {"max_sizes": {"rows": max_batch}, "inputs": inputs, "outputs": outputs}, max_batch
    else:
        guided = 2 * max_batch                                    # guidance doubles the transformer's batch
        inputs = [codes, ["mask", ["rows", N], "bool"], ["cond", ["rows", t.cond_length], "int64"],
                  ["positions", ["rows", "selected"], "int64"]]
        spatial = {"max_sizes": {"rows": guided, "selected": N}, "inputs": inputs,
                   "outputs": [["context", ["rows", "selected", d], kind]]}
        stacks = guided * N
    parts = {
        "spatial": {"opset": 20, **spatial},
        "depth": {"opset": 20, "max_sizes": {"rows": stacks},
                  "inputs": [["h", ["rows", d], kind], ["stacks", ["rows", D], "int64"],
                             ["position", [1], "int64"], ["cache", cache, kind]],
                  "outputs": [["logits", ["rows", K], "float32"], ["new", cache[:4] + cache[5:], kind]]},
        # From opset 21 on, GroupNorm is one node; below 22, convolutions know no bf16.
        "decoder": {"opset": 22, "max_sizes": {"rows": max_batch}, "inputs": [codes], "outputs": [images]},
        "encoder": {"opset": 22, "max_sizes": {"rows": max_batch}, "inputs": [images], "outputs": [codes]}}
    model = {"size": S, "side": vae.side, "positions": N, "depth": D, "null": t.null, "heads": t.heads,
             "cond_length": t.cond_length, "n_depth": cache[0], "head_dim": t.head_dim,
             "conditions": t.cond_embed.num_embeddings}
    code = (HERE / "drr.py", HERE / "export.py", models.__file__, sys.modules[type(t).__module__].__file__)
    source = hashlib.sha256(b"".join(Path(file).read_bytes() for file in code)).hexdigest()
    return {"version": backends.MANIFEST_VERSION, "source": source, "precision": precision,
            "max_batch": max_batch, "model": model, "parts": parts,
            "classes": info.classes, "titles": info.titles,
            "checkpoint": {"vae": drr.fingerprint(vae), "transformer": drr.fingerprint(transformer)},
            "vae": vars(info.vae), "transformer": vars(info.transformer), "sample": vars(info.sample)}


# === Writing: module -> an ONNX file, and its weights beside it =============================================
def example_inputs(part, size, model, codebook_size):
    """Random inputs of a part with `size` rows, or as many as it takes."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"rows": size, "selected": size + 2}                  # unlike: none can pass for the other
    sizes = {name: min(sizes[name], largest) for name, largest in part["max_sizes"].items()}
    highest = {"cond": model["conditions"], "position": 1, "positions": model["positions"]}
    inputs = []
    for name, shape, dtype in part["inputs"]:
        shape = [sizes.get(n, n) for n in shape]
        if dtype == "int64":
            inputs.append(torch.randint(highest.get(name, codebook_size), shape, generator=generator))
        elif dtype == "bool":
            inputs.append(torch.rand(shape, generator=generator) < 0.5)
        else:
            inputs.append(torch.randn(shape, generator=generator).to(getattr(torch, dtype)))
    return inputs


def write_graph(module, part, inputs, path):
    """torch.onnx.export to `path` with dynamic dimensions; the weights go to `path`.data."""
    dims = {name: torch.export.Dim(name, min=1, max=largest) for name, largest in part["max_sizes"].items()
            if largest > 1}                                       # --max-batch 1: not dynamic
    dynamic = tuple({i: dims[n] for i, n in enumerate(shape) if n in dims} for _, shape, _ in part["inputs"])
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, tuple(inputs), path, dynamo=True, opset_version=part["opset"],
                          input_names=[name for name, _, _ in part["inputs"]],
                          output_names=[name for name, _, _ in part["outputs"]],
                          dynamic_shapes=dynamic, external_data=True, verbose=False)


# === Checking: the same inputs through ONNX Runtime and through PyTorch in float32 ==========================
@torch.inference_mode()
def compare(name, run_graph, part, vae, transformer, model, size):
    """The largest difference between a graph and PyTorch in float32, and PyTorch's standard deviation."""
    K = len(transformer.codebook)
    inputs = example_inputs(part, size, model, K)
    if name == "encoder":                                         # of pictures, to which random codes decode
        shape = len(inputs[0]), model["positions"], model["depth"]
        codes = torch.randint(K, shape, generator=torch.Generator().manual_seed(1))
        images = vae.decode(codes).clamp(-1, 1)
        return (run_graph(images)[0] != vae.encode(images)).float().mean().item(), 1.0
    if name == "spatial" and part["inputs"][0][0] == "codes":
        ours, theirs = run_graph(*inputs)[0], transformer.context(*inputs)
    elif name == "spatial":                                       # all tokens, through the cache
        stacks, cond, _, cache = inputs
        numbers = torch.arange(model["positions"])[:, None]
        codes = (stacks[:, None] + numbers) % K                   # (B, N, D)
        cache, contexts = torch.zeros_like(cache), []
        for t in range(cache.shape[-2]):
            stack = codes[:, max(0, t - cond.shape[1])]
            context, cache[..., t, :] = run_graph(stack, cond, torch.tensor([t]), cache)
            contexts.append(context)
        ours = torch.stack(contexts[cond.shape[1] - 1:], 1)
        theirs = transformer.context(codes, None, cond)
    elif name == "decoder":
        ours, theirs = run_graph(*inputs)[0], vae.decode(*inputs)
    else:                                                         # all depths of a stack, through the cache
        h, stacks, _, cache = inputs
        cache, logits = torch.zeros_like(cache), []
        for d in range(model["depth"]):
            step, cache[..., d, :] = run_graph(h, stacks, torch.tensor([d]), cache)
            logits.append(step)
        ours, theirs = torch.stack(logits, 1), transformer.depth_logits(h.float(), stacks)
    if not ours.isfinite().all():
        return float("inf"), 1.0
    return (ours.float() - theirs).abs().max().item(), theirs.std().item()


def verify(name, directory, manifest, vae, transformer):
    """onnx.checker in full, then `compare` at several sizes. Records the largest difference in the manifest
    and returns a line about it; raises UserError when it is over the bound."""
    import onnx
    part, precision = manifest["parts"][name], manifest["precision"]
    try:
        onnx.checker.check_model(directory / part["file"], full_check=True)
    except Exception as error:                                    # onnx's exceptions share no base class
        raise UserError(f"The {name} graph is not valid ONNX; an earlier export stays. {error}") from None
    lowered = precision != "fp32" and name in ("spatial", "depth")
    needs_gpu = lowered and precision == "bf16"                   # ONNX Runtime has bf16 on a GPU only
    if needs_gpu and not torch.cuda.is_available():
        part["max_difference"] = None
        return f"{name}: valid; not compared with PyTorch, as ONNX Runtime has no bf16 without a GPU"
    device = torch.device("cuda" if needs_gpu else "cpu")
    session = backends.OnnxSession(directory, part, device)

    def run_graph(*inputs):
        return [x.cpu() for x in session(*(x.to(device) for x in inputs))]

    rows = sorted({min(n, part["max_sizes"]["rows"]) for n in (1, 2, 5)})
    results = [compare(name, run_graph, part, vae, transformer, manifest["model"], n) for n in rows]
    difference, deviation = (max(values) for values in zip(*results))
    bound = BOUNDS.get(name, BOUNDS[precision]) * (deviation if lowered else max(1.0, deviation / 10))
    part["max_difference"] = difference
    what = "of all codes differ" if name == "encoder" else "largest difference to PyTorch"
    line = f"{name}: {difference:.1e} {what} (at {rows} rows; bound {bound:.1e})"
    if not difference <= bound:
        raise UserError(f"A graph does not do what PyTorch does; an earlier export stays. {line}")
    return line


# === All or nothing: DIR/graphs-TOKEN/, then DIR/manifest.json that names it ================================
FILES = [f"{name}.onnx{suffix}" for name in backends.PARTS for suffix in ("", ".data")]


def check_target(directory):
    """Nothing but an earlier export is ever replaced."""
    ours = ("manifest.json", "graphs-*", *FILES)                  # FILES: by older versions
    if directory.exists() and not all(any(map(path.match, ours)) for path in directory.iterdir()):
        raise UserError(f"{directory} holds other things than an export; give --out another folder.")


def remove_unnamed(directory):
    """Removes ONNX files that the manifest does not name: an earlier export's, or a failed one's. (Of two
    exports into one folder at once, the first to end removes the other's.)"""
    named = set()
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):     # none, damaged, or old
        manifest = json.loads((directory / "manifest.json").read_text())
        named = {directory / name for part in manifest["parts"].values() for name in part["sha256"]}
    for folder in (*directory.glob("graphs-*"), directory):
        with contextlib.suppress(OSError):                        # a folder that is not empty stays
            for path in {folder / name for name in FILES} - named:
                path.unlink(missing_ok=True)
            folder.rmdir()


def export(vae, transformer, info, directory, precision, max_batch):
    """Writes and verifies the graphs in a new folder, DIR/graphs-TOKEN/, then replaces the manifest by one
    that names them: until then the earlier export is whole. Returns the manifest. Raises UserError when a
    graph differs from PyTorch, or cannot be written."""
    check_target(directory)
    manifest = describe(vae, transformer, info, precision, max_batch)
    try:
        import onnx
        import onnxruntime
        import onnxscript
    except ImportError as error:
        raise UserError(f"Exporting needs onnx, onnxscript and onnxruntime ({error}); "
                        "pip install -r requirements-export.txt.") from None
    manifest["versions"] = {m.__name__: m.__version__ for m in (torch, onnx, onnxscript, onnxruntime)}
    for name in ("onnxscript", "torch.onnx"):                     # which warn of packages that we do not use
        logging.getLogger(name).setLevel(logging.ERROR)
    folder = f"graphs-{uuid.uuid4().hex[:8]}"
    try:
        (directory / folder).mkdir(parents=True)
        modules = make_modules(vae, transformer, PRECISIONS[precision])
        for name, module in tqdm(modules, "exporting", total=len(backends.PARTS), unit="graph"):
            part = manifest["parts"][name]
            part["file"] = f"{folder}/{name}.onnx"                # by its path below DIR
            inputs = example_inputs(part, 3, manifest["model"], len(transformer.codebook))
            write_graph(module, part, inputs, directory / part["file"])
            tqdm.write(verify(name, directory, manifest, vae, transformer))
            files = [part["file"], f"{part['file']}.data"]
            part["sha256"] = {file: backends.sha256(directory / file) for file in files}
        manifest["digest"] = backends.digest(manifest)
        with drr.replacing(directory / "manifest.json") as temporary:
            temporary.write_text(json.dumps(manifest, indent=1))
    except OSError as error:
        raise UserError(f"{directory} could not be written ({error.strerror or error}); free some space or "
                        "choose another place; an earlier export is untouched.") from None
    finally:
        remove_unnamed(directory)
    return manifest


def current_export(vae, transformer, info, directory, precision, max_batch):
    """As `export`, unless the folder holds this very export, undamaged, by this code and this torch."""
    wanted = json.loads(json.dumps(describe(vae, transformer, info, precision, max_batch)))
    with contextlib.suppress(UserError):
        manifest = backends.read_manifest(directory)
        same = all(manifest.get(key) == value for key, value in wanted.items() if key != "parts")
        if same and manifest["versions"]["torch"] == torch.__version__:
            print(f"{directory}/ is up to date")
            return manifest
    return export(vae, transformer, info, directory, precision, max_batch)


# === TensorRT: ONNX file -> engine ==========================================================================
def build_engines(directory, manifest, folder, level):
    """Builds the engines that `folder` lacks, one per part, each for its `backends.engine_key`."""
    trt = backends.import_tensorrt()
    for name in tqdm(backends.PARTS, desc="building engines", unit="engine"):
        part = manifest["parts"][name]
        key = backends.engine_key(trt, manifest, name, level)
        if backends.find_plan(folder, name, key) is not None:
            tqdm.write(f"{name}: its engine in {folder} is up to date")
            continue
        plan = build_engine(trt, directory / part["file"], name, part, level)
        path = folder / backends.plan_name(name, key, plan)
        with drr.replacing(path) as temporary:
            temporary.write_bytes(plan)
        tqdm.write(f"{name}: built {path}, {len(plan) / 2 ** 20:.0f} MiB")


def build_engine(trt, onnx_file, name, part, level):
    """The bytes of a strongly typed engine: each layer has the precision that the ONNX graph says."""
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx_file)):
        errors = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise UserError(f"TensorRT {trt.__version__} cannot parse {onnx_file}: {errors}")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, 4 << 30)
    config.builder_optimization_level = level
    config.clear_flag(trt.BuilderFlag.TF32)                       # on by default; float32 shall be float32
    for ranges in backends.profiles(name, part):
        profile = builder.create_optimization_profile()
        for input_name, shape, _ in part["inputs"]:
            shapes = [[ranges[n][i] if n in ranges else n for n in shape] for i in range(3)]
            profile.set_shape(input_name, *shapes)                # min, opt, max
        if config.add_optimization_profile(profile) < 0:
            raise UserError(f"TensorRT {trt.__version__} refuses the shapes {ranges} of {onnx_file}.")
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise UserError(f"TensorRT {trt.__version__} could not build an engine of {onnx_file}; see above.")
    return bytes(plan)


# === Command line ===========================================================================================
def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", metavar="DIR", default=BUNDLED, help="what to export (the bundled checkpoint)")
    add("--out", type=Path, metavar="DIR", default=Path("exported"), help="where to, all or nothing")
    add("--precision", choices=list(PRECISIONS), default="fp32", help="the transformer's; the RQ-VAE is fp32")
    add("--max-batch", type=int, default=64, metavar="N", help="most pictures at a time (64)")
    add("--trt", action="store_true", help="TensorRT engines too, in OUT-engines; a fitting export is kept")
    add("--level", type=int, default=3, choices=range(6), help="TensorRT's optimization level (3)")
    args = parser.parse_args()
    if not 1 <= args.max_batch <= 4096:
        raise UserError(f"--max-batch is {args.max_batch}; expected a number from 1 to 4096.")
    signal.signal(signal.SIGTERM, signal.default_int_handler)     # a stopped export cleans up after itself
    out = args.out.resolve()
    write = current_export if args.trt else export                # engines alone need no new graphs
    manifest = write(*models.load_checkpoint(args.checkpoint), out, args.precision, args.max_batch)
    size = sum(path.stat().st_size for path in out.glob("graphs-*/*"))
    print(f"{', '.join(backends.PARTS)}: {size / 2 ** 20:.0f} MiB -> {out}/")
    if args.trt:
        build_engines(out, manifest, backends.engine_folder(out), args.level)


if __name__ == "__main__":
    run(main)
