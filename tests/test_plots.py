"""The pictures of the logs: what they hold, and what they leave out."""
import pytest
from PIL import Image

from tools import plots

VAE = ("step,reconstruction,val_psnr,perceptual,usage_1,usage_2,remark\n"
       "5,0.3,,0.0,0.5,0.25,warm\n10,0.2,14.5,0.0,0.5,,\n15,nan,,0.0\n")


def test_a_log_is_read_with_its_gaps_and_without_unknown_columns_its_curves_by_depth(tmp_path):
    (tmp_path / "vae.csv").write_text(VAE)
    log = plots.read_log(tmp_path / "vae.csv")
    assert "remark" not in log and log["step"] == [5, 10, 15]
    assert plots.points(log, "reconstruction", True) == [(5, 10), (0.3, 0.2)]
    assert plots.points(log, "val_psnr", False) == [(10,), (14.5,)]
    assert plots.points(log, "perceptual", False) is None            # 0 throughout
    assert plots.points(log, "lr", False) is None
    by_name = {panel[0]: plots.curves(panel, log) for panel in plots.PANELS["vae"]}
    assert [c[:2] for c in by_name["Codes in use"]] == [("usage_1", 1), ("usage_2", 2)]
    assert [c[2] for c in by_name["Reconstruction"]] == [False, True]
    assert by_name["Adversary"] == []


def test_a_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="pip install -r requirements-tools.txt")
    (tmp_path / "vae.csv").write_text(VAE)
    rows = "step,loss,loss_1,val_loss,grad_norm,lr\n1,3,3,,0.1,0.1\n2,2,2,2.5,0.2,0.1\n"
    (tmp_path / "transformer.csv").write_text(rows)
    with Image.open(plots.draw(tmp_path)) as both:
        assert min(both.size) > 500 and len(both.convert("RGB").getcolors(1 << 24)) > 50
        height = both.height
    (tmp_path / "transformer.csv").unlink()
    with Image.open(plots.draw(tmp_path, tmp_path / "new" / "one.png")) as one:
        assert one.height < height
    (tmp_path / "vae.csv").write_text("step,remark\n1,a\n")          # nothing to draw yet
    plots.draw(tmp_path)
    assert not list(tmp_path.glob(".*"))                              # no temporary files
