"""config.yaml: the only place that holds values. Presets, overrides, their errors, and the published numbers."""
import math
import re

import pytest
import torch
import yaml
from conftest import REPO

from support import common
import drr
from support.common import load_config
from support.runs import learning_rate

DOCUMENT = yaml.safe_load((REPO / "config.yaml").read_text())
BASE = DOCUMENT["base"]
KEYS = [(section, key) for section in BASE for key in BASE[section]]


def to_dict(config):
    return {section: dict(vars(values)) for section, values in vars(config).items()}


# === Presets ========================================================================================================
@pytest.mark.parametrize("preset", DOCUMENT["presets"])
def test_every_preset_loads_with_every_key_in_the_bases_type(preset):
    config = to_dict(load_config(preset))
    assert {s: list(config[s]) for s in config} == {s: list(BASE[s]) for s in BASE}
    for section, key in KEYS:
        assert type(config[section][key]) is type(BASE[section][key]), (section, key)


@pytest.mark.parametrize("preset", DOCUMENT["presets"])
def test_every_preset_can_be_built_and_trained(preset):
    c = load_config(preset)
    for section in (c.vae, c.transformer):
        assert section.batch_size % (section.micro_batch or 1) == 0 and section.warmup < section.steps
    assert c.transformer.d_model % c.transformer.head_dim == 0
    # GroupNorm(32); codes are cached as uint16
    assert c.vae.ch % 32 == 0 and c.vae.codebook_size <= 2 ** 16
    side = c.vae.resolution >> (len(c.vae.ch_mult) - 1)
    assert 1 <= c.sample.t_draft <= side ** 2


def test_a_preset_that_is_like_another_holds_its_own_values_over_the_others():
    like, own = load_config("tiny-imagenet-32"), load_config("tiny-imagenet-64")
    assert DOCUMENT["presets"]["tiny-imagenet-64"]["like"] == "tiny-imagenet-32"
    assert own.vae.resolution == 64 and like.vae.resolution == 32
    assert own.vae.codebook_size == like.vae.codebook_size != BASE["vae"]["codebook_size"]


def test_loading_a_preset_does_not_change_another():
    before = to_dict(load_config("imagenet-821m"))
    load_config("smoke", ["vae.lr=1", "vae.betas=[0.1,0.2]"]).vae.ch_mult.append(9)
    assert to_dict(load_config("imagenet-821m")) == before


@pytest.mark.parametrize("section, key", KEYS)
def test_every_key_is_read_by_a_script(section, key):
    scripts = "\n".join(p.read_text() for p in (*REPO.glob("*.py"), *REPO.glob("support/*.py")))
    assert re.search(rf"(\bc|config\.{section}|info\.{section}|section|values)\.{key}\b", scripts), f"nothing reads {section}.{key}"


# === The published numbers ==========================================================================================
TABLE = {                   # n_spatial, n_depth, d_model, cond, revise guidance, M, T_revise
    "imagenet-371m": (24, 4, 1024, "class", 1.4, 3, 2),
    "imagenet-821m": (24, 4, 1536, "class", 1.8, 2, 2),
    "imagenet-256": (24, 4, 1536, "class", 1.8, 2, 2),
    "imagenet-1.4b": (42, 6, 1536, "class", 2.0, 2, 2),
    "cc3m-366m": (21, 4, 1024, "text", 1.1, 2, 4),
    "cc3m-654m": (26, 4, 1280, "text", 1.1, 2, 4),
}


@pytest.mark.parametrize("preset", TABLE)
def test_published_sizes_and_decoding(preset):
    c = load_config(preset)
    t, s = c.transformer, c.sample
    assert (t.n_spatial, t.n_depth, t.d_model, t.cond, s.revise_guidance, s.rounds, s.t_revise) == TABLE[preset]
    assert (t.head_dim, s.t_draft) == (64, 64)
    assert (s.draft_temperature, s.revise_temperature, s.draft_guidance) == (1.0, 0.8, 1.0)
    assert (s.top_k, s.top_p) == (0, 1.0)
    assert (t.text_length, t.text_vocab) == (32, 16384)


def test_published_vq_preset():
    c = load_config("vq-350m")
    assert (c.vae.depth, c.vae.resolution >> (len(c.vae.ch_mult) - 1)) == (1, 16)
    assert (c.sample.revise_guidance, c.sample.t_draft, c.sample.t_revise, c.sample.rounds) == (2.4, 256, 2, 2)


@pytest.mark.parametrize("preset", ["imagenet-256", "imagenet-371m", "imagenet-1.4b"])
def test_published_stage_one(preset):
    v = load_config(preset).vae
    assert (v.resolution, v.ch, v.ch_mult, v.num_res_blocks, v.attn_resolutions) == (256, 128, [1, 1, 2, 2, 4, 4], 2,
                                                                                     [8])
    assert (v.z_channels, v.code_dim, v.codebook_size, v.depth) == (256, 256, 16384, 4)
    assert v.resolution >> (len(v.ch_mult) - 1) == 8
    assert (v.ema_decay, v.restart, v.commitment_weight, v.loss) == (0.99, True, 0.25, "mse")
    assert (v.perceptual_weight, v.disc_weight, v.disc_layers, v.disc_ch) == (1.0, 0.75, 2, 64)
    assert (v.lr, v.betas, v.batch_size) == (4e-5, [0.5, 0.9], 128)
    epoch = 1_281_167 / 128
    assert abs(v.steps - 10 * epoch) <= 1 and abs(v.warmup - epoch / 2) <= 1


