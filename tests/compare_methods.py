"""Trains and evaluates all methods on the same images with the same schedule: docs/comparison.csv.

    python tests/compare_methods.py                          the table on CIFAR-10, seeds 0, 1 and 2
    python tests/compare_methods.py --group equal-time       four methods, as many epochs as fit
    python tests/compare_methods.py --group collapse         FGSM and its remedies at eps 16
    python tests/compare_methods.py --group overfitting      PGD-AT and KD-SWA on few images
    python tests/compare_methods.py --markdown               the tables of all lines, and no runs

Every run is a process with one thread, --jobs of them at a time. A run that has its line in the
file is skipped, one that was interrupted is resumed, and each finished one adds its line at once.
"""

import argparse
import csv
import datetime
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
SETTING = "--arch resnet10 --width 16 --test-size 1000"
LARGE = f"{SETTING} --train-size 10000 --val-size 1000 --batch-size 128 --lr-schedule cyclic"
SMALL = f"{SETTING} --train-size 5000 --val-size 500 --batch-size 64 --lr-schedule cyclic"
FEW = f"{SETTING} --train-size 1000 --val-size 500 --batch-size 64 --lr-schedule piecewise"
METHODS = {  # script, options, passes a step (forward 1, gradient in the input 1, in weights 2)
    "Standard": ("fast_at", "--steps 0", 3),
    "Fast AT": ("fast_at", "", 5),
    "N-FGSM": ("fast_at", "--init noise", 5),
    "PGD-2": ("fast_at", "--steps 2", 7),
    "PGD-10": ("fast_at", "--steps 10", 23),  # which is the baseline of KD-SWA, too
    "GradAlign": ("fast_at", "--init zero --grad-align 0.2", 13),
    "Fast TRADES": ("trades", "--steps 1 --init uniform", 9),
    "Fast TRADES-2": ("trades", "--steps 2 --init uniform", 11),
    "TRADES-10": ("trades", "", 27),
    "Backward Smoothing": ("backward_smoothing", "", 10),
    "Fast-BAT": ("fast_bat", "", 12),
    "KD-SWA": ("kd_swa", "--attack pgd", 25),
}
GROUPS = {  # options of the group, and its methods
    "table": (f"{LARGE} --eps 8 --lr 0.2 --epochs 15", METHODS),
    # As many epochs as fit into those of Fast AT, by the ratios that tests/benchmark.py measured.
    "equal-time": (f"{LARGE} --eps 8 --lr 0.2", {
        "Fast AT": ("fast_at", "--epochs 30", 5),
        "Fast TRADES": ("trades", "--steps 1 --init uniform --epochs 16", 9),
        "Backward Smoothing": ("backward_smoothing", "--epochs 15", 10),
        "Fast-BAT": ("fast_bat", "--epochs 6", 12)}),
    "collapse": (f"{SMALL} --eps 16 --lr 0.2 --epochs 15", {
        "FGSM": ("fast_at", "--init zero", 5),
        **{name: METHODS[name] for name in ("Fast AT", "N-FGSM", "Backward Smoothing",
                                            "Fast TRADES", "Fast-BAT")},
        "GradAlign": ("fast_at", "--init zero --grad-align 2", 13)}),
    "overfitting": (f"{FEW} --eps 8 --lr 0.1 --epochs 60 --milestones 0.5 0.75", {
        name: METHODS[name] for name in ("PGD-10", "KD-SWA")}),
}
FIELDS = ["group", "method", "seed", "network", "epoch", "clean", "pgd20", "pgd50_10", "aa_lite",
          "n_test", "train_seconds", "passes", "data", "precision", "torch",
          "processor", "date", "command"]


def processor():
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
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
    figures = {name: dict(clean=result[name]["test_clean"]) for name in names}
    if group in ("table", "equal-time"):  # for the others PGD-20 is enough
        # Where the last epoch is the best one, both are the same network.
        networks = {name: name.replace("last", "best") if result[name]["epoch"] == result[
            name.replace("last", "best")]["epoch"] else name for name in names}
        evaluation = folder.with_name(f"{folder.name}-evaluation")
        if not (evaluation / "result.json").exists():
            call(["evaluate.py", *(str(folder / f"{name}.pt") for name in set(networks.values())),
                  "--n-examples", "1000", "--out", str(evaluation)], log)
        rows = {Path(row["checkpoint"]).stem: row for row in json.loads(
            (evaluation / "result.json").read_text())["rows"]}
        for name in names:
            row = rows[networks[name]]
            figures[name] = dict(clean=row["clean %"], pgd50_10=row["PGD-50-10 %"],
                                 aa_lite=row["AA-lite %"])
    data = "cifar10" if options.dataset == "cifar10" else options.data_name
    return [dict(group=group, method=method, seed=seed, network=name, epoch=result[name]["epoch"],
                 pgd20=result[name]["test_pgd"], n_test=1000, passes=passes, data=data,
                 train_seconds=round(result["train_seconds"], 1), precision=options.precision,
                 torch=torch.__version__, processor=processor(),
                 date=datetime.date.today().isoformat(),
                 command=f"{script}.py --dataset {data} {' '.join(words)}") | figures[name]
            for name in names]


def read_lines(path):
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def markdown(lines):
    """A table for each group: mean +- standard deviation over the seeds."""
    columns = dict(clean="clean %", pgd20="PGD-20 %", pgd50_10="PGD-50-10 %", aa_lite="AA-lite %")
    for group, (_, methods) in GROUPS.items():
        print(f"\n{group}\n\n| method | passes a step | seeds | network | "
              f"{' | '.join(columns.values())} |\n|{'---|' * 8}")
        for method, network in itertools.product(methods, ("best", "last", "swa_best", "swa_last")):
            rows = [line for line in lines if (line["group"], line["method"], line["network"]) == (
                group, method, network)]
            cells = [[float(row[key]) for row in rows if row[key]] for key in columns]
            cells = [f"{statistics.mean(cell):.1f} ± {statistics.stdev(cell):.1f}" if cell[1:] else
                     f"{cell[0]:.1f}" if cell else "" for cell in cells]
            if rows:
                print(f"| {method} | {methods[method][2]} | {len(rows)} | {network} | "
                      f"{' | '.join(cells)} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--group", nargs="+", choices=GROUPS, default=["table"])
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
    todo = [(group, method, seed) for seed in options.seeds for group in options.group
            for method in options.methods or GROUPS[group][1]
            if (group, method, seed, options.precision) not in done]
    todo.sort(key=lambda what: (what[2], -GROUPS[what[0]][1][what[1]][2]))  # the longest first
    with ThreadPoolExecutor(options.jobs) as pool:
        futures = {pool.submit(run, *what, options): what for what in todo}
        for future in as_completed(futures):
            if future.exception():
                print(*futures[future], "failed:", future.exception(), flush=True)
                continue
            new = not options.csv.exists()
            with open(options.csv, "a", newline="") as file:
                writer = csv.DictWriter(file, FIELDS)
                if new:
                    writer.writeheader()
                writer.writerows(future.result())
            print(*futures[future], *(f"{line['network']} {line['clean']:.1f} {line['pgd20']:.1f}"
                                      for line in future.result()), flush=True)


if __name__ == "__main__":
    main()
