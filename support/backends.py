"""Exported graphs in the place of the PyTorch networks: ONNX Runtime and TensorRT behind the loop of drr.py.

    model, info = backends.load("onnx", "exported", torch.device("cpu"))
    backends.leave_cores_free(torch.device("cpu"))
    *_, last = drr.draft_and_revise(model, cond, noise, info.sample)
    images = model.decode(last.codes)

`export.py` writes what is loaded here: four ONNX graphs and manifest.json, which says what they are and what their bytes
must be. All tensors, in and out, are torch tensors on one device; nothing is copied through the host. onnxruntime and
tensorrt are imported only by the backend that needs them.
"""
import hashlib
import json
import math
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from drr import UserError

GRAPHS = ("spatial", "depth", "decoder", "encoder")
MANIFEST_VERSION = 2
ONNX_TYPES = {"float32": 1, "int64": 7, "bool": 9, "float16": 10, "bfloat16": 16}      # onnx.TensorProto's numbers


# === The manifest: DIR -> what the graphs are, every byte checked ===================================================
def sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def digest(manifest):
    """SHA-256 over all of a manifest but the digest itself."""
    rest = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_manifest(directory):
    """manifest.json of an exported folder, as a dictionary, once it and every file have the hash that was recorded. Raises
    UserError for a folder that is missing, incomplete, damaged or of another version."""
    path = Path(directory) / "manifest.json"
    if not path.exists():
        raise UserError(f"{directory} holds no exported model (no manifest.json); run python export.py --out {directory}.")
    again = f"export it again with python export.py --out {directory}"
    try:
        manifest = json.loads(path.read_text())
    except ValueError:
        manifest = None
    if not isinstance(manifest, dict):
        raise UserError(f"{path} is damaged; {again}.")
    if manifest.get("version") != MANIFEST_VERSION:
        raise UserError(f"{path} is of version {manifest.get('version')}, this program reads {MANIFEST_VERSION}; {again}.")
    if manifest.get("digest") != digest(manifest):
        raise UserError(f"{path} was changed after the export; {again}.")
    for graph in manifest["graphs"].values():
        for name, expected in graph["sha256"].items():
            file = Path(directory) / name
            if not file.is_file():
                raise UserError(f"{file} is missing; {again}.")
            if sha256(file) != expected:
                raise UserError(f"{file} is not the file that was exported: its SHA-256 differs from manifest.json's; "
                                f"{again}.")
    return manifest


def load(backend, directory, device, engines=None):
    """The exported model of a folder, and what `drr.load_checkpoint` calls info.

    backend "onnx" (ONNX Runtime; device cpu or cuda) or "trt" (TensorRT, device cuda; engines: the folder of its
    engines, `engine_folder(directory)`). Raises UserError for what `read_manifest` refuses, and for a runtime, a
    provider or an engine that is not there.
    """
    manifest = read_manifest(directory)
    if backend == "onnx":
        graphs = {name: OrtGraph(Path(directory), manifest, name, device) for name in GRAPHS}
    else:
        trt = import_tensorrt()
        if device.type != "cuda":
            raise UserError("TensorRT runs on a GPU only; leave --device out or give --device cuda.")
        folder = Path(engines or engine_folder(directory))
        graphs = {name: TrtGraph(trt, read_plan(trt, folder, manifest, name), manifest, name, device) for name in GRAPHS}
    info = SimpleNamespace(classes=manifest["classes"], titles=manifest["titles"],
                           **{k: SimpleNamespace(**manifest[k]) for k in ("vae", "transformer", "sample")})
    return ExportedModel(graphs, manifest, device), info


def leave_cores_free(device):
    """Beside ONNX Runtime on a CPU: torch's threads wait for work by spinning, on the cores that the sessions' threads need. What
    torch has to do between them is small: one thread from here on. After `load`, which gives the sessions as many as torch has."""
    if device.type == "cpu":
        torch.set_num_threads(1)


