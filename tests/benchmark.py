"""What training costs: pictures per second, forward passes, memory; and against a textbook's loop.

    python tests/benchmark.py                                  ResNet-18, batch 128
    python tests/benchmark.py --baseline --methods "Backward Smoothing" "Fast AT" TRADES
    python tests/benchmark.py --arch resnet18 wrn-28-10 --precision bf16 fp32 --batch-size 64 128
    python tests/benchmark.py --evaluate runs/.../best.pt      PGD with dropping; folded BatchNorm
    python tests/benchmark.py --scale                          start-up; 1,000 to 50,000 pictures

There is a row for each method, architecture, precision and batch size, the median of --steps
rounds. In each round every method takes one step, from drawing the batch to the optimiser, between
forward passes of its network, to which `measured` compares it: so a busy machine shifts both.
--baseline takes a textbook's step right after: fp32, NCHW, a DataLoader with workers and transforms
on the CPU, loss.backward() in the attack, no forward pass shared; and prints the ratio. `outside %`
is the share of a step's time outside of the network's forward and backward passes. Not for pytest.
"""

import argparse
import contextlib
import copy
import ctypes
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).parent.parent))

import backward_smoothing  # noqa: E402
import common  # noqa: E402
import data  # noqa: E402
import fast_at  # noqa: E402
import fast_bat  # noqa: E402
import kd_swa  # noqa: E402
import models  # noqa: E402
import trades  # noqa: E402
from bookkeeping import load_model  # noqa: E402

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
EPS = 8 / 255
STARTS, SIZES = 3, (1_000, 10_000, 50_000)  # of --scale


def ours(name, options, pictures):
    """One step of a method of this project, as its script takes it: (forward pass, step)."""
    module, words, _ = METHODS[name]
    words = ["--device", options.device, "--batch-size", str(options.batch_size), *words.split(),
             "--precision", options.precision, "--arch", options.arch,
             *(["--width", str(options.width)] if options.width else []),
             *(["--compile"] if options.compile else [])]
    args = module.parse_args(words)
    model, more = common.prepare_model(args, pictures).train(), ()
    if module is kd_swa:
        teachers = [common.prepare_model(args, pictures).eval().requires_grad_(False)] * 2
        more = [(0.25, lambda z, y, teacher=teacher: teacher(z)) for teacher in teachers],
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, fused=True)

    def batches():
        for epoch in range(10**9):
            yield from data.batches(pictures, args, epoch)

    def step(batches=batches()):
        x, y = next(batches)
        loss = module.training_loss(model, x, y, args, *more)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def forward(x=pictures.train[0][:options.batch_size].float() / 255):
        with torch.no_grad():
            model(x)
    return forward, step


# ------------------------------------------------------------------------------------ the textbook

class Pictures(Dataset):
    """As torchvision's CIFAR10: a picture is made from an array, cropped and flipped by PIL."""

    def __init__(self, x, y):
        self.x, self.y = x.permute(0, 2, 3, 1).numpy(), y.tolist()
        self.transform = transforms.Compose([
            transforms.ToPILImage(), transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(), transforms.ToTensor()])

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        return self.transform(self.x[i]), self.y[i]


def kl(model, x_adv, x):
    """KL between the predictions, with both forward passes."""
    return F.kl_div(F.log_softmax(model(x_adv), 1), F.softmax(model(x), 1), reduction="sum")


def climb(model, x_adv, x, alpha, objective):
    """One step by loss.backward(), which also fills the weights' gradients."""
    x_adv = x_adv.detach().requires_grad_()
    objective(x_adv).backward()
    x_adv = x_adv.detach() + alpha * x_adv.grad.sign()
    return torch.min(torch.max(x_adv, x - EPS), x + EPS).clamp(0, 1)


def textbook_fast_at(model, x, y, steps=1):
    x_adv = (x + torch.empty_like(x).uniform_(-EPS, EPS)).clamp(0, 1)
    alpha = {1: 1.25, 2: 0.5}.get(steps, 0.25) * EPS
    for _ in range(steps):
        x_adv = climb(model, x_adv, x, alpha, lambda z: F.cross_entropy(model(z), y))
    return F.cross_entropy(model(x_adv), y)


