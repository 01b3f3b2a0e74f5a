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
    cuda = next(transformer.parameters()).is_cuda
    graphs = cuda if graphs is None else graphs
    # Weights become constants, packed as the CPU's products want them, once for each shape. Both are set for
    # the whole process: the tracer reads them before torch.compile's options. torch allows 8 shapes.
    torch._inductor.config.freezing = compiled and not cuda
    torch._dynamo.config.recompile_limit = 64
    how = {"mode": "reduce-overhead" if graphs else None} if compiled else {"backend": "cudagraphs"}
    run = torch.compile(drr.update, fullgraph=True, dynamic=False, **how)

    def update(_, state, positions, uniforms, cond, sampling):
        # What differs from update to update would be compiled anew each time: phase, round, strides.
        alike = drr.State("", 0, state.codes.contiguous(), state.hidden.contiguous(), state.log_p)
        torch.compiler.cudagraph_mark_step_begin()           # what the last replay returned has been copied
        new = run(transformer, alike, positions.contiguous(), uniforms, cond, sampling)
        # The next replay writes to the same tensors.
        return drr.State(state.phase, state.round, *(x.clone() if graphs else x for x in new[2:]))
    return update