# === The model: what TorchModel does, by graphs =====================================================================
class ExportedModel:
    """Has what drr.TorchModel's docstring lists. `graphs` maps each name in GRAPHS to a callable from torch tensors
    to a list of torch tensors."""

    def __init__(self, graphs, manifest, device):
        self.graphs, self.device, self.precision = graphs, device, manifest["precision"]
        for name, value in manifest["model"].items():     # size, side, positions, depth, null, ... as TorchModel has them
            setattr(self, name, value)
        self.max_batch, self.checkpoint = manifest["max_batch"], manifest["checkpoint"]
        self.steps = [torch.tensor([d], device=device) for d in range(self.depth)]

    def padded(self, name, *tensors):
        """Tensors (rows, ...), filled up with rows of zeros to the next power of two, so that few different shapes occur:
        TensorRT has a CUDA graph for each. No row of a graph looks at another: what is filled in changes nothing but rounding."""
        rows, most = len(tensors[0]), self.graphs[name].graph["most"]["rows"]
        if rows > most:
            raise UserError(f"The exported {name} graph takes at most {most} rows at a time and got {rows}; sample at most "
                            f"{self.max_batch} pictures at once, or export with a larger --max-batch.")
        size = bucket(rows, most)
        return [t if size == rows else F.pad(t, (0, 0) * (t.dim() - 1) + (0, size - rows)) for t in tensors]

    @torch.inference_mode()
    def context(self, codes, mask, cond, positions=None):
        if positions is None:
            positions = torch.arange(self.positions, device=codes.device).expand(len(codes), -1)
        B, n = positions.shape
        positions = F.pad(positions, (0, bucket(n, self.positions) - n))
        return self.graphs["spatial"](*self.padded("spatial", codes, mask, cond, positions))[0][:B, :n]

    @torch.inference_mode()
    def depth_step(self, h, stacks, d, cache):
        P = len(h)
        h, stacks = self.padded("depth", h, stacks)
        if d == 0:
            cache = h.new_zeros(self.n_depth, 2, len(h), self.heads, self.depth, self.head_dim)
        logits, cache[..., d, :] = self.graphs["depth"](h, stacks, self.steps[d], cache)
        return logits[:P], cache

    @torch.inference_mode()
    def decode(self, codes):
        return self.graphs["decoder"](*self.padded("decoder", codes))[0][:len(codes)].clone()

    @torch.inference_mode()
    def encode(self, images):
        return self.graphs["encoder"](*self.padded("encoder", images))[0][:len(images)].clone()


def bucket(n, most):
    """The next power of two, and at most `most`."""
    return min(2 ** math.ceil(math.log2(n)), most)


def check_inputs(inputs, entries):
    """The feeding side's mistakes are ours, not the user's."""
    for x, (name, _, dtype) in zip(inputs, entries, strict=True):
        assert x.dtype == getattr(torch, dtype), f"{name} is {x.dtype}, the graph expects {dtype}"


def empty_outputs(inputs, graph):
    """Tensors for what a graph returns, on the device of the inputs, their dynamic dimensions as large as the inputs'."""
    sizes = {n: size for x, (_, shape, _) in zip(inputs, graph["inputs"]) for n, size in zip(shape, x.shape)}
    return [torch.empty([sizes[n] if isinstance(n, str) else n for n in shape], dtype=getattr(torch, dtype),
                        device=inputs[0].device) for _, shape, dtype in graph["outputs"]]