@pytest.mark.parametrize("preset", TABLE)
def test_published_stage_two(preset):
    t = load_config(preset).transformer
    assert (t.lr, t.betas, t.weight_decay, t.cond_dropout) == (1e-4, [0.9, 0.95], 1e-4, 0.1)
    assert abs(t.steps - 300 * 1_281_167 / t.batch_size) <= 1


# === Overrides ======================================================================================================
@pytest.mark.parametrize("text, value", [
    ("vae.lr=4e-5", 4e-5), ("vae.lr=1", 1.0), ("vae.steps=1e3", 1000), ("vae.ch_mult=[1, 2]", [1, 2]),
    ("vae.betas=[0,1e-1]", [0.0, 0.1]),
    ("vae.restart=false", False), ("vae.restart=True", True), ("transformer.half=true", True), ("vae.loss=l1", "l1"),
    ("data.seed=0", 0), ("data.seed=010", 10), ("data.favour_class=007", "007"), ("transformer.cond=none", "none")])
def test_overrides_take_the_bases_type(text, value):
    section, key = text.partition("=")[0].split(".")
    result = getattr(getattr(load_config("smoke", [text]), section), key)
    assert result == value and type(result) is type(value)
    if isinstance(value, list):
        assert [type(v) for v in result] == [type(v) for v in value]


def test_the_last_override_wins_over_the_preset():
    assert load_config("smoke", ["vae.steps=7", "vae.steps=9"]).vae.steps == 9


@pytest.mark.parametrize("text, nearest",
                         [("vae.codebok_size=9", "vae.codebook_size"),
                          ("transformers.d_model=9", "transformer.d_model"),
                                           ("sample.t_drafts=9", "sample.t_draft"), ("vea.lr=1", "vae.lr")])
def test_an_unknown_key_or_section_names_the_nearest(text, nearest):
    with pytest.raises(drr.UserError, match=re.escape(repr(nearest))):
        load_config("smoke", [text])


def test_an_override_of_what_a_script_does_not_read_is_refused():
    assert load_config("smoke", ["vae.lr=1"], ("data", "vae")).vae.lr == 1
    with pytest.raises(drr.UserError, match="transformer.lr=1.*data, vae"):
        load_config("smoke", ["transformer.lr=1"], ("data", "vae"))


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(drr.UserError, match="tiny-imagenet-32"):
        load_config("smok")


@pytest.mark.parametrize("text", [
    "vae.lr=fast", "vae.lr=", "vae.lr=[1]", "vae.lr=-1", "vae.lr=nan", "vae.lr=.nan", "vae.lr=inf", "vae.lr=.inf",
    "vae.lr=1e999",
    "vae.steps=1.5", "vae.steps=-1", "vae.steps=nan", "vae.steps=.inf", "vae.steps=true", "vae.restart=2",
    "vae.restart=maybe",
    "vae.ch_mult=3", "vae.ch_mult=[]", "vae.ch_mult=[1,a]", "vae.ch_mult=[1.5]", "vae.ch_mult=[[1]]",
    "vae.betas=[nan,1]",
    "vae.loss=huber", "transformer.cond=image", "vae.lr={a: 1}", "vae.lr", "lr=1", "=1", "", "vae.lr=[1",
    "vae.loss=[mse]"])
def test_a_value_of_another_kind_is_the_users_mistake(text):
    with pytest.raises(drr.UserError):
        load_config("smoke", [text])


@pytest.mark.parametrize("text", [
    "vae.steps=0", "vae.batch_size=0", "vae.depth=0", "vae.codebook_size=0", "vae.log_every=0",
    "vae.save_every=0",
    "vae.picture_every=0", "transformer.head_dim=0", "sample.t_draft=0", "sample.t_revise=0", "sample.batch_size=0",
    "sample.draft_temperature=0", "sample.top_p=0", "sample.top_p=1.5", "vae.ema_decay=1.5",
    "transformer.cond_dropout=2", "data.views=0",
    "vae.codebook_size=70000"])
def test_a_value_that_no_run_could_use_is_the_users_mistake(text):
    """Division by zero, an empty model or codes that do not fit into the cache's uint16 would come much later."""
    with pytest.raises(drr.UserError):
        load_config("smoke", [text])


# === Errors =========================================================================================================
def test_full_memory_and_an_interruption_are_no_tracebacks(capsys):
    def fill():
        torch.empty(2 ** 60, dtype=torch.uint8)              # torch says so with a RuntimeError

    def interrupt():
        raise KeyboardInterrupt

    for main, status in ((fill, 2), (interrupt, 130)):
        with pytest.raises(SystemExit) as stopped:
            common.run(main)
        assert stopped.value.code == status
    assert capsys.readouterr().err.startswith("error: The memory is full")


# === Learning rate ==================================================================================================
def test_learning_rate_warms_up_and_falls_to_zero():
    c = load_config("smoke", ["vae.steps=100", "vae.warmup=10", "vae.lr=2"]).vae
    rates = [learning_rate(step, c) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[10] == pytest.approx(2)
    assert all(a > b for a, b in zip(rates[10:], rates[11:])) and 0 < rates[-1] < 0.01
    assert rates[55] == pytest.approx(2 * (0.5 + 0.5 * math.cos(math.pi / 2)))
    assert [learning_rate(step, c, decay=False) for step in (10, 99)] == [2, 2]
