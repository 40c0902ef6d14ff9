"""Trains and evaluates all methods on the same images with the same schedule: docs/comparison.csv.

    python tests/compare_methods.py                          the table on CIFAR-10, seeds 0, 1 and 2
    python tests/compare_methods.py --group collapse         FGSM and its remedies at eps 16
    python tests/compare_methods.py --markdown               the tables of all lines, and no runs

Every run is a process with one thread, --jobs of them at a time. A run that has its line in the
file is skipped, one that was interrupted is resumed, and each finished one adds its line at once.
"""

import argparse
import csv
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
SETTING = ("--arch resnet10 --width 16 --train-size 5000 --val-size 500 --test-size 1000 "
           "--batch-size 64 --lr-schedule cyclic")
METHODS = {  # script, options, passes a step (forward 1, gradient in the input 1, in weights 2)
    "Standard": ("fast_at", "--steps 0", 3),
    "Fast AT": ("fast_at", "", 5),
    "N-FGSM": ("fast_at", "--init noise", 5),
    "PGD-2": ("fast_at", "--steps 2", 7),
    "PGD-10": ("fast_at", "--steps 10", 23),
    "GradAlign": ("fast_at", "--init zero --grad-align 0.2", 13),
    "Fast TRADES": ("trades", "--steps 1 --init uniform", 9),
    "Fast TRADES-2": ("trades", "--steps 2 --init uniform", 11),
    "TRADES-10": ("trades", "", 27),
    "Backward Smoothing": ("backward_smoothing", "", 10),
    "Fast-BAT": ("fast_bat", "", 12),
    "KD-SWA baseline": ("kd_swa", "--kd none --no-swa", 23),
    "KD-SWA": ("kd_swa", "", 25),
}
COLLAPSE = {"FGSM": ("fast_at", "--init zero", 5),
            "GradAlign": ("fast_at", "--init zero --grad-align 2", 13)}
ORDER = ("Fast AT", "Standard", "N-FGSM", "Backward Smoothing", "Fast TRADES", "PGD-2", "Fast-BAT",
         "Fast TRADES-2", "GradAlign", "PGD-10", "TRADES-10", "KD-SWA", "KD-SWA baseline")
GROUPS = {  # options of the group, and its methods with options of their own
    "table": (f"{SETTING} --eps 8 --lr 0.1 --epochs 10", {name: METHODS[name] for name in ORDER}),
    "collapse": (f"{SETTING} --eps 16 --lr 0.2 --epochs 15", {
        name: (COLLAPSE | METHODS)[name] if name != "GradAlign" else COLLAPSE[name]
        for name in ("FGSM", "Fast AT", "N-FGSM", "Backward Smoothing", "Fast TRADES", "Fast-BAT",
                     "GradAlign")}),
}
FIELDS = ["group", "method", "seed", "network", "epoch", "clean", "pgd50_10", "aa_lite",
          "test_pgd20", "n_test", "train_seconds", "passes", "data", "precision", "torch",
          "processor", "date", "command"]


def processor():
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def call(command, log):
    with open(log, "a") as file:
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=file,
                       stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"})


def run(group, method, seed, options):
    """Trains, evaluates and returns the lines of one run: best and last of each network."""
    common, methods = GROUPS[group]
    script, own, passes = methods[method]
    words = f"--seed {seed} {common} {own} --precision {options.precision}".split()
    folder = ROOT / "runs" / "comparison" / f"{group}-{method.replace(' ', '-')}-{seed}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.with_suffix(".log")
    if not (folder / "result.json").exists():
        if (folder / "args.json").exists():
            call([f"{script}.py", "--resume", "--out", str(folder)], log)
        else:
            call([f"{script}.py", "--dataset", options.dataset, *words, "--out", str(folder)], log)
    result = json.loads((folder / "result.json").read_text())
    names = [name for name in ("best", "last", "swa_best", "swa_last") if name in result]
    evaluation = folder.with_name(f"{folder.name}-evaluation")
    if not (evaluation / "result.json").exists():
        call(["evaluate.py", *(str(folder / f"{name}.pt") for name in names), "--n-examples",
              "1000", "--out", str(evaluation)], log)
    rows = json.loads((evaluation / "result.json").read_text())["rows"]
    data = "cifar10" if options.dataset == "cifar10" else options.data_name
    return [dict(group=group, method=method, seed=seed, network=name, epoch=result[name]["epoch"],
                 clean=row["clean %"], pgd50_10=row["PGD-50-10 %"], aa_lite=row["AA-lite %"],
                 test_pgd20=result[name]["test_pgd"], n_test=row["n"],
                 train_seconds=round(result["train_seconds"], 1), passes=passes, data=data,
                 precision=options.precision, torch=torch.__version__, processor=processor(),
                 date=datetime.date.today().isoformat(),
                 command=f"{script}.py --dataset {data} {' '.join(words)}")
            for name, row in zip(names, rows)]


def read_lines(path):
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def markdown(lines):
    """A table for each group: mean +- standard deviation over the seeds."""
    for group in dict.fromkeys(line["group"] for line in lines):
        print(f"\n{group}\n\n| method | seeds | network | clean % | PGD-50-10 % | AA-lite % | "
              "training time |\n|---|---|---|---|---|---|---|")
        some = [line for line in lines if line["group"] == group]
        unit = [float(line["train_seconds"]) for line in some if line["method"] == "Fast AT"]
        for method, network in dict.fromkeys((line["method"], line["network"]) for line in some):
            rows = [line for line in some if (line["method"], line["network"]) == (method, network)]
            cells = [[float(row[key]) for row in rows] for key in ("clean", "pgd50_10", "aa_lite")]
            cells = [f"{statistics.mean(cell):.1f}" + (
                f" ± {statistics.stdev(cell):.1f}" if len(cell) > 1 else "") for cell in cells]
            time = statistics.mean(float(row["train_seconds"]) for row in rows)
            time = f"{time / statistics.mean(unit):.1f}" if unit else f"{time:.0f} s"
            print(f"| {method} | {len(rows)} | {network} | {' | '.join(cells)} | {time} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--group", choices=GROUPS, default="table")
    parser.add_argument("--dataset", default="cifar10", help="cifar10, or a folder of its images")
    parser.add_argument("--data-name", default="cifar10-jpeg", help="what to call such a folder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", help="some of the group's; default: all")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--csv", type=Path, default=ROOT / "docs" / "comparison.csv")
    options = parser.parse_args()
    if options.markdown:
        return markdown(read_lines(options.csv))
    done = {(line["group"], line["method"], int(line["seed"]), line["precision"])
            for line in read_lines(options.csv)}
    todo = [(options.group, method, seed) for seed in options.seeds
            for method in options.methods or GROUPS[options.group][1]
            if (options.group, method, seed, options.precision) not in done]
    with ThreadPoolExecutor(options.jobs) as pool:
        for what, lines in zip(todo, pool.map(lambda what: run(*what, options), todo)):
            new = not options.csv.exists()
            with open(options.csv, "a", newline="") as file:
                writer = csv.DictWriter(file, FIELDS)
                if new:
                    writer.writeheader()
                writer.writerows(lines)
            print(*what, lines[0]["clean"], lines[0]["pgd50_10"], lines[0]["aa_lite"], flush=True)


if __name__ == "__main__":
    main()