# === ONNX Runtime ===================================================================================================
class OrtGraph:
    """One graph in an ONNX Runtime session. It reads and writes torch's own memory (IO binding)."""

    def __init__(self, directory, manifest, name, device):
        try:
            import onnxruntime as ort
        except ImportError as error:
            raise UserError(f"--backend onnx needs onnxruntime ({error}); pip install -r requirements-export.txt.") from None
        self.graph, self.device = manifest["graphs"][name], device
        types = {dtype for _, _, dtype in self.graph["inputs"] + self.graph["outputs"]}
        if device.type == "cpu" and "bfloat16" in types:
            raise UserError("ONNX Runtime's CPU provider has no bf16; use --device cuda, or export with --precision fp32.")
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        # Four sessions and torch share the cores: threads may spin within a run, and not between runs.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        wanted, providers = "CPUExecutionProvider", ["CPUExecutionProvider"]
        if device.type == "cuda":
            wanted = "CUDAExecutionProvider"
            # A stream of our own: the number of torch's default stream is 0, which means "none given" to ONNX Runtime.
            self.stream = torch.cuda.Stream(device)
            providers = [(wanted, {"device_id": device.index or 0, "user_compute_stream": str(self.stream.cuda_stream),
                                   "use_tf32": "0"})]
        try:
            self.session = ort.InferenceSession(directory / self.graph["file"], options, providers=providers)
        except Exception as error:                               # onnxruntime's own exceptions share no base class
            raise UserError(f"ONNX Runtime cannot load {directory / self.graph['file']}: {error}") from None
        if self.session.get_providers()[0] != wanted:            # it falls back to the CPU with no more than a log line
            raise UserError("ONNX Runtime has no working CUDA provider here "
                            f"({', '.join(ort.get_available_providers())}); install onnxruntime-gpu and its CUDA libraries, "
                            "or use --device cpu.")

    def __call__(self, *inputs):
        check_inputs(inputs, self.graph["inputs"])
        inputs = [x.contiguous() for x in inputs]
        outputs = empty_outputs(inputs, self.graph)
        binding = self.session.io_binding()
        place = (self.device.type, self.device.index or 0)
        for x, (name, _, dtype) in zip(inputs, self.graph["inputs"]):
            binding.bind_input(name, *place, ONNX_TYPES[dtype], list(x.shape), x.data_ptr())
        for x, (name, _, dtype) in zip(outputs, self.graph["outputs"]):
            binding.bind_output(name, *place, ONNX_TYPES[dtype], list(x.shape), x.data_ptr())
        try:
            if self.device.type == "cuda":
                self.stream.wait_stream(torch.cuda.current_stream(self.device))
                self.session.run_with_iobinding(binding)
                torch.cuda.current_stream(self.device).wait_stream(self.stream)
            else:
                self.session.run_with_iobinding(binding)
        except Exception as error:                               # the memory is full, mostly
            raise UserError(f"ONNX Runtime failed in {self.graph['file']} ({error}); sample fewer pictures at a "
                            "time.") from None
        return outputs


# === TensorRT: ONNX graph -> engine ("plan") -> CUDA graphs =========================================================
def import_tensorrt():
    try:
        import tensorrt
    except Exception as error:                   # not installed, or its libraries cannot be loaded
        raise UserError(f"TensorRT cannot be imported ({error}); pip install tensorrt (its libraries come from "
                        "NVIDIA's package index), or use --backend onnx.") from None
    if not torch.cuda.is_available():
        raise UserError("TensorRT needs an NVIDIA GPU that PyTorch sees, and there is none; use --backend onnx.")
    if tuple(map(int, tensorrt.__version__.split(".")[:2])) < (10, 9):
        raise UserError(f"This is TensorRT {tensorrt.__version__}; 10.9 is the oldest that has all that is needed here.")
    return tensorrt


def engine_folder(directory):
    """Engines stay beside the exported folder, not in it: exporting anew replaces the folder, the engines are kept."""
    return Path(f"{Path(directory).resolve()}-engines")


