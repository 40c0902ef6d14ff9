"""What a training step of each method costs, in forward passes: measured, and by the formula.

    python tests/benchmark.py                          ResNet-18, batch 128
    python tests/benchmark.py --arch resnet10 --width 16 --batch-size 64 --steps 10

A row is the median of --steps rounds; in each, every method takes one step, divided by the time of
forward passes just before and after it, so that a busy machine shifts both. Not for pytest.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import backward_smoothing  # noqa: E402
import common  # noqa: E402
import fast_at  # noqa: E402
import fast_bat  # noqa: E402
import kd_swa  # noqa: E402
import models  # noqa: E402
import trades  # noqa: E402

METHODS = {  # script, its options, the formula: a pass is 1, its input gradient 1, its weights' 2
    "standard training": (fast_at, "--steps 0", 3),
    "Fast AT": (fast_at, "", 2 + 3),
    "PGD-2-AT": (fast_at, "--steps 2", 2 * 2 + 3),
    "PGD-10-AT": (fast_at, "--steps 10", 10 * 2 + 3),
    "GradAlign": (fast_at, "--grad-align 0.2", 2 + 3 + 2 + 2 + 4),
    "TRADES": (trades, "", 1 + 10 * 2 + 6),
    "Fast TRADES": (trades, "--steps 1 --init uniform", 1 + 2 + 6),
    "Fast TRADES (2-step)": (trades, "--steps 2 --init uniform", 1 + 2 * 2 + 6),
    "Backward Smoothing": (backward_smoothing, "", 2 + 2 + 6),
    "Fast-BAT": (fast_bat, "", 2 + 2 + 4 + 4),
    "KD-SWA": (kd_swa, "", 10 * 2 + 3 + 2),
}


def steps_of(options):
    """The forward pass, and each method's step, as functions without arguments."""
    x = torch.rand(options.batch_size, 3, 32, 32, device=options.device)
    y = torch.randint(10, (len(x),), device=options.device)

    def network():
        model = models.build_model(options.arch, 10, options.width).to(
            options.device, memory_format=torch.channels_last)
        model.dtype = getattr(torch, {"fp32": "float32", "bf16": "bfloat16"}[options.precision])
        return model

    def forward(model=network()):
        with torch.no_grad():
            model(x)

    def training_step(module, words):
        model = network()
        args = module.parse_args(["--device", options.device, *words.split()])
        more = ()
        if module is kd_swa:
            teachers = [network().eval().requires_grad_(False) for _ in range(2)]
            more = [(0.25, lambda z, y, teacher=teacher: teacher(z)) for teacher in teachers],
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, fused=True)

        def step():
            loss = module.training_loss(model, x, y, args, *more)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return step

    return forward, {name: training_step(module, words)
                     for name, (module, words, _) in METHODS.items() if name in options.methods}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnet18", choices=models.ARCHS)
    parser.add_argument("--width", type=int)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS, metavar="NAME")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    options.device = common.find_device(options.device)
    forward, steps = steps_of(options)

    def seconds(function, times=1):
        torch.get_device_module(options.device).synchronize()
        start = time.perf_counter()
        for _ in range(times):
            function()
        torch.get_device_module(options.device).synchronize()
        return (time.perf_counter() - start) / times

    measured = {name: [] for name in steps}
    for i in range(options.steps + 1):
        for name, step in steps.items():
            before, taken, after = seconds(forward, 3), seconds(step), seconds(forward, 3)
            if i:  # the first round warms up
                measured[name].append((taken / (before + after) * 2, taken))
    print(f"{options.arch}, width {options.width or 'default'}, batch {options.batch_size}, "
          f"{options.precision}, {options.device}, {torch.get_num_threads()} threads, torch "
          f"{torch.__version__}")
    print(f"{'method':22}{'formula':>8}{'measured':>10}{'lowest':>8}{'highest':>8}{'ratio':>7}"
          f"{'pictures/s':>12}")
    rows = []
    for name, pairs in measured.items():
        passes, formula = [p for p, _ in pairs], METHODS[name][2]
        rate = options.batch_size / statistics.median(s for _, s in pairs)
        row = dict(method=name, formula=formula, measured=statistics.median(passes),
                   lowest=min(passes), highest=max(passes), pictures_per_second=rate)
        rows.append(row)
        print(f"{name:22}{formula:8}{row['measured']:10.1f}{row['lowest']:8.1f}"
              f"{row['highest']:8.1f}{row['measured'] / formula:7.2f}{rate:12.1f}")
    if options.json:
        Path(options.json).write_text(json.dumps(dict(options=vars(options) | dict(
            methods=list(options.methods)), rows=rows), indent=1))


if __name__ == "__main__":
    main()