def textbook_trades(model, x, y, steps=10, init=0.001):
    model.eval()
    x_adv = x + init * torch.randn_like(x)
    for _ in range(steps):
        x_adv = climb(model, x_adv, x, EPS / 4, lambda z: kl(model, z, x))
    model.train()
    return F.cross_entropy(model(x), y) + 6 / len(x) * kl(model, x_adv, x)


def textbook_backward_smoothing(model, x, y):
    model.eval()
    with torch.no_grad():
        target = model(x) + 2 * torch.rand(len(x), 10, device=x.device) - 1
        target = F.softmax(target, 1)
    x_adv = climb(model, x, x, -EPS, lambda z: F.kl_div(
        F.log_softmax(model(z), 1), target, reduction="sum"))
    x_adv = climb(model, x_adv, x, EPS, lambda z: kl(model, z, x))
    model.train()
    return F.cross_entropy(model(x), y) + 10 / len(x) * kl(model, x_adv, x)


TEXTBOOK = {
    "standard training": lambda *batch: textbook_fast_at(*batch, steps=0),
    "Fast AT": textbook_fast_at,
    "PGD-2-AT": lambda *batch: textbook_fast_at(*batch, steps=2),
    "PGD-10-AT": lambda *batch: textbook_fast_at(*batch, steps=10),
    "TRADES": textbook_trades,
    "Fast TRADES": lambda *batch: textbook_trades(*batch, steps=1, init=EPS),
    "Fast TRADES (2-step)": lambda *batch: textbook_trades(*batch, steps=2, init=EPS),
    "Backward Smoothing": textbook_backward_smoothing,
}


