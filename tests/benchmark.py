"""What training costs: images per second, forward passes, and times Fast AT.

    python tests/benchmark.py                                  ResNet-18, batch 128
    python tests/benchmark.py --arch resnet10 --width 16 --precision bf16 fp32 --batch-size 64 128

There is a row for each method, architecture, precision and batch size: the median of --steps
rounds. In each round every method takes one step, from drawing the batch to the optimizer, between
forward passes of its network; their ratio is `measured`, and a busy machine slows both down. The
method is what stands between the markers of its script. `formula` is what theory says: a forward
pass counts 1, its gradient in the input 1 more, that in the weights 2 more. Not for pytest.
"""

import argparse
import itertools
import statistics
import sys
import time
import types
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import backward_smoothing  # noqa: E402
import common  # noqa: E402
import fast_at  # noqa: E402
import fast_bat  # noqa: E402
import kd_swa  # noqa: E402
import trades  # noqa: E402
from conftest import method_lines  # noqa: E402

METHODS = {  # script, its options, the formula
    "standard training": (fast_at, "--steps 0", 3),
    "Fast AT": (fast_at, "", 2 + 3),
    "N-FGSM": (fast_at, "--init noise", 2 + 3),
    "PGD-2-AT": (fast_at, "--steps 2", 2 * 2 + 3),
    "PGD-10-AT": (fast_at, "--steps 10", 10 * 2 + 3),
    "GradAlign": (fast_at, "--init zero --grad-align 0.2", 2 + 3 + 2 + 2 + 4),
    "TRADES": (trades, "", 1 + 10 * 2 + 6),
    "Fast TRADES": (trades, "--steps 1 --init uniform", 1 + 2 + 6),
    "Fast TRADES (2-step)": (trades, "--steps 2 --init uniform", 1 + 2 * 2 + 6),
    "Backward Smoothing": (backward_smoothing, "", 2 + 2 + 6),
    "Fast-BAT": (fast_bat, "", 2 + 2 + 4 + 4),
    "KD-SWA": (kd_swa, "--attack pgd", 10 * 2 + 3 + 2),
}
TWICE = ("GradAlign", "Fast-BAT")  # they differentiate twice, which torch.compile does not support


def ours(name, options, data):
    """A method's (forward pass, step) as its script takes it."""
    module, words, _ = METHODS[name]
    words = [*words.split(), "--device", options.device, "--batch-size", str(options.batch_size),
             "--precision", options.precision, "--arch", options.arch]
    words += ["--width", str(options.width)] if options.width else []
    words += ["--compile"] if options.compile and name not in TWICE else []
    args = module.parse_args([*words, "--epochs", str(10**6)])
    model = common.prepare_model(args, data).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=5e-4,
                                fused=True)
    scaler = torch.amp.GradScaler(args.device, enabled=args.precision == "fp16")
    lines, names = method_lines(module), vars(module) | dict(
        model=model, args=args, i=1, recover=False, run=types.SimpleNamespace(steps=100))
    if module is kd_swa:
        networks = [common.prepare_model(args, data).eval().requires_grad_(False) for _ in range(2)]
        names["teachers"] = [(0.25, 2, lambda x_adv, y, teacher=teacher: teacher(x_adv))
                             for teacher in networks]

    def batches():
        for epoch in itertools.count():
            yield from common.batches(data, args, epoch)

    def step(batches=batches()):
        names["x"], names["y"] = next(batches)
        exec(lines, names)
        optimizer.zero_grad()
        scaler.scale(names["loss"]).backward()
        common.average(p.grad for p in model.parameters())
        scaler.step(optimizer)
        scaler.update()

    def forward(x=data.train[0][:options.batch_size].float() / 255):
        with torch.no_grad():
            model(x)
    return forward, step


def compare(options):
    """Measures options.methods for one architecture, precision and batch size, and prints them."""
    n, device = max(1024, options.batch_size), options.device
    x = torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8, device=device)
    part = x, torch.randint(10, (n,), device=device)
    data = common.Data((*part, torch.arange(n, device=device)), part, part, list("0123456789"))
    methods = {name: ours(name, options, data) for name in options.methods}

    def seconds(function, times=1):
        torch.get_device_module(device).synchronize()
        start = time.perf_counter()
        for _ in range(times):
            function()
        torch.get_device_module(device).synchronize()
        return (time.perf_counter() - start) / times

    measured = {name: [] for name in methods}
    for i in range(options.steps + 1):
        for name, (forward, step) in methods.items():
            before, taken, after = seconds(forward, 3), seconds(step), seconds(forward, 3)
            if i:  # the first round warms up
                measured[name].append((taken / (before + after) * 2, taken))
    unit = [taken for _, taken in measured.get("Fast AT", [])]
    for name, rounds in measured.items():
        passes, taken = zip(*rounds)
        ratio = [mine / one for mine, one in zip(taken, unit)] or [0.0]
        print(f"{name:22}{options.arch:18}{options.precision:>9}{options.batch_size:7}"
              f"{options.batch_size / statistics.median(taken):11.1f}{METHODS[name][2]:9}"
              f"{statistics.median(passes):10.1f}{f'{min(passes):.1f}-{max(passes):.1f}':>14}"
              f"{statistics.median(ratio):15.2f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--arch", nargs="+", default=["resnet18"], choices=common.ARCHS, metavar="NAME")
    add("--width", type=int)
    add("--batch-size", nargs="+", type=int, default=[128])
    add("--precision", nargs="+", default=["auto"], choices=["auto", "fp32", "bf16", "fp16"])
    add("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    add("--methods", nargs="+", default=list(METHODS), choices=METHODS, metavar="NAME")
    add("--steps", type=int, default=5)
    add("--compile", action="store_true", help="but not what differentiates twice")
    options = parser.parse_args()
    usual = fast_at.parse_args(["--device", options.device])
    options.device = usual.device
    print(f"{options.device}, {torch.get_num_threads()} threads, torch {torch.__version__}, width "
          f"{options.width or 'default'}{', compiled' * options.compile}")
    print(f"{'method':22}{'architecture':18}{'precision':>9}{'batch':>7}{'images/s':>11}"
          f"{'formula':>9}{'measured':>10}{'(range)':>14}{'times Fast AT':>15}")
    for arch, precision, size in itertools.product(options.arch, options.precision,
                                                   options.batch_size):
        compare(argparse.Namespace(**vars(options) | dict(
            arch=arch, batch_size=size,
            precision=usual.precision if precision == "auto" else precision)))


if __name__ == "__main__":
    common.progress = lambda items, *_: items  # there is no end whose distance could be shown
    main()
