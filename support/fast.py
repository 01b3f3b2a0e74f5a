"""A faster `drr.update` for the same loop: compiled, and on a GPU captured as CUDA graphs.

    model = drr.TorchModel(vae, transformer, device, dtype)
    update = fast.compiled_update(model)                      # python sample.py --compile does this
    *_, last = drr.draft_and_revise(model, cond, noise, c, update=update)

Where T_draft and T_revise divide the number of positions, the sets of a partition have equal sizes, and a whole decode has
two shapes, one for the draft and one for the revisions. Each of the two that does not divide it adds one shape.
docs/speed.md says what each step brings.
"""
import torch

import drr


def compiled_update(model, compiled=True, graphs=None):
    transformer = model.transformer
    run = drr.update
    cuda = next(transformer.parameters()).is_cuda
    if compiled:
        torch._inductor.config.freezing = not cuda
        torch._dynamo.config.recompile_limit = 64
        run = torch.compile(run, fullgraph=True, dynamic=False)
    if graphs or graphs is None and cuda:
        run = Graphs(run)

    def update(_, state, positions, uniforms, cond, sampling):
        # Whatever differs from update to update would be compiled in, and compiled anew: phase, round, strides.
        alike = state._replace(phase="", round=0, codes=state.codes.contiguous(), hidden=state.hidden.contiguous())
        new = run(transformer, alike, positions.contiguous(), uniforms, cond, sampling)
        return new._replace(phase=state.phase, round=state.round)
    return update


class Graphs:
    """`update` with its own buffers and CUDA graph for every shape and way of drawing. Returns new tensors each time."""

    def __init__(self, update):
        self.update, self.captured = update, {}
        # One pool for all of them: a replay may write over what another left there, as results are copied out at once.
        self.pool = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None

    def __call__(self, model, state, positions, uniforms, cond, sampling):
        inputs = state.codes, state.hidden, state.log_p, positions, uniforms, cond
        key = (sampling, *(x.shape for x in inputs))
        if key not in self.captured:
            static = [x.clone(memory_format=torch.contiguous_format) for x in inputs]

            def work():
                codes, hidden, log_p, *others = static
                return self.update(model, drr.State("", 0, codes, hidden, log_p), *others, sampling)
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
