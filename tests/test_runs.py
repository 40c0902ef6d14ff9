"""Runs from the command line: what they write, determinism, resuming, and every bad input."""

import argparse
import csv
import difflib
import functools
import itertools
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest
import torch

import backward_smoothing
import bookkeeping
import common
import data
import evaluate
import fast_at
import fast_bat
import kd_swa
import trades
from conftest import ROOT, TINY, command, data_options

SCRIPTS = [fast_at, trades, backward_smoothing, fast_bat, kd_swa]


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


# ------------------------------------------------------------------------------------ what a run is

def test_a_run_folder_holds_all_it_should(script, drawn, tmp_path):
    status, out, _ = script(backward_smoothing, *TINY, "--seed", 3, "--eps", 4)
    folder = tmp_path / "runs/backward_smoothing-shapes-resnet10-eps4-seed3"
    assert status == 0
    assert sorted(p.name for p in folder.iterdir()) == [
        "args.json", "best.pt", "curves.png", "last.pt", "log.csv", "result.json"]
    picture = matplotlib.image.imread(folder / "curves.png")
    assert min(picture.shape[:2]) > 300 and picture[..., :3].std() > 0.02  # not blank
    rows = list(csv.DictReader((folder / "log.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2"] and float(rows[1]["seconds"]) > 0
    about = json.loads((folder / "args.json").read_text())
    assert about["args"]["width"] == 8 and about["args"]["eps"] == 4 / 255
    assert about["versions"]["torch"] == torch.__version__ and "--seed 3" in about["command"]
    result = json.loads((folder / "result.json").read_text())
    best, last = result["best"], result["last"]
    assert last["epoch"] == 2 and result["n_test"] == 50
    assert best["val_pgd"] == max(float(row["val_pgd"]) for row in rows)
    for key, value in result["difference"].items():
        assert value == pytest.approx(best[key] - last[key])
    assert "width=8" in out and re.search(r"^ +2  0\.\d+ +\d", out, re.M)  # configuration, rows
    assert re.search(r"^best +\d", out, re.M) and re.search(r"^difference", out, re.M)


def test_results_are_those_of_the_checkpoints(script, tmp_path):
    """result.json can be recomputed from best.pt alone."""
    script(backward_smoothing, *TINY)
    folder = tmp_path / "runs/backward_smoothing-shapes-resnet10-eps8-seed0"
    model, settings = bookkeeping.load_model(folder / "best.pt", "cpu")
    x, y = data.load_data(data_options()).test
    attack_noise = torch.Generator().manual_seed(0)
    clean, pgd = common.accuracy(model, x, y, lambda model, x, y: common.pgd_attack(
        model, x, y, 8 / 255, 2 / 255, 20, generator=attack_noise))
    best = json.loads((folder / "result.json").read_text())["best"]
    assert (best["test_clean"], best["test_pgd"]) == (clean, pgd)


def test_same_seed_same_weights(script, tmp_path):
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert script(backward_smoothing, *TINY, "--out", out, "--seed", seed)[0] == 0
    a, b, c = (weights(tmp_path / out / "last.pt") for out in "abc")
    assert equal(a, b) and not equal(a, c)


def test_no_run_is_overwritten(script, tmp_path):
    first = script(backward_smoothing, *TINY)[1]
    second = script(backward_smoothing, *TINY)[1]
    name = "runs/backward_smoothing-shapes-resnet10-eps8-seed0"
    assert f"{name} holds" in first and f"{name}-2 holds" in second and "unfinished" not in second
    (tmp_path / f"{name}-2/result.json").unlink()
    third = script(backward_smoothing, *TINY)[1]
    assert f"{name}-2 is unfinished; --resume" in third and f"{name}-3 holds" in third
    status, out, _ = script(backward_smoothing, *TINY, "--resume")
    assert status == 0 and f"{name}-2, from epoch 3" in out


def test_the_warning_about_catastrophic_overfitting(monkeypatch, script):
    results = iter([(90, 60), (90, 30), (90, 60), (90, 30)])
    monkeypatch.setattr(bookkeeping, "accuracy", lambda *args, **kwargs: next(results))
    out = script(backward_smoothing, *TINY)[1]
    assert "warning: PGD accuracy fell" in out and "--alpha" in out


def test_best_is_chosen_on_held_out_pictures(monkeypatch, script, tmp_path):
    results = iter([(50, 40), (60, 30), (50, 50), (50, 50)])
    monkeypatch.setattr(bookkeeping, "accuracy", lambda *args, **kwargs: next(results))
    script(backward_smoothing, *TINY, "--out", "run")
    best, last = (torch.load(tmp_path / f"run/{name}.pt", weights_only=True)
                  for name in ("best", "last"))
    assert best["epoch"] == 1 and last["epoch"] == 2 and not equal(best["model"], last["model"])


@pytest.mark.parametrize("options", [
    ["--precision", "bf16"], ["--precision", "fp16"], ["--norm", "l2"], ["--arch", "vgg16"],
    ["--lr-schedule", "piecewise"]])
def test_options_work(script, tmp_path, options):
    assert script(backward_smoothing, *TINY, "--out", "run", *options)[0] == 0
    assert all(value.isfinite().all() for value in weights(tmp_path / "run/last.pt").values())


def test_a_folder_of_pictures_is_trained_on_and_found_again(script, folder, tmp_path):
    status, out, _ = script(backward_smoothing, "--dataset", "pets", "--arch", "resnet10",
                            "--width", 8, "--epochs", 1, "--batch-size", 4, "--val-size", 4,
                            "--out", "run")
    assert status == 0 and "12 training, 4 held-out, 8 test pictures of 32x32 in 2 classes" in out
    status, out, _ = script(evaluate, "run/best.pt", "--steps", 2, "--restarts", 1)
    assert status == 0 and "pets" in out and "decoding" not in out


SMOKE = [  # every option of every script, with a value that is not its default
    (fast_at, "--steps 2 --alpha 3 --init zero --grad-align 0.2 --recover"),
    (fast_at, "--steps 0 --activation swish --arch preactresnet18 --attack-bn eval"),
    (fast_at, "--norm l2 --eps 128 --train-size 64 --batch-size 32 --milestones 0.2 0.9 "
     "--label-noise 0.25"),
    (trades, "--steps 2 --alpha 3 --init uniform --beta 2 --norm l2 --eps 128 --attack-bn train"),
    (trades, "--steps 1 --init uniform --lr 0.05 --lr-schedule piecewise --weight-decay 0"),
    (backward_smoothing, "--gamma 2 --beta 5 --alpha 6 --random-points 3 --attack-bn train"),
    (backward_smoothing, "--alone --seed 4 --precision bf16"),
    (backward_smoothing, "--objective ce --arch wrn-16-8 --val-size 10"),
    (fast_bat, "--linearization pgd --lmbda 0.1 --alpha2 0.02 --hessian-aware --arch resnet10"),
    (fast_bat, "--linearization uniform --eps 16 --precision bf16 --activation softplus"),
    (fast_bat, "--linearization corner --attack-bn eval"),
    (kd_swa, "--attack trades --steps 2 --alpha 3 --beta 2 --kd adv --lambda1 0.4 --temperature 3 "
             "--teacher-epochs 1 --iswa"),
    (kd_swa, "--attack fgsm --kd std --lambda2 0.4 --teacher-epochs 1 --no-swa --norm l2"),
    (kd_swa, "--tf-kd --label-smoothing 0.1 --steps 1 --precision bf16"),
]


@pytest.mark.parametrize("module, options", SMOKE, ids=lambda v: getattr(v, "__name__", v))
def test_every_script_runs_with_its_options(script, tmp_path, module, options):
    status, out, err = script(module, *TINY, "--epochs", 1, "--out", "run", *options.split())
    assert status == 0, err
    for path in (tmp_path / "run").glob("*.pt"):
        assert all(value.isfinite().all() for value in weights(path).values())
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["args"]["method"] == module.__name__ and 0 <= result["last"]["test_pgd"] <= 100


def test_the_smoke_runs_leave_no_option_out():
    """Of those that are the script's own; the common ones are tried with one script or another."""
    common_ones = set.intersection(*(set(vars(module.parse_args(TINY))) for module in SCRIPTS))
    for module in SCRIPTS:
        own = vars(module.parse_args(TINY)).keys() - common_ones - {"adv_teacher", "std_teacher"}
        words = " ".join(options for script, options in SMOKE if script is module)
        assert own and all(f"--{name.replace('_', '-')}" in words for name in own)


class Recorder(argparse.Namespace):
    """Remembers which options were asked for."""
    read = set()

    def __getattribute__(self, name):
        Recorder.read.add(name)
        return super().__getattribute__(name)


@pytest.mark.parametrize("module", SCRIPTS, ids=lambda module: module.__name__)
def test_every_option_is_read(module, monkeypatch, script, folder):
    options = ["--dataset", "pets", "--arch", "resnet10", "--width", "8", "--epochs", "2",
               "--val-size", "4", "--batch-size", "4", "--lr-schedule", "piecewise",
               *(["--teacher-epochs", "1"] if module is kd_swa else [])]

    def parse_args():
        args = module.parse_args(options)
        Recorder.read.clear()
        return Recorder(**vars(args))
    monkeypatch.setattr(sys, "argv", ["x"])
    module.train(parse_args())
    known = vars(module.parse_args(options)).keys()
    assert known - Recorder.read == {"processes"}  # recorded only


# ------------------------------------------------------------------------- the skeleton they share

def loop(module):
    """train() and what follows."""
    source = Path(module.__file__).read_text()
    return source[source.index("def train(args):"):]


def without_the_method(module):
    """The loop without the lines that are marked as the method's."""
    marked = r"^ *# --- method ---\n(.*?\n)*? *# --- end of method ---\n"
    return re.sub(marked, "", loop(module), flags=re.M)


@pytest.mark.parametrize("module", SCRIPTS[1:], ids=lambda module: module.__name__)
def test_the_loop_is_the_same_text_in_every_script(module):
    assert without_the_method(module) == without_the_method(fast_at)
    assert "training_loss" not in without_the_method(module)
    assert len(without_the_method(module).splitlines()) > 25


@pytest.mark.parametrize("one, other", list(itertools.combinations(SCRIPTS, 2)),
                         ids=lambda module: module.__name__)
def test_a_diff_of_two_loops_shows_little_but_the_method(one, other):
    lines = [loop(module).splitlines() for module in (one, other)]
    matcher = difflib.SequenceMatcher(None, *lines, autojunk=False)
    same = sum(block.size for block in matcher.get_matching_blocks())
    assert 1 - 2 * same / sum(map(len, lines)) <= 0.2


@pytest.mark.parametrize("module", SCRIPTS, ids=lambda module: module.__name__)
def test_every_script_has_the_same_order(module):
    source = Path(module.__file__).read_text()
    parts = ['"""', "import torch\n", "def parse_args(argv=None):", "def training_loss(model, x, y",
             "def train(args):", 'if __name__ == "__main__":']
    places = [source.index(part) for part in parts]
    assert places == sorted(places) and len(source.splitlines()) <= 220
    assert "Compared with fast_at.py:" in source or module is fast_at
    assert f"python {module.__name__}.py --eps 8" in module.__doc__


# ------------------------------------------------------------------------- kd_swa and its teachers

KD = [*TINY, "--teacher-epochs", "1", "--steps", "1"]


def test_kd_swa_saves_and_evaluates_the_plain_and_the_averaged_model(script, tmp_path):
    status, out, err = script(kd_swa, *KD, "--out", "run", "--epochs", 3)
    assert status == 0, err
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert {"best", "last", "difference", "swa_best", "swa_last", "swa_difference"} <= result.keys()
    rows = list(csv.DictReader((tmp_path / "run/log.csv").open()))
    assert [bool(row["swa_val_pgd"]) for row in rows] == [False, False, True]  # from half-way on
    assert result["swa_last"]["val_pgd"] == float(rows[-1]["swa_val_pgd"])
    assert re.search(r"^swa_difference", out, re.M) and out.count("first the") == 2
    plain, averaged = (weights(tmp_path / f"run/{name}.pt") for name in ("last", "swa_last"))
    assert equal({k: v for k, v in plain.items() if "running" not in k and "num" not in k},
                 averaged | {})  # one network in the average: itself, but for BatchNorm
    assert not torch.equal(plain["bn1.running_mean"], averaged["bn1.running_mean"])
    assert script(evaluate, "run/swa_best.pt", "--steps", 1, "--restarts", 1)[0] == 0


def test_teachers_are_kept_and_can_be_given(script, tmp_path):
    script(kd_swa, *KD, "--label-noise", 0.5, "--out", "run")
    teachers = ["--adv-teacher", "run/adv-teacher/best.pt", "--std-teacher",
                "run/std-teacher/last.pt"]
    status, out, _ = script(kd_swa, *KD, "--label-noise", 0.5, "--out", "again", *teachers)
    assert status == 0 and "first the" not in out
    assert equal(weights(tmp_path / "run/last.pt"), weights(tmp_path / "again/last.pt"))
    about = json.loads((tmp_path / "run/std-teacher/args.json").read_text())["args"]
    assert (about["method"], about["steps"], about["epochs"]) == ("fast_at", 0, 1)
    assert about["label_noise"] == 0.5  # it learns from the same labels
    about = json.loads((tmp_path / "run/adv-teacher/args.json").read_text())["args"]
    assert (about["steps"], about["alpha"]) == (1, 1.25 * 8 / 255)


@pytest.mark.parametrize("moment", [1, 2, 4])
def test_kd_swa_resumes_in_the_right_phase(script, tmp_path, monkeypatch, moment):
    """Interrupted in the first teacher, in the second, and in the third epoch of three."""
    options = [*KD, "--epochs", 3, "--milestones", "0.3", "--lr-schedule", "piecewise", "--out"]
    script(kd_swa, *options, "whole")
    start, starts = bookkeeping.Run.start_epoch, []

    def interrupt(run):
        starts.append(run.folder)
        if len(starts) == moment + 1:
            raise KeyboardInterrupt
        start(run)
    monkeypatch.setattr(bookkeeping.Run, "start_epoch", interrupt)
    status, _, err = script(kd_swa, *options, "run")
    assert status == 2 and "--out run --resume" in err
    status, out, err = script(kd_swa, *options, "run", "--resume")
    assert status == 0, err
    assert out.count("first the") == max(0, 2 - moment)  # a finished teacher is used as it is
    for name in ("last.pt", "swa_last.pt", "adv-teacher/best.pt", "std-teacher/last.pt"):
        assert equal(weights(tmp_path / "run" / name), weights(tmp_path / "whole" / name))


def test_momentum_of_another_memory_format_resumes_to_the_same_weights(script, tmp_path,
                                                                       monkeypatch):
    """As after training in bf16 on a CPU, in NCHW: fused SGD takes memory as it lies."""
    options = [*TINY, "--epochs", 2, "--out"]
    script(fast_at, *options, "whole")
    start, starts = bookkeeping.Run.start_epoch, []

    def interrupt(run):
        starts.append(run.folder)
        if len(starts) == 2:
            raise KeyboardInterrupt
        start(run)
    monkeypatch.setattr(bookkeeping.Run, "start_epoch", interrupt)
    script(fast_at, *options, "run")
    state = bookkeeping.load(tmp_path / "run/last.pt")
    held = [one for one in state["optimizer"]["state"].values()
            if one["momentum_buffer"].dim() == 4]
    for one in held:
        assert not one["momentum_buffer"].is_contiguous() or one["momentum_buffer"].shape[2] == 1
        one["momentum_buffer"] = one["momentum_buffer"].contiguous()
    bookkeeping.save(state, tmp_path / "run/last.pt")
    assert len(held) > 5 and script(fast_at, *options, "run", "--resume")[0] == 0
    assert equal(weights(tmp_path / "run/last.pt"), weights(tmp_path / "whole/last.pt"))


def test_teachers_that_do_not_fit(script, folder, tmp_path):
    script(fast_at, *TINY, "--steps", 0, "--epochs", 1, "--out", "teacher")
    given = ["--std-teacher", "teacher/last.pt", "--kd", "std"]
    for options in (["--arch", "resnet18"], ["--width", 16], ["--arch", "vgg16"]):
        status, _, err = script(kd_swa, *KD, *given, *options)
        one_line(status, err, "teacher/last.pt holds another architecture")
    pets = ["--dataset", "pets", "--arch", "resnet10", "--width", 8, "--epochs", 1, "--val-size", 4,
            "--batch-size", 4]
    one_line(*script(kd_swa, *pets, *given)[::2], "10 classes.* 2")
    status, _, err = script(kd_swa, *KD, "--std-teacher", "none.pt", "--kd", "std")
    one_line(status, err, "none.pt does not exist")


@pytest.mark.parametrize("module, options, message", [
    (fast_bat, "--norm l2", "--norm: Fast-BAT is defined for linf"),
    (kd_swa, "--lambda1 0.7 --lambda2 0.7", "sum is above 1"),
    (kd_swa, "--iswa --no-swa", "--iswa.*--no-swa"),
    (trades, "--steps 0", "--steps.*at least 1"),
    (fast_at, "--init normal", "--init.*uniform"),
    (fast_at, "--train-size 0", "--train-size.*at least 1"),
    (fast_at, "--label-noise 2", "--label-noise.*at most 1"),
    (fast_at, "--train-size 30 --batch-size 64", "--batch-size 64 exceeds the 30"),
])
def test_bad_options_of_the_methods(script, module, options, message):
    status, _, err = script(module, *TINY, *options.split())
    one_line(status, err, message)


def test_what_differentiates_twice_runs_eager(script, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: pytest.fail("compiled"))
    for module, options in ((fast_bat, []), (fast_at, ["--grad-align", 0.2])):
        status, out, _ = script(module, *TINY, "--epochs", 1, "--compile", *options)
        assert status == 0 and "torch.compile cannot: running eager" in out


# ------------------------------------------------------------------------------------------- speed

@pytest.mark.parametrize("module", SCRIPTS, ids=lambda module: module.__name__)
def test_the_host_never_waits_for_the_device_within_an_epoch(module, monkeypatch, script):
    """Whatever needs a number from the device waits for all that was queued before. `attacking`
    looks at its input on the CPU alone."""
    inside = []

    def watched(name, genuine):
        def call(tensor, *args, **kwargs):
            caller = sys._getframe(1).f_code.co_name
            assert not inside or caller == "attacking", f"{name} in {caller}"
            return genuine(tensor, *args, **kwargs)
        return call
    for name in ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, watched(name, getattr(torch.Tensor, name)))
    start, end = bookkeeping.Run.start_epoch, bookkeeping.Run.end_epoch
    seen = []

    def begin(run):
        start(run)
        inside.append(1)
        seen.append(run.steps)

    def finish(run, *args):
        inside.clear()
        end(run, *args)
    monkeypatch.setattr(bookkeeping.Run, "start_epoch", begin)
    monkeypatch.setattr(bookkeeping.Run, "end_epoch", finish)
    options = ["--kd", "none", "--steps", 1, "--no-swa"] if module is kd_swa else []
    status, _, err = script(module, *TINY, "--epochs", 1, *options)
    assert status == 0, err
    assert seen[0] > 3


def test_compiled_attacks_compute_no_weight_gradients_and_nothing_is_compiled_twice(
        script, monkeypatch):
    """Of the compiled backward passes, those of the attack have no gradient of a weight in them."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    weight_gradients, epochs = [], []

    def backward(graph, _):
        weight_gradients.append(sum(
            node.args[-1][1] for node in graph.graph.nodes
            if node.target is torch.ops.aten.convolution_backward.default))
        return make_boxed_func(graph.forward)
    backend = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph.forward),
                           bw_compiler=backward)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    end = bookkeeping.Run.end_epoch
    monkeypatch.setattr(bookkeeping.Run, "end_epoch", lambda run, *args: (
        epochs.append(len(weight_gradients)), end(run, *args)))
    status, _, err = script(backward_smoothing, *TINY, "--compile", "--precision", "fp32")
    assert status == 0, err
    convolutions = 12
    assert weight_gradients == [0, convolutions]  # the attack's graph, and the training step's
    assert epochs == [2, 2]


def test_compile_trains_the_same_network(script, tmp_path, monkeypatch):
    """Captured and differentiated by torch.compile; only its code generator, slow to start, is left
    out."""
    aot = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", aot)
    for out, options in (("eager", []), ("compiled", ["--compile"])):
        status, _, err = script(backward_smoothing, *TINY, "--out", out, "--epochs", 1, *options)
        assert status == 0, err
    a, b = (weights(tmp_path / out / "last.pt") for out in ("eager", "compiled"))
    assert all(torch.allclose(a[name].float(), b[name].float(), atol=1e-3) for name in a)


# ------------------------------------------------------------------------- interrupted and shared

def wait_for(line, process):
    """Reads the process's output up to `line`."""
    for text in process.stdout:
        if re.search(line, text):
            return
    raise AssertionError(f"no {line}: {process.communicate()}")


SHORT = [*TINY, "--train-size", 640, "--out", "run"]


def test_ctrl_c_says_how_to_resume(tmp_path):
    process = command("backward_smoothing.py", *SHORT, "--epochs", 100, cwd=tmp_path)
    wait_for(r"^ +1  0\.\d+ ", process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 2 and "Traceback" not in err
    assert "interrupted: run/last.pt holds" in err and "--out run --resume" in err


def test_torchrun_shares_the_work(tmp_path, folder):
    """Two processes train two teachers and their pupil: one folder, and one test of each."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         ROOT / "kd_swa.py", *map(str, SHORT), "--dataset", folder, "--arch", "resnet10",
         "--batch-size", "6", "--val-size", "4", "--teacher-epochs", "1"],
        cwd=tmp_path, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test pictures; PGD") == 3
    assert json.loads((tmp_path / "run/args.json").read_text())["args"]["processes"] == 2
    for name in ("last.pt", "swa_last.pt"):
        assert all(value.isfinite().all() for value in weights(tmp_path / "run" / name).values())


# --------------------------------------------------------------------------------------- bad input

BAD = {
    "--dataset imagenet-99": "no folder .*imagenet-99.*--dataset takes cifar10.*shapes",
    "--arch resnet19": "resnet19.*resnet18",
    "--device tpu9": "tpu9.*--device",
    "--eps 0": "--eps.*above 0 and at most 255", "--eps -3": "--eps.*above 0",
    "--eps 256": "--eps.*at most 255",
    "--eps eight": "--eps.*eight", "--eps nan": "--eps.*above 0", "--alpha 0": "--alpha.*above 0",
    "--epochs 0": "--epochs.*at least 1", "--lr -1": "--lr", "--beta inf": "--beta",
    "--gamma -1": "--gamma",
    "--milestones 2": "--milestones.*at most 1", "--nonsense 1": "nonsense",
    "--batch-size 5000": "--batch-size 5000 exceeds", "--val-size 99999": "--val-size",
    "--resume": "no run to resume.*--resume",
}


def one_line(status, err, pattern):
    assert status == 2
    assert len(err.strip().splitlines()) == 1 and "Traceback" not in err
    assert re.search(pattern, err), err


@pytest.mark.parametrize("options", BAD)
def test_a_bad_option_gets_one_line_and_status_2(script, tmp_path, options):
    status, _, err = script(backward_smoothing, *TINY, *options.split())
    one_line(status, err, BAD[options])
    assert not (tmp_path / "runs").exists()  # nothing is left behind


def test_a_failed_start_leaves_no_run_folder(script, folder, tmp_path):
    (folder / "train/cat/0.png").write_text("broken")
    one_line(*script(backward_smoothing, "--dataset", "pets")[::2], r"cat/0.png cannot be used")
    assert not (tmp_path / "runs").exists()


def test_an_out_folder_that_holds_a_run(script, tmp_path):
    script(backward_smoothing, *TINY, "--out", "run")
    before = (tmp_path / "run/last.pt").read_bytes()
    status, _, err = script(backward_smoothing, *TINY, "--out", "run")
    one_line(status, err, "holds a run.*--out.*--resume")
    assert (tmp_path / "run/last.pt").read_bytes() == before


def test_resume_with_other_settings_says_which(script):
    script(backward_smoothing, *TINY, "--out", "run")
    status, _, err = script(backward_smoothing, *TINY, "--out", "run", "--resume", "--beta", 3,
                            "--lr", 0.2)
    one_line(status, err, "other settings: .*--lr was 0.1, is 0.2.*--beta was 10.0, is 3.0")


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(script, tmp_path,
                                                                          monkeypatch):
    genuine, steps = backward_smoothing.training_loss, []

    def sometimes_nan(*args):
        steps.append(1)
        return genuine(*args) * (torch.nan if len(steps) > 1 else 1)
    monkeypatch.setattr(backward_smoothing, "training_loss", sometimes_nan)
    status, _, err = script(backward_smoothing, *TINY, "--batch-size", 64, "--out", "run")
    one_line(status, err, "loss of epoch 2 is nan.*run.*keeps epoch 1.*--lr")
    assert all(value.isfinite().all() for value in weights(tmp_path / "run/last.pt").values())


# ----------------------------------------------------------------------------------- the benchmark

@pytest.mark.parametrize("more", [[], ["--baseline", "--methods", "Fast AT", "TRADES", "Fast-BAT"]])
def test_the_benchmark_prints_a_row_for_each_method(monkeypatch, capsys, tmp_path, more):
    import benchmark
    words = "--arch resnet10 --width 8 --batch-size 2 --steps 1 --json rows.json".split()
    words += ["--precision", "fp32", *["bf16"] * bool(more)]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *words, *more])
    monkeypatch.chdir(tmp_path)
    benchmark.main()
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["method"] for row in rows] == (2 * more[2:] or list(benchmark.METHODS))
    assert [row["precision"] for row in rows[::3]] == (["fp32", "bf16"] if more else 4 * ["fp32"])
    assert all(row["measured"] > 0 and row["mebibytes"] > 0 for row in rows)
    assert [row["method"] for row in rows if row.get("faster", 0) > 0] == 2 * more[2:4]
    _, head, *lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(rows) and {len(line) for line in lines[:2]} == {len(head)}


def test_the_benchmark_times_the_evaluation(monkeypatch, script, capsys):
    import benchmark
    script(backward_smoothing, *TINY, "--epochs", 1, "--out", "run")
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *"--evaluate run/best.pt --n-examples 9 "
                                      "--pgd-steps 1 --steps 1".split()])
    benchmark.main()
    out = capsys.readouterr().out
    assert re.search(r"PGD-1-10 on 9 pictures, robust 0\.\d+ .* s without; \d\.\d+ of it", out)
    assert re.search(r"\d+ us a picture with BatchNorm folded, \d+ without", out)


def test_the_benchmark_times_the_start_and_epochs_of_several_sizes(monkeypatch, capsys):
    import benchmark

    def run_here(command, **_):
        """What would run in a process of its own, which ends with the first step."""
        monkeypatch.setattr(sys, "argv", ["-c", *command[3:]])
        with pytest.raises(SystemExit, match="^0$"):
            exec(command[2])
    monkeypatch.setattr(subprocess, "run", run_here)
    monkeypatch.setattr(os, "_exit", sys.exit)
    monkeypatch.setattr(bookkeeping, "progress", None)  # it sets this
    monkeypatch.setattr(benchmark, "STARTS", 1)
    monkeypatch.setattr(benchmark, "SIZES", (16, 1000))
    monkeypatch.setattr(sys, "argv", [
        "benchmark.py", *"--scale --arch resnet10 --width 8 --batch-size 16".split()])
    benchmark.main()
    out = capsys.readouterr().out
    start, *sizes = out[out.index("start to first"):].splitlines()
    assert re.fullmatch(r"start to first step: \d+\.\d s", start)
    for n, line in zip(("16", "1,000"), sizes, strict=True):
        assert re.fullmatch(rf"resnet10, \w+, batch 16: +{n} pictures, +\d+\.\d+ s an epoch, "
                            r"\d+\.\d+ ms a picture", line)


def test_the_textbook_computes_the_same_loss(model, batch, monkeypatch):
    """Its baseline is worth comparing with only if it does the same work: same noise, same loss."""
    import benchmark

    def share(size):
        return (torch.linspace(0, 37, math.prod(size)) % 1).view(size)
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda tensor, low=0, high=1, generator=None:
                        tensor.copy_(low + (high - low) * share(tensor.shape)))
    monkeypatch.setattr(torch, "rand", lambda *size, device=None: share(size))
    monkeypatch.setattr(torch, "randn_like", lambda tensor: share(tensor.shape) - 0.5)
    model.double().eval()
    monkeypatch.setattr(model, "train", lambda mode=True: model)  # the same statistics throughout
    x, y = batch[0].double(), batch[1]
    for name, module in (("Fast AT", fast_at), ("TRADES", trades),
                         ("Backward Smoothing", backward_smoothing)):
        args = module.parse_args(["--attack-bn", "eval"])
        theirs = benchmark.TEXTBOOK[name](model, x, y).item()
        assert theirs == pytest.approx(module.training_loss(model, x, y, args).item()), name


# -------------------------------------------------------------------------------------- the README

def readme_commands():
    """The lines of the shell blocks, with NAME="words" put in for $NAME."""
    readme = (ROOT / "README.md").read_text()
    blocks = re.findall(r"^```(?:sh|bash)\n(.*?)^```", readme, re.M | re.S)
    words, lines = {}, []
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        line = line.split("#")[0].strip()
        if assigned := re.fullmatch(r'(\w+)="(.*)"', line):
            words["$" + assigned[1]] = assigned[2]
        elif line:
            lines.append(functools.reduce(lambda text, w: text.replace(*w), words.items(), line))
    return lines


def parsed(words):
    """Lets the script that `words` begin with read its options; False where they name no script."""
    modules = {f"{module.__name__}.py": module for module in (*SCRIPTS, evaluate)}
    return words[0] in modules and bool(modules[words[0]].parse_args(words[1:]).device)


def test_the_readmes_commands_are_valid():
    tried = 0
    for line in readme_commands():
        for part in line.split("&&"):
            words = shlex.split(part)
            skip = {"torchrun": 2, "python": 1}.get(words[0])
            tried += skip is not None and parsed(words[skip:])
    assert tried >= 15


def test_the_commands_in_the_readmes_tables_are_valid():
    """Every row of the papers' tables has one; a row whose figures were not measured says so."""
    readme = (ROOT / "README.md").read_text().split("## The papers' tables, row by row")[1]
    rows = re.findall(r"^\| (?:A?\d+) \|.*\|$", readme, re.M)
    commands = [command for row in rows for command in re.findall(r"`(\w+\.py [^`]+)`", row)]
    assert len(rows) > 120 and all(parsed(shlex.split(command)) for command in commands)
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert len(cells) == 5 and (cells[4] == "not run" or re.search(r"\d", cells[4]))


def test_ci_runs_the_readmes_two_commands():
    ci, commands = (ROOT / ".ci/run").read_text(), readme_commands()
    for line in commands[:2]:
        assert line in commands
        for part in line.split("&&"):
            assert part.strip() in ci
    assert "backward_smoothing.py --eps 8 --dataset shapes" in commands[0]
    assert "pytest" in commands[1]


def test_no_line_of_the_scripts_is_too_long():
    for path in ROOT.glob("*.py"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert len(line) <= 100, f"{path.name}:{number}"
