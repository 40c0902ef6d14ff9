"""Trains and evaluates methods on the same images with the same schedule: docs/comparison.csv.

    python tests/compare_methods.py                          all methods on CIFAR-10, seeds 0 to 2
    python tests/compare_methods.py --group equal-time       four of them, as many epochs as fit
    python tests/compare_methods.py --group full-size        all, ResNet-18 on all images: a GPU
    python tests/compare_methods.py --group collapse overfitting     what goes wrong, and remedies
    python tests/compare_methods.py --markdown               the tables of all lines, and no runs

Every run is a process with one thread, --jobs of them at a time. A run that has its line in the
file is skipped, one that was interrupted is resumed, and each finished one adds its lines at once.
"""

import argparse
import csv
import datetime
import itertools
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch
from benchmark import METHODS, ROOT
from evaluate import table

SETTING = "--arch resnet10 --width 16 --test-size 1000"
LARGE = f"{SETTING} --train-size 10000 --val-size 1000 --batch-size 128 --lr-schedule cyclic"
SMALL = f"{SETTING} --train-size 5000 --val-size 500 --batch-size 64 --lr-schedule cyclic"
ALL = {name: (module.__name__, options) for name, (module, options, _) in METHODS.items()}
GROUPS = {  # options of the group; its methods: script, and options of its own
    "table": (f"{LARGE} --eps 8 --lr 0.2 --epochs 15", ALL),
    # About as many epochs as fit into those of Fast AT on a CPU (docs/measurements.md).
    "equal-time": (f"{LARGE} --eps 8 --lr 0.2", {
        "Fast AT": ("fast_at", "--epochs 30"),
        "Fast TRADES": ("trades", "--steps 1 --init uniform --epochs 16"),
        "Backward Smoothing": ("backward_smoothing", "--epochs 15"),
        "Fast-BAT": ("fast_bat", "--epochs 6")}),
    "full-size": ("--arch resnet18 --eps 8 --epochs 30 --lr-schedule cyclic --lr 0.2", ALL),
    "collapse": (f"{SMALL} --eps 16 --lr 0.2 --epochs 15 --keep-epochs", {
        "FGSM": ("fast_at", "--init zero"),
        **{name: ALL[name] for name in ("Fast AT", "N-FGSM", "Backward Smoothing", "Fast TRADES",
                                        "Fast-BAT")},
        "GradAlign": ("fast_at", "--init zero --grad-align 2")}),
    "overfitting": ("--arch resnet10 --width 16 --train-size 300 --val-size 200 --test-size 2000 "
                    "--no-flip --batch-size 16 --eps 4 --attack pgd --steps 2 --alpha 3 --lr 0.1 "
                    "--lr-schedule piecewise --milestones 0.2 0.9 --epochs 150", {
        "PGD-AT": ("kd_swa", "--kd none --no-swa"), "KD-SWA": ("kd_swa", "")})}
FIELDS = dict(clean="clean %", pgd20="PGD-20 %", pgd50_10="PGD-50-10 %", aa_lite="AA-lite %")


def processor():
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return (re.findall("model name.*: (.*)", info) or [platform.processor()])[0]


