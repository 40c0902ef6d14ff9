"""Fixtures: tiny models, tiny data sets, and a script run as from the command line."""

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import common
import models

ROOT = Path(__file__).parent.parent
TINY = ["--dataset", "shapes", "--width", "8", "--epochs", "2", "--val-size", "20", "--batch-size",
        "16"]


@pytest.fixture
def model():
    """A small network whose BatchNorm statistics are not those of a fresh one."""
    torch.manual_seed(0)
    model = models.build_model("resnet10", 10, width=8)
    for _ in range(3):
        model(torch.rand(16, 3, 32, 32))
    return model


@pytest.fixture
def batch():
    torch.manual_seed(1)
    return torch.rand(6, 3, 32, 32), torch.arange(6)


@pytest.fixture
def folder(tmp_path):
    """A folder of pictures: 2 classes, 8 + 4 pictures of 32x32 each."""
    from PIL import Image
    rng = np.random.default_rng(0)
    for part, n in (("train", 8), ("test", 4)):
        for name in ("cat", "dog"):
            (tmp_path / "pets" / part / name).mkdir(parents=True)
            for i in range(n):
                picture = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(picture).save(tmp_path / "pets" / part / name / f"{i}.png")
    return tmp_path / "pets"


def data_options(dataset="shapes", data_dir="", val_size=1, **more):
    """What load_data needs to know, as if from the command line."""
    return argparse.Namespace(**dict(
        dataset=str(dataset), data_dir=str(data_dir), device="cpu", val_size=val_size,
        train_size=None, label_noise=0.0, image_size=None, stream=False, on_bad_file="stop") | more)


def command(script, *options, cwd, **kwargs):
    """Starts a script in a process of its own, in the folder `cwd`. It listens to Ctrl-C even where
    the tests themselves do not, as in the background of a shell."""
    return subprocess.Popen([sys.executable, ROOT / script, *map(str, options)], cwd=cwd, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=os.environ | {"PYTHONUNBUFFERED": "1"},
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
                            **kwargs)


@pytest.fixture
def small_shapes(monkeypatch):
    """Makes `shapes` 20 times smaller, for tests that train within this process."""
    import data
    draw = data.draw_shapes
    monkeypatch.setattr(data, "draw_shapes", lambda n, seed: draw(n // 20, seed))


@pytest.fixture
def script(monkeypatch, capsys, tmp_path, small_shapes):
    """script(module, *options) -> (exit status, stdout, stderr), in this process, in tmp_path. Its
    pictures are empty, as drawing them takes longer than training: see `drawn`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: Path(path).touch())

    def run(module, *options):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, options)])
        status = 0
        try:
            common.main(module.parse_args, getattr(module, "train", None) or module.main)
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()
    return run


@pytest.fixture
def drawn(script, monkeypatch, savefig=Figure.savefig):
    """For tests that look at the pictures."""
    monkeypatch.setattr(Figure, "savefig", savefig)
