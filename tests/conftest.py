"""Fixtures: tiny models, tiny data sets, and a script run as from the command line."""

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # the tests are for the CPU, on every machine

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402

torch.backends.mps.is_available = lambda: False
TINY = ["--dataset", "shapes", "--epochs", "2", "--train-size", "64", "--val-size", "10",
        "--test-size", "20", "--batch-size", "16", "--precision", "fp32", "--device", "cpu"]


@pytest.fixture
def model():
    """A small network in train mode whose BatchNorm statistics are not those of a fresh one."""
    torch.manual_seed(0)
    model = common.Classifier("resnet10", 10, 16)
    for _ in range(3):
        model(torch.rand(16, 3, 32, 32))
    return model


@pytest.fixture
def batch():
    torch.manual_seed(1)
    return torch.rand(6, 3, 32, 32), torch.arange(6)


@pytest.fixture
def folder(tmp_path):
    """A folder of images: 2 classes, 8 + 4 images of 32x32 pixels each."""
    from PIL import Image
    rng = np.random.default_rng(0)
    for part, n in (("train", 8), ("test", 4)):
        for name in ("cat", "dog"):
            (tmp_path / "pets" / part / name).mkdir(parents=True)
            for i in range(n):
                image = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(image).save(tmp_path / "pets" / part / name / f"{i}.png")
    return tmp_path / "pets"


def data_options(dataset="shapes", data_dir="", val_size=1, **more):
    """What common.load_data needs to know, as if from the command line."""
    return argparse.Namespace(**dict(
        dataset=str(dataset), data_dir=str(data_dir), device="cpu", val_size=val_size, seed=0,
        train_size=None, test_size=None, image_size=None, label_noise=0, no_flip=False) | more)


def command(script, *options, cwd, **kwargs):
    """Starts a script in a process of its own, in the folder `cwd`."""
    return subprocess.Popen([sys.executable, ROOT / script, *map(str, options)], cwd=cwd, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=os.environ | {"PYTHONUNBUFFERED": "1"}, **kwargs)


@pytest.fixture
def script(monkeypatch, capsys, tmp_path):
    """script(module, *options) -> (exit status, stdout, stderr), in this process, in tmp_path. Its
    pictures are empty, as drawing them takes longer than training: see `drawn`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: Path(path).touch())
    handler = signal.getsignal(signal.SIGINT)

    def run(module, *options):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, options)])
        status = 0
        try:
            (getattr(module, "train", None) or module.main)(module.parse_args())
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()
    yield run
    signal.signal(signal.SIGINT, handler)


@pytest.fixture
def drawn(script, monkeypatch, savefig=Figure.savefig):
    """For tests that look at the pictures."""
    monkeypatch.setattr(Figure, "savefig", savefig)


def method_lines(module):
    """The lines between the method's markers inside the loop of a script, as code."""
    import inspect
    import textwrap
    source = inspect.getsource(module.train)
    loop = source[source.index("for i, (x, y)"):]
    lines = loop.split("# --- method ---\n")[1].split("            # --- end of method ---")[0]
    return compile(textwrap.dedent(lines), module.__name__, "exec")


def method_loss(module, model, x, y, args, **more):
    """The loss that a script computes for one batch, by its own lines between the markers."""
    names = vars(module) | dict(model=model, x=x, y=y, args=args, i=1, recover=False) | more
    exec(method_lines(module), names)
    return names["loss"]
