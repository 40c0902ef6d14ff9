"""Runs from the command line: what they write, determinism, resuming, bad input, and the README."""

import argparse
import csv
import functools
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib.figure
import matplotlib.image
import pytest
import torch

import backward_smoothing
import common
import fast_at
import fast_bat
import kd_swa
import trades
from conftest import ROOT, TINY, command, data_options

SCRIPTS = [fast_at, trades, backward_smoothing, fast_bat, kd_swa]
PETS = "--dataset pets --epochs 2 --val-size 4 --batch-size 4 --precision fp32".split()
each_script = pytest.mark.parametrize("module", SCRIPTS, ids=lambda module: module.__name__)
draw_shapes = functools.cache(common.draw_shapes)


@pytest.fixture(autouse=True)
def shapes_are_drawn_once(monkeypatch):
    monkeypatch.setattr(common, "draw_shapes", draw_shapes)


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def one_line(outcome, pattern):
    status, _, err = outcome
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    assert re.search(pattern, err), err


def interrupted(monkeypatch, script, at, *run):
    """Runs a script, and presses Ctrl-C at the start of an epoch, counted from 1 over all runs."""
    start, countdown = common.Run.start_epoch, iter([*[False] * (at - 1), True])

    def start_epoch(run):
        if next(countdown):
            signal.raise_signal(signal.SIGINT)
        start(run)
    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "start_epoch", start_epoch)
        return script(*run)