def run(group, method, seed, options):
    """Trains, evaluates and returns the lines of one run: best and last of each network."""
    def call(*command):
        with open(folder.with_suffix(".log"), "a") as log:
            subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=log,
                           stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"})

    script, own = GROUPS[group][1][method]
    words = f"--seed {seed} {GROUPS[group][0]} {own} --precision {options.precision}".split()
    data = Path(options.dataset).name
    folder = ROOT / f"runs/{group}-{data}-{options.precision}/{method}-seed{seed}".replace(" ", "-")
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not (folder / "result.json").exists():
        start = ["--resume"] if (folder / "args.json").exists() else [
            "--dataset", options.dataset, *words]
        call(f"{script}.py", *start, "--out", str(folder))
    result = json.loads((folder / "result.json").read_text())
    names = [name for name in ("best", "last", "swa_best", "swa_last") if name in result]
    figures = {}
    if group in ("table", "equal-time"):  # for the others PGD-20 is enough
        shutil.rmtree(folder / "evaluation", ignore_errors=True)  # of an interrupted one
        same = {name: (result[name]["epoch"], name[:3] == "swa") for name in names}
        first = {network: name for name, network in reversed(same.items())}  # best can be last
        call("evaluate.py", *(str(folder / f"{name}.pt") for name in first.values()),
             "--n-examples", "1000", "--out", str(folder / "evaluation"))
        rows = json.loads((folder / "evaluation/result.json").read_text())["rows"]
        rows = {network: {key: row.get(title, "") for key, title in FIELDS.items()}
                for network, row in zip(first, rows)}  # the training had other test images
        figures = {name: rows[same[name]] for name in names}
    return [dict(group=group, method=method, seed=seed, network=name, epoch=result[name]["epoch"],
                 clean=result[name]["test_clean"], pgd20=result[name]["test_pgd"], pgd50_10="",
                 aa_lite="", n_test=result["n_test"], train_seconds=round(result["train_seconds"]),
                 data=data, precision=options.precision, torch=torch.__version__,
                 processor=processor(), date=datetime.date.today().isoformat(),
                 command=f"{script}.py --dataset {data} {' '.join(words)}") | figures.get(name, {})
            for name in names]


def tables(lines):
    """Prints a table for each group: mean +- standard deviation over the seeds."""
    settings = sorted({(line["data"], line["precision"]) for line in lines})
    for group, (data, precision) in itertools.product(GROUPS, settings):
        rows, networks = [], ("best", "last", "swa_best", "swa_last")
        for method, network in itertools.product(GROUPS[group][1], networks):
            some = [line for line in lines if [group, data, precision, method, network] == [
                line[key] for key in ("group", "data", "precision", "method", "network")]]
            row = dict(method=method, network=network, seeds=len(some))
            for key, title in FIELDS.items():
                values = [float(line[key]) for line in some if line[key]]
                row[title] = (values or [None])[0] if len(values) < 2 else dict(
                    mean=statistics.mean(values), std=statistics.stdev(values))
            rows += [row] if some else []
        if rows:
            print(f"\n{group}, {data}, {precision}\n\n{table(rows, markdown=True)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--group", nargs="+", choices=GROUPS, default=["table"])
    add("--dataset", default="cifar10", help="cifar10, or a folder of its images")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--methods", nargs="+", help="some of the group's; default: all")
    add("--precision", choices=["fp32", "bf16"], default="fp32", help="bf16: if in hardware")
    add("--jobs", type=int, default=2)
    add("--markdown", action="store_true")
    add("--csv", type=Path, default=ROOT / "docs/comparison.csv")
    options = parser.parse_args()
    lines = list(csv.DictReader(options.csv.open() if options.csv.exists() else []))
    if options.markdown:
        return tables(lines)
    done = {tuple(line[key] for key in ("group", "method", "seed", "data", "precision"))
            for line in lines}
    setting = Path(options.dataset).name, options.precision
    todo = [(group, method, seed) for seed in options.seeds for group in options.group
            for method in options.methods or GROUPS[group][1]
            if (group, method, str(seed), *setting) not in done]
    print(f"{len(todo)} runs to do; all others have their lines in {options.csv}", flush=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        futures = {pool.submit(run, *what, options): what for what in todo}
        for future in as_completed(futures):
            if future.exception():
                print(*futures[future], "failed:", future.exception(), flush=True)
                continue
            with open(options.csv, "a", newline="") as file:
                csv.writer(file).writerows([future.result()[0]] * (file.tell() == 0) + [
                    line.values() for line in future.result()])
            print(*futures[future], "is done", flush=True)


if __name__ == "__main__":
    main()
