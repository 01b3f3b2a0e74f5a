"""A faster `drr.update` for the same loop: compiled, and on a GPU captured as CUDA graphs.

    model = drr.TorchModel(vae, transformer, device, dtype)
    update = fast.compiled_update(model)                            # python sample.py --compile does this
    *_, last = drr.draft_and_revise(model, cond, noise, c, update=update)

Where T_draft and T_revise divide the number of positions, the sets of a partition have equal sizes, and a
decode has two shapes, one for the draft and one for the revisions; where one does not divide it, one more.
docs/speed.md says what each step brings.
"""
import torch

import drr


def compiled_update(model, compiled=True, graphs=None):
    """A function to pass as `update=`, for a drr.TorchModel: the first updates of each shape are slow.

    graphs: whether updates are captured as CUDA graphs, too; None: on a GPU.
    """
    transformer = model.transformer
    run = drr.update
    cuda = next(transformer.parameters()).is_cuda
    if compiled:
        # Weights become constants, packed as the CPU's products want them, once for each shape. Both are set
        # for the whole process: the tracer reads them before torch.compile's options. torch allows 8 shapes.
        torch._inductor.config.freezing = not cuda
        torch._dynamo.config.recompile_limit = 64
        run = torch.compile(run, fullgraph=True, dynamic=False)
    if graphs or (graphs is None and cuda):
        run = Graphs(run)

    def update(_, state, positions, uniforms, cond, sampling):
        # What differs from update to update would be compiled anew each time: phase, round, strides.
        alike = drr.State("", 0, state.codes.contiguous(), state.hidden.contiguous(), state.log_p)
        new = run(transformer, alike, positions.contiguous(), uniforms, cond, sampling)
        return new._replace(phase=state.phase, round=state.round)
    return update


class Graphs:
    """`update` with buffers and a CUDA graph for each shape and Sampling. Returns new tensors each time."""

    def __init__(self, update):
        self.update = update
        self.captured = {}
        # One pool for all: a replay may overwrite what another left there, as results are copied at once.
        self.pool = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None

    def __call__(self, model, state, positions, uniforms, cond, sampling):
        inputs = state.codes, state.hidden, state.log_p, positions, uniforms, cond
        key = (sampling, *(x.shape for x in inputs))
        if key not in self.captured:
            buffers = [x.clone(memory_format=torch.contiguous_format) for x in inputs]

            def work():
                codes, hidden, log_p, *others = buffers
                return self.update(model, drr.State("", 0, codes, hidden, log_p), *others, sampling)
            self.captured[key] = buffers, *capture(work, self.pool)
        buffers, replay, output = self.captured[key]
        for buffer, x in zip(buffers, inputs):
            buffer.copy_(x)
        replay()
        return drr.State("", 0, output.codes.clone(), output.hidden.clone(), output.log_p.clone())


def capture(work, pool):
    """(replay, output): replay() does what work() does, on the same tensors, and writes to `output`."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):                         # compiles, and lets the libraries take their workspaces
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        output = work()
    return graph.replay, output
