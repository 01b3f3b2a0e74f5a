"""config.yaml: the only place that holds values. Presets, overrides, and the published numbers."""
import math

import pytest
import yaml
from conftest import REPO
from processes import PHOTOS, execute

from support.common import load_config
from support.runs import learning_rate

DOCUMENT = yaml.safe_load((REPO / "config.yaml").read_text())
BASE = DOCUMENT["base"]
KEYS = [(section, key) for section in BASE for key in BASE[section]]


def to_dict(config):
    return {section: dict(vars(values)) for section, values in vars(config).items()}


# === Presets ================================================================================================
@pytest.mark.parametrize("preset", DOCUMENT["presets"])
def test_every_preset_has_every_key_in_the_bases_type_and_can_be_trained(preset):
    config = to_dict(load_config(preset))
    assert {s: list(config[s]) for s in config} == {s: list(BASE[s]) for s in BASE}
    for section, key in KEYS:
        assert type(config[section][key]) is type(BASE[section][key]), (section, key)
    c = load_config(preset)
    for section in (c.vae, c.transformer):
        assert section.batch_size % (section.micro_batch or 1) == 0 and section.warmup < section.steps
    assert c.transformer.d_model % c.transformer.head_dim == 0
    assert c.vae.ch % 32 == 0 and c.vae.codebook_size <= 2 ** 16         # GroupNorm(32); uint16 in the cache
    side = c.vae.resolution >> (len(c.vae.ch_mult) - 1)
    assert 1 <= c.sample.t_draft <= side ** 2


@pytest.mark.parametrize("preset", DOCUMENT["presets"])
def test_a_preset_is_what_it_is_like_with_values_of_its_own_and_repeats_nothing(preset):
    own = dict(DOCUMENT["presets"][preset])
    expected = to_dict(load_config(own.pop("like", "imagenet-256")))
    for section, values in own.items():
        assert not [key for key, value in values.items() if expected[section][key] == value]
        expected[section] |= values
    assert to_dict(load_config(preset)) == expected


RECORD = """
import atexit
from support import common
load_config, sampling_values, read = common.load_config, common.sampling_values, set()


def recorded(section, values):
    class Recorded(common.SimpleNamespace):
        def __getattribute__(self, key):
            read.add(f"{section}.{key}")
            return super().__getattribute__(key)
    return Recorded(**vars(values))


def load(*arguments):
    sections = vars(load_config(*arguments))
    return common.SimpleNamespace(**{name: recorded(name, values) for name, values in sections.items()})


common.load_config = load
common.sampling_values = lambda *arguments: recorded("sample", sampling_values(*arguments))
atexit.register(lambda: print(*read))
"""


def test_every_key_is_read_by_a_run(tmp_path):
    """The sections note what is asked of them, in real runs of the scripts with all options on."""
    data = f"smoke --data {PHOTOS} --out run --precision fp32"
    vae = f"train_vae.py {data} vae.steps=2 vae.warmup=1"
    stage_two = f"train_transformer.py {data} transformer.steps=2 transformer.warmup=1"
    pytest.importorskip("tokenizers")
    (tmp_path / "train.tsv").write_text(f"{next(PHOTOS.rglob('*.JPEG'))}\ta photograph\n")
    read, said = set(), ""
    for command in (
            f"{vae} vae.disc_start=0 vae.quantize_start=0 vae.feature_weight=1 vae.weights_ema=0.9 "
            "data.in_memory=false data.favour_class=n09472597 data.favour=2",
            f"{vae} --force vae.perceptual_weight=1 vae.perceptual=efficientnet",
            f"{stage_two} transformer.soft_labels=true transformer.stochastic_codes=true",
            f"{stage_two} --data . --out text --vae run/vae.safetensors transformer.cond=text",
            "sample.py --checkpoint run --class 2 --num 1 --t-draft 1 --m 0 --out x.png"):
        done = execute(*command.split(), cwd=tmp_path, before=RECORD)
        read |= set(done.stdout.split())
        said += done.stderr
    assert not {f"{section}.{key}" for section, key in KEYS} - read, said