# ------------------------------------------------------------------------------------ what a run is
def test_a_run_folder_holds_all_it_should(script, drawn, tmp_path):
    status, out, err = script(backward_smoothing, *TINY, "--seed", 3, "--eps", 4)
    assert status == 0, err
    folder = tmp_path / "runs/backward_smoothing-shapes-resnet10-eps4-seed3"
    assert sorted(path.name for path in folder.iterdir()) == [
        "args.json", "best.pt", "curves.png", "last.pt", "log.csv", "result.json"]
    image = matplotlib.image.imread(folder / "curves.png")
    assert min(image.shape[:2]) > 300 and image[..., :3].std() > 0.02  # not blank
    rows = list(csv.DictReader((folder / "log.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2"] and float(rows[1]["seconds"]) > 0
    about = json.loads((folder / "args.json").read_text())
    assert about["args"]["width"] == 16 and about["args"]["eps"] == 4 / 255
    assert about["versions"]["torch"] == torch.__version__ and "--seed" in about["command"]
    result = json.loads((folder / "result.json").read_text())
    best, last = result["best"], result["last"]
    assert last["epoch"] == 2 and result["n_test"] == 20
    assert best["val_pgd"] == max(float(row["val_pgd"]) for row in rows)
    for line in (".*64 training, 10 held-out, 20 test images", r" +2 +0\.\d+ +\d", r"best +\d",
                 "last +2 ", rf"difference +{best['test_clean'] - last['test_clean']:.2f} "):
        assert re.search(f"^{line}", out, re.M), line

    # What it says can be computed from best.pt alone.
    model, checkpoint = common.load_model(folder / "best.pt")
    assert not model.training and checkpoint["classes"] == list(common.SHAPES)
    test = common.load_data(data_options(test_size=20)).test
    assert common.accuracy(model, *test, 4 / 255) == (best["test_clean"], best["test_pgd"])

    # And best.pt needs none of our code: the normalisation stands beside the weights.
    content = torch.load(folder / "best.pt", weights_only=True)
    x = common.load_data(data_options(val_size=10, train_size=64)).train
    x = x[0][x[2]].double() / 255
    for name, value in (("mean", x.mean((0, 2, 3))), ("std", x.std((0, 2, 3)))):
        assert torch.allclose(content[name].flatten().double(), value, atol=1e-4)


def test_no_run_is_overwritten_and_the_same_seed_gives_the_same_weights(script, tmp_path):
    name, found = "runs/fast_at-shapes-resnet10-eps8-seed", []
    for seed, folder in ((0, f"{name}0"), (0, f"{name}0-2"), (1, f"{name}1")):
        out = script(fast_at, *TINY, "--epochs", 1, "--seed", seed)[1]
        assert out.endswith(f" {Path(folder)}\n")
        found.append(weights(tmp_path / folder / "last.pt"))
    assert equal(found[0], found[1]) and not equal(found[0], found[2])
    with ThreadPoolExecutor(8) as pool:  # as many at once
        claim = functools.partial(common.claim_folder, None, f"{name[5:]}0")
        assert set(pool.map(claim, ["args.json"] * 8)) == {f"{name}0-{i}" for i in range(3, 11)}
    outcome = script(fast_at, *TINY, "--out", f"{name}0")
    one_line(outcome, "is taken: choose another --out.*--resume")
    assert equal(weights(tmp_path / f"{name}0/last.pt"), found[0])


@pytest.mark.parametrize("steps, held_out, test, best, warning", [
    (1, [(90, 60), (80, 50)], 60, 1, None), (1, [(90, 50), (80, 60)], 60, 2, None),
    (1, [(90, 60), (90, 30)], 60, 1, "catastrophic overfitting"),
    (1, [(90, 50), (90, 60)], 11, None, "best.pt is hardly better than chance"),
    (0, [(50, 2), (60, 1)], 60, 2, None)])  # no epoch of standard training is robust
def test_best_pt_and_warnings(monkeypatch, script, tmp_path, steps, held_out, test, best, warning):
    results = iter([*held_out, (test, 10), (test, 10)])
    monkeypatch.setattr(common, "accuracy", lambda *args, **kwargs: next(results))
    out = script(fast_at, *TINY, "--val-size", 100, "--out", "run", "--steps", steps)[1]
    content = torch.load(tmp_path / "run/best.pt", weights_only=True)
    assert best in (None, content["epoch"]) and content["rows"][-1]["epoch"] == content["epoch"]
    warnings = re.findall("^warning: (.*)", out, re.M)
    assert warning in warnings[0] if warning else not warnings


def test_the_progress_is_what_is_done_and_the_time_left(monkeypatch, capsys):
    clock = types.SimpleNamespace(perf_counter=iter(range(0, 120, 30)).__next__)  # 30 s an item
    monkeypatch.setattr(common, "time", clock)
    assert list(common.progress("abc", "step", done=1, total=5)) == ["a", "b", "c"]
    assert [" ".join(line.split()) for line in capsys.readouterr().err.splitlines()] == [
        "step 2/5, 1:30 left", "step 3/5, 1:00 left", "step 4/5, 0:30 left"]


def test_what_fails_after_the_training_is_only_a_warning(monkeypatch, script, tmp_path):
    """Curves that cannot be drawn, a log that a spreadsheet has locked."""
    def broken(*args, **kwargs):
        raise RuntimeError("no TeX here")

    def locked(path, *args, **kwargs):
        if Path(path).name == "log.csv":
            raise PermissionError(path)
        return open(path, *args, **kwargs)
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", broken)
    monkeypatch.setattr(common, "open", locked, raising=False)
    status, out, _ = script(fast_at, *TINY, "--epochs", 1, "--out", "run")
    assert status == 0 and "warning: curves.png could not be drawn: no TeX here" in out
    assert json.loads((tmp_path / "run/result.json").read_text())["last"]["epoch"] == 1


# -------------------------------------------------------------------------------------- the options
SMOKE = [  # every option of every script, with a value that is not its default
    (fast_at, "--steps 2 --alpha 3 --init zero --grad-align 0.2 --recover --keep-epochs"),
    (fast_at, "--steps 0 --activation swish --arch preactresnet18 --no-flip --image-size 32"),
    (fast_at, "--norm l2 --eps 128 --milestones 0.2 0.9 --lr-schedule piecewise --compile"),
    (fast_at, "--init noise --attack-bn eval --precision fp16 --train-size 4 --batch-size 4"),
    (fast_at, "--seed 2 --device cpu --width 24 --lr 0.05 --lr-schedule cosine --weight-decay 0"),
    (trades, "--steps 2 --alpha 3 --init uniform --beta 2 --norm l2 --eps 128 --attack-bn train"),
    (trades, "--steps 1 --data-dir elsewhere --label-noise 0.2"),
    (backward_smoothing, "--gamma 2 --beta 5 --alpha 6 --random-points 3 --attack-bn train"),
    (backward_smoothing, "--alone --precision bf16 --arch vgg16"),
    (backward_smoothing, "--objective ce --arch wrn-16-8 --width 16"),
    (fast_bat, "--linearization pgd --lmbda 0.1 --alpha2 0.02 --hessian-aware"),
    (fast_bat, "--linearization uniform --eps 16 --precision bf16 --activation softplus"),
    (fast_bat, "--linearization corner --attack-bn eval"),
    (kd_swa, "--attack trades --steps 2 --alpha 3 --beta 2 --kd adv --lambda1 0.4 --temperature 3 "
             "--teacher-epochs 1 --iswa --milestones 0 --lr-schedule piecewise"),
    (kd_swa, "--attack fgsm --kd std --lambda2 0.4 --teacher-epochs 1 --no-swa --norm l2"),
    (kd_swa, "--tf-kd --label-smoothing 0.1 --steps 1 --precision bf16")]


@pytest.mark.parametrize("module, options", SMOKE, ids=lambda v: getattr(v, "__name__", v))
def test_every_script_runs_with_its_options(script, tmp_path, monkeypatch, module, options):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    status, out, err = script(module, *TINY, *"--epochs 1 --train-size 32 --val-size 10 --test-size"
                              " 20 --out run".split(), *options.split())
    assert status == 0, err
    assert ("--keep-epochs" in options) == (tmp_path / "run/epoch-1.pt").exists()
    for path in (tmp_path / "run").glob("*.pt"):
        assert all(value.isfinite().all() for value in weights(path).values())


class Recorder(argparse.Namespace):
    """Remembers which options were asked for."""
    read = set()

    def __getattribute__(self, name):
        Recorder.read.add(name)
        return super().__getattribute__(name)


@each_script
def test_every_option_is_read(module, monkeypatch, script, folder):
    def parse_args():
        more = ["--teacher-epochs", "1", "--steps", "1"] if module is kd_swa else []
        args = module.parse_args([*PETS, "--lr-schedule", "piecewise", *more])
        Recorder.read.clear()
        return Recorder(**vars(args))
    assert script(types.SimpleNamespace(__name__=module.__name__, train=module.train,
                                        parse_args=parse_args))[0] == 0
    assert not vars(module.parse_args(PETS)).keys() - Recorder.read


def test_the_defaults_of_shapes(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    found = []
    for words in (["--dataset", "shapes", "--help"], ["-h"]):
        with pytest.raises(SystemExit, match="^0$"):
            fast_at.parse_args(words)
        text = " ".join(capsys.readouterr().out.split())
        found.append([re.search(rf"--{name} .*?\(default: (.*?)\)", text)[1]
                      for name in ("arch", "width", "epochs", "batch-size")])
    small = common.small_preset("shapes")
    assert found[0] == [str(small[name]) for name in ("arch", "width", "epochs", "batch_size")]
    args = fast_at.parse_args(["--dataset", "shapes", "--epochs", "9"])
    assert (args.epochs, args.width) == (9, small["width"])
    assert args.no_flip and fast_at.parse_args(["--dataset", "svhn"]).no_flip
    for name in ("cifar-10", "CIFAR10"):
        other = fast_at.parse_args(["--dataset", name])
        assert other.dataset == "cifar10" and not other.no_flip
    for eps in ("8", "8/255", "0.5/255"):
        assert fast_at.parse_args(["--eps", eps]).eps == float(eps.removesuffix("/255")) / 255
    assert fast_at.parse_args(["--norm", "l2"]).eps == 128 / 255


def test_the_defaults_of_a_folder_and_of_the_precision(monkeypatch, folder):
    for native, precision in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
        args = fast_at.parse_args(["--dataset", str(folder), "--device", "cpu"])
        assert args.precision == precision
    assert (args.arch, args.epochs, args.val_size, args.batch_size) == ("resnet10", 100, 1, 4)
    monkeypatch.setattr(common, "list_folder", lambda *_: ((range(5000), None), None, None))
    assert common.small_preset("photos").items() >= dict(epochs=6, val_size=500).items()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert common.small_preset("photos") == {}


# ------------------------------------------------------------------------- the scripts side by side
def loop(module):
    """train() and what follows, without the lines that are marked as the method's."""
    source, marked = Path(module.__file__).read_text(), r"^ *# --- method ---\n(.*\n)*?.*end of.*\n"
    return re.sub(marked, "", source[source.index("def train(args):"):], flags=re.M)


@each_script
def test_every_script_has_the_same_order_and_the_same_loop(module):
    assert loop(module) == loop(fast_at) and len(loop(module).splitlines()) > 25
    source = Path(module.__file__).read_text()
    parts = ['"""', "import torch\n", "import common\n", "def parse_args(argv=None):",
             "def train(args):", "# --- method ---", 'if __name__ == "__main__":']
    places = [source.index(part) for part in parts]
    assert places == sorted(places)
    assert "Compared with fast_at.py:" in source or module is fast_at
    assert f"python {module.__name__}.py --eps 8" in module.__doc__
    ours = {path.stem for path in ROOT.glob("*.py")}
    assert ours & set(re.findall(r"^\s*(?:import|from) (\w+)", source, re.M)) == {"common"}


def test_sizes():
    lines = {path: path.read_text("utf-8").splitlines() for path in ROOT.rglob("*.py")
             if path.parent in (ROOT, ROOT / "tests")}
    assert max(len(lines[Path(module.__file__)]) for module in SCRIPTS) <= 195
    assert len(lines[ROOT / "common.py"]) <= 800 and len(lines[ROOT / "evaluate.py"]) <= 660
    assert sum(len(text) for path, text in lines.items() if path.parent != ROOT) <= 3300
    for path, text in lines.items():
        assert not [number for number, line in enumerate(text, 1) if len(line) > 100], path
    readme = (ROOT / "README.md").read_bytes()
    assert readme.count(b"\n") <= 260 and len(readme) <= 16 * 1024
    assert {path.stem for path in ROOT.glob("*.py")} == {
        "attacks", "common", "evaluate", *(module.__name__ for module in SCRIPTS)}


def test_each_script_runs_in_a_folder_with_common_alone(tmp_path):
    """In one process. Some of torchrun's variables are set, and the console lacks characters."""
    for name in (module.__name__ for module in SCRIPTS):
        (tmp_path / name).mkdir()
        shutil.copy(ROOT / f"{name}.py", tmp_path / name)
        shutil.copy(ROOT / "common.py", tmp_path / name)
    program = ("import os, runpy, sys\n"
               "for name in os.listdir():\n"
               "    os.chdir(name)\n"
               "    sys.argv = [f'{name}.py', *sys.argv[1:]]\n"
               "    runpy.run_path(sys.argv[0], run_name='__main__')\n"
               "    assert os.path.samefile(sys.modules.pop('common').__file__, 'common.py')\n"
               "    os.chdir('..')\n")
    words = [*TINY, *"--epochs 1 --train-size 16 --test-size 10 --out là".split()]
    done = subprocess.run([sys.executable, "-c", program, *words], cwd=tmp_path, text=True,
                          capture_output=True, env=os.environ | dict(
                              PYTHONIOENCODING="ascii", TORCHELASTIC_RUN_ID="x", RANK="1",
                              WORLD_SIZE="4"))
    assert done.returncode == 0, done.stderr
    for name in (module.__name__ for module in SCRIPTS):
        result = json.loads((tmp_path / name / "là/result.json").read_text())
        assert result["n_test"] == 10


def test_fine_tuning_starts_from_the_weights_of_another_run(script, tmp_path, folder, monkeypatch):
    """All of them or, for other classes, all but the last layer's; a rate of 1e-9 keeps them."""
    script(fast_at, *TINY, "--epochs", 1, "--out", "start")
    start = weights(tmp_path / "start/best.pt")
    tune = ["--init-from", "start/best.pt", "--lr", 1e-9]
    for data, last in ((TINY, "same"), (PETS, "new")):
        assert script(fast_at, *data, *tune, "--out", last)[0] == 0
        found = weights(tmp_path / last / "best.pt")
        for name in ("conv1.weight", "layer4.0.bn2.weight", *["linear.weight"] * (last == "same")):
            assert torch.allclose(found[name], start[name], atol=1e-6), name
    assert found["linear.weight"].shape == (2, 128)
    monkeypatch.setattr(common, "SHAPES", dict(reversed(common.SHAPES.items())))
    script(fast_at, *TINY, *tune, "--out", "order")  # the same classes in another order
    assert not torch.allclose(weights(tmp_path / "order/best.pt")["linear.bias"],
                              start["linear.bias"], atol=1e-3)
    for words in ("--width 24", "--image-size 128", "--activation swish"):
        one_line(script(fast_at, *PETS, *tune, *words.split()), "holds another .*'width': 16")


# -------------------------------------------------------------------------- kd_swa and its teachers
KD = [*TINY, *"--teacher-epochs 1 --steps 1 --train-size 32 --val-size 10 --test-size 10".split()]


def test_kd_swa_saves_and_evaluates_the_plain_and_the_averaged_network(script, tmp_path, folder):
    status, out, err = script(kd_swa, *KD, "--out", "run", "--epochs", 4)
    assert status == 0, err
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert {"best", "last", "swa_best", "swa_last"} <= result.keys()
    rows = list(csv.DictReader((tmp_path / "run/log.csv").open()))
    found = [float(row["swa_val_pgd"]) for row in rows if row.get("swa_val_pgd")]
    assert len(found) == 2 and not rows[0].get("swa_val_pgd")  # from half-way on
    assert [result[f"swa_{k}"]["val_pgd"] for k in ("last", "best")] == [found[-1], max(found)]
    assert re.search(r"^swa_best +\d", out, re.M) and out.count("first the") == 2
    mean = weights(tmp_path / "run/swa_last.pt")

    # Its teachers can be used again, and were trained as they should be, also if resumed.
    assert script(kd_swa, *"--resume --out run/std-teacher --epochs 1".split())[0] == 0
    about = [json.loads((tmp_path / f"run/{kind}-teacher/args.json").read_text())["args"]
             for kind in ("adv", "std")]
    assert [a["steps"] for a in about] == [1, 0] and [a["epochs"] for a in about] == [1, 1]
    given = "--adv-teacher run/adv-teacher/best.pt --std-teacher run/std-teacher/best.pt".split()
    status, out, _ = script(kd_swa, *KD, "--out", "again", "--epochs", 4, *given)
    assert status == 0 and "first the" not in out
    assert equal(weights(tmp_path / "again/swa_last.pt"), mean)
    one_line(script(kd_swa, *PETS, *given), "adv-teacher/best.pt .*other classes")
    one_line(script(kd_swa, *KD, "--adv-teacher", "none.pt"), "none.pt")


def test_kd_swa_resumes_in_the_right_phase(script, tmp_path, monkeypatch):
    """After Ctrl-C in the first teacher, in the second, and in the third epoch of three."""
    options = [*KD, "--epochs", 3, "--milestones", 0.3, "--lr-schedule", "piecewise", "--out"]
    script(kd_swa, *options, "whole")
    for moment in (1, 2, 5):
        outcome = interrupted(monkeypatch, script, moment, kd_swa, *options, f"run{moment}")
        one_line(outcome, "interrupted; to go on, repeat with --resume$")
        status, out, err = script(kd_swa, "--resume", "--out", f"run{moment}")
        assert status == 0, err
        assert out.count("first the") == max(0, 3 - moment)  # a finished teacher stays as it is
        for name in ("last.pt", "swa_last.pt", "adv-teacher/best.pt", "std-teacher/last.pt"):
            assert equal(weights(tmp_path / f"run{moment}" / name),
                         weights(tmp_path / "whole" / name)), (moment, name)


# ----------------------------------------------------------------------------------------- resuming
def test_a_run_is_resumed_with_its_own_settings(script, tmp_path, monkeypatch):
    options = [*TINY, "--seed", 3, "--lr", 0.05, "--init", "zero"]
    script(fast_at, *options, "--out", "whole")
    outcome = interrupted(monkeypatch, script, 2, fast_at, *options)
    name = "runs/fast_at-shapes-resnet10-eps8-seed3"
    one_line(outcome, "interrupted; to go on, repeat with --resume$")
    for copy in ("again", "runs/fast_at-z"):
        shutil.copytree(tmp_path / name, tmp_path / copy)
    os.utime(tmp_path / "runs/fast_at-z/args.json", (0, 0))  # an old run is not the newest one
    resume = ["--resume", "--out", name]
    one_line(script(fast_at, *resume, "--lr", 0.2), "--lr differs from .*omit it")
    one_line(script(trades, *resume), f"no run of trades.py to resume in {name}")
    one_line(script(trades, "--resume"), "no run of trades.py to resume in runs")
    for more in ([], ["--out", "again/", "--lr", 0.05, "--eps", 8]):  # at first the newest run
        status, _, err = script(fast_at, "--resume", *more)
        assert status == 0, err
    assert not (tmp_path / "runs/fast_at-z/result.json").exists()
    for path in (tmp_path / name, tmp_path / "again"):
        assert equal(weights(path / "last.pt"), weights(tmp_path / "whole/last.pt"))
        logs = [[(row["epoch"], row["val_pgd"]) for row in csv.DictReader((run / "log.csv").open())]
                for run in (path, tmp_path / "whole")]
        assert logs[0] == logs[1]


def test_a_run_goes_on_with_more_epochs_and_with_the_data_at_another_path(script, tmp_path, folder):
    options = [*PETS, "--lr-schedule", "piecewise", "--milestones", 1, "--out"]
    script(fast_at, *options, "whole")
    script(fast_at, *options, "run", "--epochs", 1)
    folder.rename(tmp_path / "moved")
    one_line(script(fast_at, "--resume", "--out", "run"), "pets is not a folder")
    status, _, err = script(fast_at, *"--resume --out run --epochs 2 --dataset moved".split())
    assert status == 0, err
    assert equal(weights(tmp_path / "run/last.pt"), weights(tmp_path / "whole/last.pt"))
    for part in ("train", "test"):
        (tmp_path / "moved" / part / "cat").rename(tmp_path / "moved" / part / "mouse")
    common.list_folder.cache_clear()
    for n, why in ((1, "more epochs"), (3, "other classes")):
        one_line(script(fast_at, *f"--resume --out run --dataset moved --epochs {n}".split()), why)


def test_killed_at_any_moment_a_run_resumes_to_the_same_weights(script, tmp_path):
    options = [*TINY, *"--epochs 4 --tf-kd --steps 1 --val-size 10 --test-size 10 --out".split()]
    start = time.perf_counter()
    script(kd_swa, *options, "whole")
    length, moment = time.perf_counter() - start, random.random()
    process = command("kd_swa.py", *options, "run", cwd=tmp_path)
    while process.poll() is None and not any(  # until the run has begun
            path.stat().st_size for path in tmp_path.glob("run/args.json")):
        time.sleep(0.01)
    time.sleep(moment * length)
    process.kill()
    process.communicate()
    status, _, err = script(kd_swa, "--resume", "--out", "run")
    assert status == 0, err
    for path in (tmp_path / "whole").glob("*.pt"):
        assert equal(weights(path), weights(tmp_path / "run" / path.name)), (path, moment)


# -------------------------------------------------------------------------------- several processes
def shared_work():
    """What each process of test_two_processes... does: by method, the losses on its share of each
    batch, of the same images and noise however many processes there are, with BatchNorm in eval
    mode; then which of 40 images withstand an attack, and which of them it has attacked."""
    rand, randn, randint, losses, seen = torch.rand, torch.randn, torch.randint, {}, []
    start_epoch, scale = common.Run.start_epoch, torch.amp.GradScaler.scale
    generator = torch.Generator().manual_seed(0)

    def share(shape, draw, *args):
        """This process's part of what is drawn for a whole batch of 8."""
        axis = list(shape).index(8 // common.WORLD)
        whole = draw(*args, [*shape[:axis], 8, *shape[axis + 1:]], generator=generator)
        return whole.unflatten(axis, (-1, common.WORLD)).select(axis + 1, common.RANK)

    def start(run):
        start_epoch(run)
        run.state["model"].eval()
        patch.setattr(torch, "rand", lambda *shape, device: share(shape, rand))
        patch.setattr(torch, "randint", lambda high, shape, device: share(shape, randint, high))
        patch.setattr(torch, "randn_like", lambda x: share(x.shape, randn))
        patch.setattr(torch.Tensor, "uniform_", lambda x, low=0, high=1, generator=None:
                      x.copy_(low + (high - low) * share(x.shape, rand)))

    def record(scaler, loss):
        losses[method].append(loss.item())
        return scale(scaler, loss)
    for method, words in (("fast_at", "--grad-align 0.2"), ("trades", "--steps 2"),
                          ("backward_smoothing", ""), ("fast_bat", "--hessian-aware"),
                          ("kd_swa", "--tf-kd --steps 2")):
        losses[method], module = [], next(m for m in SCRIPTS if m.__name__ == method)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(TypeError, match="NoneType"):
            patch.setattr(common.Run, "start_epoch", start)
            patch.setattr(common.Run, "end_epoch", None)  # which cannot be called: the end
            patch.setattr(torch.amp.GradScaler, "scale", record)
            module.train(module.parse_args([
                *TINY, *words.split(), *"--batch-size 8 --train-size 32 --epochs 1".split(),
                *f"--attack-bn eval --activation softplus --out {common.WORLD}-{method}".split()]))
    torch.manual_seed(0)
    model, (x, y) = common.Classifier("resnet10", 10, 16), common.draw_shapes(40, 0)

    def attack(model, x, y):
        seen.extend(x.sum((1, 2, 3)).tolist())
        return common.pgd_attack(model, x, y, 8 / 255, 2 / 255, 2, start="zero")
    y = model.eval()(x / 255).argmax(1).where(torch.arange(40) > 3, y)  # not all attacked
    correct = common.still_correct(model, x, y, lambda model, x, y: x, attack, batch_size=7)
    Path(f"{common.WORLD}-{common.RANK}.json").write_text(json.dumps(
        [losses, correct.tolist(), seen]))


def test_two_processes_have_the_losses_of_one_and_share_the_evaluation(script, tmp_path):
    """And train kd_swa's two teachers and their pupil: one folder, and what one of them prints."""
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                           "--nproc_per_node=2", __file__, *KD], text=True, capture_output=True,
                          timeout=300, env=os.environ | dict(PYTHONPATH=str(ROOT), USE_LIBUV="0"))
    assert done.returncode == 0, done.stderr
    shared_work()
    (one, correct, seen), *two = (json.loads(Path(f"{name}.json").read_text())
                                  for name in ("1-0", "2-0", "2-1"))
    for method, losses in one.items():
        assert len(losses) == 4 and losses[0] != losses[-1]
        means = [(a + b) / 2 for a, b in zip(two[0][0][method], two[1][0][method], strict=True)]
        assert means == pytest.approx(losses, rel=1e-4), method
    assert two[0][1] == two[1][1] == correct and 0 < sum(correct) < 40
    assert 36 <= len(seen) < 40 and abs(len(two[0][2]) - len(two[1][2])) <= 1
    assert sorted(two[0][2] + two[1][2]) == pytest.approx(sorted(seen))
    assert done.stdout.count("10 test images  epoch") == 3
    run, = (tmp_path / "runs").iterdir()
    for name in ("last.pt", "swa_last.pt", "adv-teacher/best.pt"):
        assert all(value.isfinite().all() for value in weights(run / name).values())


# ---------------------------------------------------------------------------------------- bad input
BAD = [
    (fast_at, "--dataset imagenet-99", "imagenet-99 is not a folder, nor one of cifar10, .*shapes"),
    (fast_at, "--dataset ./shapes", "./shapes is not a folder"),
    (fast_at, "--arch resnet19", "resnet19.*resnet18"), (fast_at, "--nonsense 1", "nonsense"),
    (fast_at, "--eps 0.031", "did you mean 7.905/255, or"), (fast_at, "--lr 0", "--lr"),
    (fast_at, "--eps 0.5 --norm l2", "did you mean 127.5/255, or"),
    (fast_at, "--eps -3", "--eps.*-3"), (fast_at, "--eps nan", "--eps.*nan"),
    (fast_at, "--eps eight", "--eps.*eight"), (fast_at, "--alpha 0.0078", "did you mean 1.989"),
    (fast_at, "--width 8", "--width.*8 is not between 16"), (fast_at, "--epochs 0", "--epochs"),
    (trades, "--steps 0", "--steps"), (fast_at, "--val-size 2200", "--val-size .*2200"),
    (fast_at, "--test-size 1001", "--test-size .*1000"), (trades, "--beta inf", "--beta"),
    (fast_at, "--batch-size 65", "--batch-size must be at most 64"),
    (fast_at, "--device cuda", "no cuda on this machine"),
    (fast_at, "--init normal", "--init.*uniform"), (fast_at, "--init noise --steps 2", "N-FGSM"),
    (fast_at, "--init noise --norm l2", "--init noise is N-FGSM"),
    (fast_at, "--grad-align 1 --compile", "--grad-align.*--compile"),
    (backward_smoothing, "--random-points 0", "--random-points"),
    (fast_bat, "--norm l2", "--norm: Fast-BAT is defined for linf"),
    (fast_bat, "--compile", "Fast-BAT.*--compile"), (kd_swa, "--iswa --no-swa", "--iswa.*--no-swa"),
    (kd_swa, "--lambda1 0.7 --lambda2 0.7", "--lambda1 and --lambda2 add up to more than 1"),
    (kd_swa, "--tf-kd --kd none --lambda1 0.8", "--lambda1 and --lambda2 add up to more than 1"),
]


@pytest.mark.parametrize("module, options, message", BAD, ids=lambda v: getattr(v, "__name__", v))
def test_bad_options_get_one_line_and_status_2(script, tmp_path, module, options, message):
    one_line(script(module, *TINY, *options.split()), message)
    assert not (tmp_path / "runs").exists()  # nothing is left behind


def test_a_loss_that_is_not_finite_ends_the_run(script, tmp_path, monkeypatch):
    genuine, calls = fast_at.fast_at, []

    def attack(*args):
        calls.append(1)
        return genuine(*args) * (torch.nan if len(calls) > 5 else 1)  # in the second epoch
    monkeypatch.setattr(fast_at, "fast_at", attack)
    one_line(script(fast_at, *TINY, "--out", "run"), "loss is nan.*--lr")
    content = torch.load(tmp_path / "run/last.pt", weights_only=True)
    assert content["epoch"] == 1 and all(w.isfinite().all() for w in content["model"].values())


# ------------------------------------------------------------------------------------ the benchmark
def test_the_benchmark_prints_a_row_for_each_method(monkeypatch, capsys):
    import benchmark
    words = "--arch resnet10 --width 16 --batch-size 2 --steps 1 --precision fp32"
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *words.split()])
    benchmark.main()
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row[:22].strip() for row in rows] == list(benchmark.METHODS)