def profiles(graph):
    """What an engine is optimized for, few rows and many: two dictionaries of each dynamic dimension's [min, opt, max]."""
    most = graph["most"]
    few = min(64 if graph["file"] == "depth.onnx" else 4, most["rows"])
    others = {name: [1, max(1, n // 8), n] for name, n in most.items()}
    return [{**others, "rows": [1, max(1, few // 2), few]}, {**others, "rows": [1, max(1, most["rows"] // 4), most["rows"]]}]


def engine_key(trt, manifest, name, level):
    """All that an engine depends on; it is good for nothing else."""
    return {"graph": manifest["graphs"][name]["sha256"], "tensorrt": trt.__version__, "gpu": torch.cuda.get_device_name(),
            "compute_capability": list(torch.cuda.get_device_capability()), "cuda": torch.version.cuda,
            "precision": manifest["precision"], "profiles": profiles(manifest["graphs"][name]), "level": level}


def plan_path(folder, name, key):
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return Path(folder) / f"{name}-{digest}.plan"


def intact(path, key):
    """The bytes of a plan, or None if it is not there or not the one that its record says was built for `key`. A plan is a
    program: no other one is ever loaded."""
    try:
        plan, record = path.read_bytes(), json.loads(path.with_suffix(".json").read_text())
    except (OSError, ValueError):
        return None
    return plan if record == {**key, "plan": hashlib.sha256(plan).hexdigest()} else None


def read_plan(trt, folder, manifest, name):
    """The bytes of a graph's engine for this GPU and TensorRT, of the highest level that there is. Raises UserError where
    there is none, or an altered one."""
    for level in range(5, -1, -1):
        key = engine_key(trt, manifest, name, level)
        path = plan_path(folder, name, key)
        if path.exists():
            plan = intact(path, key)
            if plan is None:
                raise UserError(f"{path} is not the engine that its record describes; run python export.py --trt again.")
            return plan
    raise UserError(f"{folder} has no engine of the {name} graph for this GPU ({torch.cuda.get_device_name()}), TensorRT "
                    f"{trt.__version__} and this export; run python export.py --trt on this machine.")


class TrtGraph:
    """One engine. What it returns stays valid until the next call with the same shapes.

    DEVIATION from one context per profile: all shapes have their own buffers, execution context and CUDA graph, made
    when they first come. To change a context after its work was captured would leave the captured graph undefined.
    """

    def __init__(self, trt, plan, manifest, name, device):
        self.trt, self.name, self.graph, self.device = trt, name, manifest["graphs"][name], device
        self.runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        self.engine = self.runtime.deserialize_cuda_engine(plan)
        self.must(self.engine is not None, "load its engine")
        self.tensors = {self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)}
        self.prepared = {}                                       # shapes of the inputs -> what `prepare` returns

    def must(self, done, doing):
        if not done:
            raise UserError(f"TensorRT could not {doing} (the {self.name} graph); is the GPU's memory full? If not, delete the "
                            "engine and run python export.py --trt again.")

    def __call__(self, *inputs):
        check_inputs(inputs, self.graph["inputs"])
        shapes = tuple(x.shape for x in inputs)
        if shapes not in self.prepared:
            self.prepared[shapes] = self.prepare(inputs)
        cuda_graph, static_inputs, outputs, _ = self.prepared[shapes]
        for static, x in zip(static_inputs, inputs):
            static.copy_(x)
        cuda_graph.replay()
        return outputs

    def prepare(self, inputs):
        """CUDA graph, input and output buffers for the shapes of the inputs, and what must stay alive."""
        profile = next(i for i, p in enumerate(profiles(self.graph)) if len(inputs[0]) <= p["rows"][2])
        context = self.engine.create_execution_context(self.trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        self.must(context is not None, "make an execution context")
        static_inputs = [x.clone(memory_format=torch.contiguous_format) for x in inputs]      # torch aligns to 512 bytes
        outputs = empty_outputs(inputs, self.graph)
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self.must(context.set_optimization_profile_async(profile, stream.cuda_stream), "choose a profile")
            for x, (name, _, _) in zip(static_inputs, self.graph["inputs"]):
                if name in self.tensors:                         # D = 1 leaves some inputs without a use
                    self.must(context.set_input_shape(name, tuple(x.shape)), f"take {name} of shape {tuple(x.shape)}")
            for x, (name, _, _) in zip(static_inputs + outputs, self.graph["inputs"] + self.graph["outputs"]):
                if name in self.tensors:
                    self.must(context.set_tensor_address(name, x.data_ptr()), f"take the address of {name}")
            scratch = torch.empty(max(1, context.update_device_memory_size_for_shapes()), dtype=torch.uint8,
                                  device=self.device)            # of this shape alone, not of the profile's largest
            context.set_device_memory(scratch.data_ptr(), scratch.numel())
            self.must(context.execute_async_v3(stream.cuda_stream), "run")                    # once before the capture
        stream.synchronize()
        cuda_graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(cuda_graph, stream=stream):
            self.must(context.execute_async_v3(stream.cuda_stream), "run while it was captured")
        return cuda_graph, static_inputs, outputs, (context, scratch)