# === The published numbers ==================================================================================
TABLE = {                   # n_spatial, n_depth, d_model, cond, revise guidance, M, T_revise
    "imagenet-371m": (24, 4, 1024, "class", 1.4, 3, 2),
    "imagenet-821m": (24, 4, 1536, "class", 1.8, 2, 2),
    "imagenet-256": (24, 4, 1536, "class", 1.8, 2, 2),
    "imagenet-1.4b": (42, 6, 1536, "class", 2.0, 2, 2),
    "cc3m-366m": (21, 4, 1024, "text", 1.1, 2, 4),
    "cc3m-654m": (26, 4, 1280, "text", 1.1, 2, 4),
}


@pytest.mark.parametrize("preset", TABLE)
def test_published_stage_two_and_decoding(preset):
    c = load_config(preset)
    t, s = c.transformer, c.sample
    found = (t.n_spatial, t.n_depth, t.d_model, t.cond, s.revise_guidance, s.rounds, s.t_revise)
    assert found == TABLE[preset]
    assert (t.head_dim, s.t_draft) == (64, 64)
    assert (s.draft_temperature, s.revise_temperature, s.draft_guidance) == (1.0, 0.8, 1.0)
    assert (s.top_k, s.top_p) == (0, 1.0)
    assert (t.text_length, t.text_vocab) == (32, 16384)
    assert (t.lr, t.betas, t.weight_decay, t.cond_dropout) == (1e-4, [0.9, 0.95], 1e-4, 0.1)
    assert abs(t.steps - 300 * 1_281_167 / t.batch_size) <= 1


def test_published_vq_preset():
    c = load_config("vq-350m")
    s = c.sample
    assert (c.vae.depth, c.vae.resolution >> (len(c.vae.ch_mult) - 1)) == (1, 16)
    assert (s.revise_guidance, s.t_draft, s.t_revise, s.rounds) == (2.4, 256, 2, 2)


@pytest.mark.parametrize("preset", ["imagenet-256", "imagenet-371m", "imagenet-1.4b"])
def test_published_stage_one(preset):
    v = load_config(preset).vae
    assert (v.resolution, v.ch, v.ch_mult) == (256, 128, [1, 1, 2, 2, 4, 4])
    assert (v.num_res_blocks, v.attn_resolutions) == (2, [8])
    assert (v.z_channels, v.code_dim, v.codebook_size, v.depth) == (256, 256, 16384, 4)
    assert v.resolution >> (len(v.ch_mult) - 1) == 8
    assert (v.ema_decay, v.restart_below, v.commitment_weight, v.loss) == (0.99, 1.0, 0.25, "mse")
    assert (v.perceptual_weight, v.disc_weight, v.disc_layers, v.disc_ch) == (1.0, 0.75, 2, 64)
    assert (v.lr, v.betas, v.batch_size) == (4e-5, [0.5, 0.9], 128)
    epoch = 1_281_167 / 128
    assert abs(v.steps - 10 * epoch) <= 1 and abs(v.warmup - epoch / 2) <= 1


@pytest.mark.parametrize("text, value", [
    ("vae.lr=4e-5", 4e-5), ("vae.lr=1", 1.0), ("vae.steps=1e3", 1000), ("data.seed=010", 10),
    ("vae.ch_mult=[1, 2]", [1, 2]), ("vae.betas=[0,1e-1]", [0.0, 0.1]), ("vae.decay=True", True),
    ("vae.loss=l1", "l1"), ("transformer.cond=none", "none"), ("data.favour_class=007", "007")])
def test_overrides_take_the_bases_type_and_the_last_counts(text, value):
    section, key = text.partition("=")[0].split(".")
    result = getattr(getattr(load_config("smoke", ["vae.steps=7", "vae.lr=9", text]), section), key)
    assert result == value and type(result) is type(value)
    if isinstance(value, list):
        assert [type(v) for v in result] == [type(v) for v in value]


def test_learning_rate_warms_up_and_falls_to_zero():
    c = load_config("smoke", ["vae.steps=100", "vae.warmup=10", "vae.lr=2"]).vae
    rates = [learning_rate(step, c) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[10] == pytest.approx(2)
    assert all(a > b for a, b in zip(rates[10:], rates[11:])) and 0 < rates[-1] < 0.01
    assert rates[55] == pytest.approx(2 * (0.5 + 0.5 * math.cos(math.pi / 2)))
    assert [learning_rate(step, c, decay=False) for step in (10, 99)] == [2, 2]