# --------------------------------------------------------------------------------------- the README
README = (ROOT / "README.md").read_text("utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)
BLOCKS = re.findall(r"^```sh\n(.*?)^```", README, re.M | re.S)
SCRIPT_CALL = r"\b(?:fast_at|trades|backward_smoothing|fast_bat|kd_swa|evaluate)\.py\b[^&|;#`\n]*"


def test_the_readmes_commands_are_valid(monkeypatch, tmp_path, folder):
    """In its code blocks, and in the text where `SCRIPT --option` stands in backquotes."""
    import evaluate
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "saved_settings", lambda args: {})  # for --resume
    lines = "\n".join(BLOCKS).replace("\\\n", " ")
    calls = re.findall(rf"(?:python|torchrun\b.*?) ({SCRIPT_CALL})", lines)
    calls += re.findall(rf"`({SCRIPT_CALL})`", README)
    for call in calls:
        name, *words = shlex.split(call)
        for word, value in zip(words, words[1:]):
            if word == "--dataset" and value not in common.DATASETS:  # the reader's own images
                shutil.copytree(folder, tmp_path / value, dirs_exist_ok=True)
        module = {f"{m.__name__}.py": m for m in (*SCRIPTS, evaluate)}[name]
        module.parse_args(words or ["some.pt"] * (module is evaluate))
    for part in BLOCKS[0].strip().replace("&&", "\n").splitlines():
        assert part.strip() in (ROOT / ".ci/run").read_text()
    assert {call.split(".")[0] for call in calls} == {"evaluate", *(m.__name__ for m in SCRIPTS)}


def test_the_readmes_options_exist():
    known = {option for path in (*ROOT.glob("*.py"), *ROOT.glob("tests/[bc]*.py"))
             for option in re.findall(r'"(--[a-z][a-z0-9-]+)"', path.read_text())}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]+", README))
    assert len(known) > 60 and not named - known - {"--nproc_per_node", "--help"}


def test_the_method_of_ones_own_trains_between_the_markers(tmp_path):
    own, = (block for block in PYTHON if "# --- method ---" in block)
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
    for block in PYTHON:
        if "# --- method ---" not in block:
            exec(block, names)
    assert names["classes"][0] == "disc" and not names["model"].training
    assert (names["x_adv"] - names["x"]).abs().max() <= 8 / 255 + 1e-6
    assert 0 <= names["robust"] <= names["clean"] <= 100 and "% under" in capsys.readouterr().out
    assert names["plt"].gca().images[0].get_array().shape == (32, 96, 3)


if __name__ == "__main__":  # one of torchrun's processes
    common.draw_shapes = draw_shapes
    shared_work()
    kd_swa.train(kd_swa.parse_args(sys.argv[1:]))
