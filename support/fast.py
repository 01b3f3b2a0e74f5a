"""A faster `drr.update` for the same loop: compiled, on a GPU captured as CUDA graphs, and products in fp8.

    model = drr.TorchModel(vae, transformer, device, dtype)
    fast.speed_up(model, c)                       # c: the section `sample`; python sample.py --compile does this
    *_, last = drr.draft_and_revise(model, cond, noise, c)

Where T_draft and T_revise divide the number of positions, the sets of a partition have equal sizes and a whole decode has two
shapes, one of the draft and one of the revisions; each of the two that does not divide it adds one.
docs/speed.md says what each step brings.
"""
import torch
import torch.nn.functional as F
from torch import nn

import drr
from drr import UserError


def torch_model(vae, transformer, device, dtype):
    """A drr.TorchModel; dtype torch.float8_e4m3fn stands for bf16 with the products of `to_float8`."""
    if dtype != torch.float8_e4m3fn:
        return drr.TorchModel(vae, transformer, device, dtype)
    model = drr.TorchModel(vae, transformer, device, torch.bfloat16)
    to_float8(model.transformer)
    return model


def speed_up(model, c, compiled=True, graphs=None):
    """Replaces `model.update` (of a drr.TorchModel) by a compiled one. graphs: captured as CUDA graphs, too; None: on a GPU. The
    first updates of each shape are slow. Raises UserError for sampling values `c` under which every update has a shape or a
    guidance of its own."""
    if c.draft_growing or c.draft_ramp or c.draft_pool < 1:
        raise UserError("Compiled and captured updates must be alike, and draft_growing, draft_ramp and draft_pool make each another; "
                        "leave them out, or do not compile.")
    transformer, run = model.transformer, drr.update
    cuda = next(transformer.parameters()).is_cuda
    if compiled:
        # Weights become constants, packed as the CPU's products want them, once a shape. Set for the whole process, because the
        # tracer asks for it before any options of torch.compile count. And more shapes than torch's 8 may come.
        torch._inductor.config.freezing = not cuda
        torch._dynamo.config.recompile_limit = 64
        run = torch.compile(run, fullgraph=True, dynamic=False)
    if graphs or graphs is None and cuda:
        run = Graphs(run)

    def update(_, state, positions, *arguments, **named):
        # Whatever differs from update to update would be compiled in and have it compiled anew: phase, round, strides.
        alike = state._replace(phase="", round=0, codes=state.codes.contiguous(), hidden=state.hidden.contiguous())
        new = run(transformer, alike, positions.contiguous(), *arguments, **named)
        return new._replace(phase=state.phase, round=state.round)
    model.update = update


# === CUDA graphs: the hundreds of kernels of an update -> one launch ================================================
class Graphs:
    """`update` with its own buffers and CUDA graph for every shape and way of drawing. Returns new tensors each time."""

    def __init__(self, update):
        self.update, self.captured = update, {}
        # One pool for all of them: a replay may write over what another left there, as results are copied out at once.
        self.pool = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None

    def __call__(self, model, state, positions, uniforms, cond, how, most_likely=None, better=False):
        inputs = state.codes, state.hidden, state.log_p, positions, uniforms, cond
        key = (how, most_likely, better, *(x.shape for x in inputs))
        if key not in self.captured:
            static = [x.clone(memory_format=torch.contiguous_format) for x in inputs]

            def work():
                codes, hidden, log_p, *others = static
                return self.update(model, drr.State("", 0, codes, hidden, log_p), *others, how, most_likely, better)
            self.captured[key] = static, *capture(work, self.pool)
        static, replay, output = self.captured[key]
        for buffer, x in zip(static, inputs):
            buffer.copy_(x)
        replay()
        return drr.State("", 0, output.codes.clone(), output.hidden.clone(), output.log_p.clone())


def capture(work, pool):
    """(replay, output): replay() does again what work() does, with the same tensors, and leaves its result in `output`."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for trial in range(3):                              # compiles, and lets the libraries take their workspaces
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        output = work()
    return graph.replay, output


# === fp8: the products of the spatial blocks ========================================================================
class Float8Linear(nn.Module):
    """x (..., c_in) -> (..., c_out) like `linear`, with weights and inputs rounded to float8_e4m3fn: 4 bits of exponent and 3 of
    mantissa, under one float32 scale for each output and for each row of x. Biases and results are bf16."""

    def __init__(self, linear):
        super().__init__()
        weight, scale = self.rounded(linear.weight.detach())
        self.register_buffer("weight", weight)              # (c_out, c_in)
        self.register_buffer("scale", scale.T.contiguous())                                 # (1, c_out)
        self.register_buffer("bias", linear.bias.detach().bfloat16())

    @staticmethod
    def rounded(x):
        """x (P, c) -> x / scale in float8, scale (P, 1): a row's largest entry becomes 448, the largest float8."""
        scale = x.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / torch.finfo(torch.float8_e4m3fn).max
        return (x.float() / scale).to(torch.float8_e4m3fn), scale

    def forward(self, x):
        rows, scale = self.rounded(x.flatten(0, -2))
        y = F.scaled_mm(rows, self.weight.T, scale, F.ScalingType.RowWise, self.scale, F.ScalingType.RowWise, bias=self.bias,
                        output_dtype=torch.bfloat16)
        return y.unflatten(0, x.shape[:-1])


def to_float8(transformer):
    """Turns the products of the spatial blocks into Float8Linear, in place, all but the last block's, which multiplies with parts
    of its weights. Raises UserError for a width that the hardware does not take."""
    for block in transformer.spatial[:-1]:
        for name in ("qkv", "proj", "fc1", "fc2"):
            linear = getattr(block, name)
            if linear.in_features % 16:
                raise UserError(f"--precision fp8 needs a width that is a multiple of 16; this transformer's is {linear.in_features}.")
            setattr(block, name, Float8Linear(linear))