def textbook(name, options, pictures):
    """The same method's step as the field's repositories write it."""
    network = models.build_model(options.arch, 10, options.width).to(options.device)
    for module in network.modules():
        if isinstance(module, torch.nn.ReLU):
            module.inplace = False
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9)
    loader = DataLoader(Pictures(*(part.cpu() for part in pictures.train)), options.batch_size,
                        shuffle=True, num_workers=2, drop_last=True, persistent_workers=True,
                        pin_memory=options.device == "cuda")

    class Plain(torch.nn.Module):
        """The network in NCHW and fp32, as it is without this project's Classifier.forward."""

        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, x):
            return network.logits((x - network.mean) / network.std)
    model = Plain()

    def batches():
        while True:
            yield from loader

    def step(batches=batches()):
        x, y = (part.to(options.device, non_blocking=True) for part in next(batches))
        loss = TEXTBOOK[name](model, x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return step


# ------------------------------------------------------------------------------------- measurement

def peak_memory(device, step):
    """MiB at most in use within a step: of the GPU, or of the process on Linux, else 0."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() / 2**20
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what other methods used is kept (common.keep_memory)
        Path("/proc/self/clear_refs").write_text("5")
        step()
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
    return 0.0


@contextlib.contextmanager
def inside_passes(device):
    """A list that gets the seconds of each forward and backward pass; on a GPU, which works while
    the host goes on, these mean nothing, and it gets none."""
    found, depth = [], []

    def timed(function):
        def call(*args, **kwargs):
            depth.append(time.perf_counter())
            try:
                return function(*args, **kwargs)
            finally:
                start = depth.pop()
                if not depth:  # a pass within a pass is counted with it
                    found.append(time.perf_counter() - start)
        return call
    places = [(models.Classifier, "forward"), (torch.autograd, "grad"), (torch.Tensor, "backward")]
    with contextlib.ExitStack() as stack:
        for owner, name in places if device == "cpu" else []:
            genuine = getattr(owner, name)
            stack.callback(setattr, owner, name, genuine)
            setattr(owner, name, timed(genuine))
        yield found


def judge(options):
    """PGD-50-10 with and without dropping what is fooled, and a network with BatchNorm folded and
    not: what each saves, on the test pictures of a checkpoint."""
    model, settings = load_model(options.evaluate, options.device)
    test = data.load_data(argparse.Namespace(**settings | dict(device=options.device))).test
    order = torch.randperm(len(test[1]), generator=torch.Generator().manual_seed(0))
    x, y = (part[order[:options.n_examples].to(options.device)] for part in test)
    eps, norm, found = settings["eps"], settings["norm"], []
    for kept in (True, False):
        generator = torch.Generator(options.device).manual_seed(0)

        def pgd(network, x, y, restarts):
            return common.pgd_attack(network, x, y, eps, eps / 4, options.pgd_steps, restarts, norm,
                                     generator=generator)
        start = time.perf_counter()
        right = common.still_right(model, x, y)
        if kept:
            right[right.clone()] = common.still_right(
                model, x[right], y[right], lambda *batch: pgd(*batch, 10))
        else:  # every picture, in every restart, right or not
            for _ in range(10):
                right &= common.still_right(model, x, y, lambda *batch: pgd(*batch, 1))
        found.append((time.perf_counter() - start, right.float().mean().item()))
    (dropping, robust), (all_of_them, same) = found
    print(f"PGD-{options.pgd_steps}-10 on {len(y)} pictures, robust {robust:.3f} ({same:.3f} with "
          f"other noise): {dropping:.1f} s with dropping, {all_of_them:.1f} s without; "
          f"{dropping / all_of_them:.2f} of it")
    plain, picture, rounds = copy.deepcopy(model).eval().requires_grad_(False), x[:128] / 255, []
    with common.exact(model) as network:
        for _ in range(options.steps + 1):
            for one in (network, plain):
                start = time.perf_counter()
                point = picture.clone().requires_grad_()
                loss = common.cross_entropy(one(point), y[:128])
                torch.autograd.grad(loss, point)[0].sum().item()  # waits for a GPU
                rounds.append((time.perf_counter() - start) / len(point) * 1e6)
    folded, unfolded = (statistics.median(rounds[i::2][1:]) for i in (0, 1))
    print(f"a forward pass and its input gradient: {folded:.0f} us a picture with BatchNorm "
          f"folded, {unfolded:.0f} without")


def scale(combinations):
    """The seconds from the command line to the end of the first step on `shapes`, and those of an
    epoch of Fast AT by the number of its pictures."""
    device = combinations[0].device
    first_step = ("import os, bookkeeping, common, fast_at\n"
                  "bookkeeping.progress = lambda *_: lambda done: os._exit(0)\n"
                  "common.main(fast_at.parse_args, fast_at.train)")
    for _ in range(STARTS):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", first_step, "--dataset", "shapes", "--device",
                            device, "--out", f"{folder}/run"], check=True,
                           cwd=Path(__file__).parent.parent, stdout=subprocess.DEVNULL)
            print(f"start to first step: {time.perf_counter() - start:.1f} s")
    for options, n in itertools.product(combinations, SIZES):
        part = torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8).to(device)
        part = part, torch.randint(10, (n,), device=device)
        _, step = ours("Fast AT", options, data.Data(part, part, part, list("0123456789"), True))
        step()
        torch.get_device_module(device).synchronize()
        start = time.perf_counter()
        for _ in range(n // options.batch_size):
            step()
        torch.get_device_module(device).synchronize()
        taken = time.perf_counter() - start
        print(f"{options.arch}, {options.precision}, batch {options.batch_size}: {n:6,} pictures, "
              f"{taken:6.2f} s an epoch, {1e3 * taken / n:.3f} ms a picture")


def matrix_rate(device):
    """bf16 operations per second of a large matrix product, or 0 where there is no CUDA."""
    if not device.startswith("cuda"):
        return 0.0
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    for times in (5, 50):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(times):
            a @ a
        torch.cuda.synchronize()
    return times * 2 * 8192**3 / (time.perf_counter() - start)


def compare(options):
    """Measures options.methods for one architecture, precision and batch size; prints and returns
    their rows."""
    part = torch.randint(256, (max(1024, options.batch_size), 3, 32, 32), dtype=torch.uint8)
    part = part.to(options.device), torch.randint(10, (len(part),), device=options.device)
    pictures = data.Data(part, part, part, list("0123456789"), True)
    methods = {name: ours(name, options, pictures) for name in options.methods}
    baselines = {name: textbook(name, options, pictures) for name in options.methods
                 if options.baseline and name in TEXTBOOK}

    def seconds(function, times=1):
        torch.get_device_module(options.device).synchronize()
        start = time.perf_counter()
        for _ in range(times):
            function()
        torch.get_device_module(options.device).synchronize()
        return (time.perf_counter() - start) / times

    measured, peaks = {name: [] for name in methods}, {}
    for i in range(options.steps + 1):
        for name, (forward, step) in methods.items():
            before = seconds(forward, 3)
            with inside_passes(options.device) as passes:
                taken = seconds(step)
            after, outside = seconds(forward, 3), 100 * (1 - sum(passes) / taken)
            slow = seconds(baselines[name]) if name in baselines else 0.0
            if i:
                measured[name].append((taken / (before + after) * 2, taken, slow / taken, outside))
            else:  # the first round warms up
                peaks[name] = peak_memory(options.device, step)
    network = models.build_model(options.arch, 10, options.width).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 3, 32, 32))
    rows = []
    for name, rounds in measured.items():
        passes, taken, faster, outside = zip(*rounds)
        formula, speed = METHODS[name][2], options.batch_size / statistics.median(taken)
        row = dict(method=name, arch=options.arch, precision=options.precision,
                   batch_size=options.batch_size, pictures_per_second=speed,
                   seconds_per_epoch=50_000 / speed, formula=formula,
                   measured=statistics.median(passes), lowest=min(passes), highest=max(passes),
                   mebibytes=peaks[name])
        line = (f"{name:22}{options.arch:15}{options.precision:>9}{options.batch_size:7}"
                f"{speed:11.1f}{50_000 / speed:9.1f}{formula:9}{row['measured']:10.1f}"
                f"{f'{min(passes):.1f}-{max(passes):.1f}':>14}{peaks[name]:7.0f}")
        if options.device == "cpu":
            row["outside_percent"] = statistics.median(outside)
            line += f"{row['outside_percent']:11.1f}"
        if options.matrix_rate:
            row["matrix_rate_percent"] = (100 * formula * counter.get_total_flops() * speed
                                          / options.matrix_rate)
            line += f"{row['matrix_rate_percent']:15.1f}"
        if name in baselines:
            row |= dict(faster=statistics.median(faster), slowest=min(faster), fastest=max(faster))
            line += f"{row['faster']:12.2f}{f'{min(faster):.2f}-{max(faster):.2f}':>14}"
        rows.append(row)
        print(line, flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=["resnet18"], choices=models.ARCHS,
                        metavar="NAME")
    parser.add_argument("--width", type=int)
    parser.add_argument("--batch-size", nargs="+", type=int, default=[128])
    parser.add_argument("--precision", nargs="+", default=["auto"],
                        choices=["auto", "fp32", "bf16"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS, metavar="NAME")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--baseline", action="store_true")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--evaluate", metavar="CKPT", help="time the evaluation of this instead")
    parser.add_argument("--scale", action="store_true", help="time the start and an epoch instead")
    parser.add_argument("--n-examples", type=int, default=150, help="for --evaluate")
    parser.add_argument("--pgd-steps", type=int, default=50, help="for --evaluate")
    options = parser.parse_args()
    options.device = common.find_device(options.device)
    common.keep_memory()
    if options.evaluate:
        return judge(options)
    usual = fast_at.parse_args(["--device", options.device]).precision
    combinations = [
        argparse.Namespace(**vars(options) | dict(
            arch=arch, precision=usual if precision == "auto" else precision, batch_size=size))
        for arch, precision, size in itertools.product(
            options.arch, options.precision, options.batch_size)]
    if options.scale:
        return scale(combinations)
    rate = matrix_rate(options.device)
    print(f"{options.device}, {torch.get_num_threads()} threads, torch {torch.__version__}, width "
          f"{options.width or 'default'}{', compiled' * options.compile}")
    print(f"{'method':22}{'architecture':15}{'precision':>9}{'batch':>7}{'pictures/s':>11}"
          f"{'s/epoch':>9}{'formula':>9}{'measured':>10}{'(range)':>14}{'MiB':>7}"
          + f"{'outside %':>11}" * (options.device == "cpu") + f"{'matrix rate %':>15}" * bool(rate)
          + f"{'times faster (range)':>26}" * options.baseline)
    rows = []
    for each in combinations:
        each.matrix_rate = rate
        rows += compare(each)
    if options.json:
        Path(options.json).write_text(json.dumps(dict(options=vars(options) | dict(
            methods=list(options.methods)), rows=rows), indent=1))


if __name__ == "__main__":
    main()
