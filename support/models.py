"""Which kind of transformer a checkpoint holds, and what a kind must offer so that all scripts serve it.

`transformer.kind` in config.yaml and in a checkpoint names it: `contextual` is the paper's, in drr.py; each
other one is a file in related/, which is read only when a checkpoint or a preset needs it.
"""
import importlib
import math
import sys
from typing import Callable, NamedTuple

import torch

import drr


class Kind(NamedTuple):
    """What differs between the kinds."""
    # (c, conditions, positions, depth, codebook) -> a module that is built, trained (`forward`) and drawn
    # from (`depth_step`) like drr.ContextualRQTransformer
    model: Callable
    random_mask: Callable    # as drr.random_mask: uniforms (B, 1 + N) -> mask (B, N) of a training step
    hidden: float            # the share of all stacks that it hides, on average
    decode: Callable         # as drr.draft_and_revise: yields a State after each update
    fixed: dict              # {sampling key: the only value that this kind takes; None stands for N}
    why: str                 # the reason, for the sentence "KEY is VALUE, but ..."
    null: bool               # whether it has a null condition, for guidance
    by_depth: bool           # whether top_k and top_p may be lists, a value for each depth
    # (transformer, type) -> the module that is exported as `spatial`, one token at a time, and its inputs and
    # outputs as in export.describe; None: the transformer's `context`, of all positions at once
    graph: Callable | None
    # the module that is exported as `depth` where no blocks run over depth; None: export.DepthStep
    head: Callable | None


CONTEXTUAL = Kind(drr.ContextualRQTransformer, drr.random_mask, 2 / math.pi, drr.draft_and_revise, fixed={},
                  why="", null=True, by_depth=False, graph=None, head=None)
OTHERS = {"autoregressive": "related.rq_transformer", "maskgit": "related.maskgit"}


def kind(section):
    """The Kind of a section `transformer`; one without the key is of a checkpoint older than it."""
    name = getattr(section, "kind", "contextual")
    if name == "contextual":
        return CONTEXTUAL
    return importlib.import_module(OTHERS[name]).KIND


def kind_of(transformer):
    """The Kind of a transformer."""
    return getattr(sys.modules[type(transformer).__module__], "KIND", CONTEXTUAL)


def build(c, *arguments):
    """A transformer of the kind that its section names; arguments: those of drr.ContextualRQTransformer."""
    return kind(c).model(c, *arguments)


def load_checkpoint(directory, dtype=torch.float32):
    """As drr.load_checkpoint, of any kind."""
    return drr.load_checkpoint(directory, build, dtype)


def one_token(blocks, v, cache, known):
    """A token v (P, d_model) through the blocks of a graph. cache (n, 2, P, heads, T, head_dim): the keys and
    values that it sees where known (T,); returns v and its own, (n, 2, P, heads, head_dim): they are not
    written, since a graph's inputs are constant."""
    new = []
    old = cache.flatten(0, 1).unbind()                                    # keys, values of block 0, ...
    bias = torch.where(known, 0.0, -1e4).to(v.dtype)                      # (T,), added to the scores
    for block, keys, values in zip(blocks, old[::2], old[1::2]):          # (P, heads, T, head_dim)
        q, key, value = block.qkv(block.ln1(v)).unflatten(-1, (3, -1, 1, block.head_dim)).unbind(1)
        q = q * block.head_dim ** -0.5
        before = q @ keys.transpose(-2, -1) + bias                        # (P, heads, 1, T)
        itself = (q * key).sum(-1, keepdim=True)                          # (P, heads, 1, 1)
        p = torch.cat([before, itself], -1).softmax(-1)
        a = p[..., :-1] @ values + p[..., -1:] * value                    # (P, heads, 1, head_dim)
        v = v + block.proj(a.flatten(1))
        v = v + block.fc2(torch.nn.functional.gelu(block.fc1(block.ln2(v))))
        new += [key, value]
    return v, torch.stack(new).unflatten(0, (-1, 2)).squeeze(-2)
