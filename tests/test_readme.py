"""The Python of the README runs as it stands there."""

import re

import matplotlib
import torch
from conftest import ROOT, TINY, command

import fast_at

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_method_of_ones_own_trains_between_the_markers(tmp_path):
    own, = (block for block in BLOCKS if "# --- method ---" in block)
    source = (ROOT / "fast_at.py").read_text()
    indented = "".join(" " * 12 + line + "\n" for line in own.splitlines())
    changed = re.sub(r" {12}# --- method ---\n.*?# --- end of method ---\n", lambda _: indented,
                     source, count=1, flags=re.S)
    assert changed != source
    (tmp_path / "mine.py").write_text(changed)
    (tmp_path / "common.py").write_text((ROOT / "common.py").read_text())
    process = command(tmp_path / "mine.py", *TINY, cwd=tmp_path)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert list(tmp_path.glob("runs/mine-shapes-*/best.pt")), out


def test_the_python_of_the_coursework_section(script, tmp_path, monkeypatch, capsys):
    matplotlib.use("Agg")
    assert script(fast_at, *TINY, "--out", "runs/mine")[0] == 0
    names = {}
    for block in BLOCKS:
        if "# --- method ---" not in block:
            exec(block, names)
    assert names["classes"][0] == "disc" and not names["model"].training
    assert (names["x_adv"] - names["x"]).abs().max() <= 8 / 255 + 1e-6
    assert 0 <= names["robust"] <= names["clean"] <= 100 and "% under" in capsys.readouterr().out
    assert len(names["plt"].gcf().axes) == 3
    best = torch.load("runs/mine/best.pt", weights_only=True)
    assert "conv1.weight" in best["model"] and best["mean"].numel() == best["std"].numel() == 3
