"""What training costs: images per second, forward passes, memory; and against a textbook's loop.

    python tests/benchmark.py                                  ResNet-18, batch 128
    python tests/benchmark.py --baseline --methods "Backward Smoothing" "Fast AT" TRADES
    python tests/benchmark.py --arch resnet18 wrn-28-10 --precision bf16 fp32 --batch-size 64 128

There is a row for each method, architecture, precision and batch size: the median of --steps
rounds. In each round every method takes one step, from drawing the batch to the optimizer, between
forward passes of its network; their ratio is `measured`, and a busy machine slows both down. The
method is what stands between the markers of its script. `formula` is what theory says: a forward
pass counts 1, its gradient in the input 1 more, that in the weights 2 more. --baseline takes a
textbook's step right after: fp32, NCHW, a DataLoader with workers and transforms on the CPU,
loss.backward() in the attack, no forward pass shared; and prints the ratio. Not for pytest.
"""

import argparse
import ctypes
import itertools
import json
import statistics
import sys
import time
import types
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).parent.parent))

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
    "KD-SWA": (kd_swa, "", 10 * 2 + 3 + 2),
}
TWICE = ("GradAlign", "Fast-BAT")  # they differentiate twice, which torch.compile does not support
EPS = 8 / 255


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


# ------------------------------------------------------------------------------------ the textbook
class Images(Dataset):
    """As torchvision's CIFAR10: an image is made from an array, cropped and flipped by PIL."""

    def __init__(self, x, y):
        self.x, self.y = x.permute(0, 2, 3, 1).numpy(), y.tolist()
        self.transform = transforms.Compose([
            transforms.ToPILImage(), transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(), transforms.ToTensor()])

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        return self.transform(self.x[i]), self.y[i]


class Plain(nn.Module):
    """A network of ours in NCHW and fp32, without what Classifier.forward does for speed."""

    def __init__(self, network):
        super().__init__()
        self.network = network.to(memory_format=torch.contiguous_format)
        for module in network.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False

    def forward(self, x):
        return nn.Sequential.forward(self.network, (x - self.network.mean) / self.network.std)


def kl(model, x_adv, x):
    """KL between the predictions, with both forward passes."""
    return F.kl_div(F.log_softmax(model(x_adv), 1), F.softmax(model(x), 1), reduction="sum")


def climb(x_adv, x, alpha, objective):
    """One step by loss.backward(), which also fills the weights' gradients."""
    x_adv = x_adv.detach().requires_grad_()
    objective(x_adv).backward()
    x_adv = x_adv.detach() + alpha * x_adv.grad.sign()
    return torch.min(torch.max(x_adv, x - EPS), x + EPS).clamp(0, 1)


def textbook_fast_at(model, x, y, steps=1):
    x_adv = (x + torch.empty_like(x).uniform_(-EPS, EPS)).clamp(0, 1) if steps else x
    alpha = {1: 1.25, 2: 0.5}.get(steps, 0.25) * EPS
    for _ in range(steps):
        x_adv = climb(x_adv, x, alpha, lambda z: F.cross_entropy(model(z), y))
    return F.cross_entropy(model(x_adv), y)


def textbook_trades(model, x, y, steps=10):
    model.eval()
    x_adv = x + 0.001 * torch.randn_like(x)
    if steps <= 2:
        x_adv = (x + torch.empty_like(x).uniform_(-EPS, EPS)).clamp(0, 1)
    for _ in range(steps):
        x_adv = climb(x_adv, x, (0.75 if steps <= 2 else 0.25) * EPS, lambda z: kl(model, z, x))
    model.train()
    return F.cross_entropy(model(x), y) + 6 / len(x) * kl(model, x_adv, x)


def textbook_backward_smoothing(model, x, y):
    model.eval()
    with torch.no_grad():
        logits = model(x)
        target = F.softmax(logits + torch.empty_like(logits).uniform_(-1, 1), 1)
    x_adv = climb(x, x, -EPS, lambda z: F.kl_div(
        F.log_softmax(model(z), 1), target, reduction="sum"))
    x_adv = climb(x_adv, x, EPS, lambda z: kl(model, z, x))
    model.train()
    return F.cross_entropy(model(x), y) + 10 / len(x) * kl(model, x_adv, x)


TEXTBOOK = {
    "standard training": lambda *batch: textbook_fast_at(*batch, steps=0),
    "Fast AT": textbook_fast_at,
    "PGD-2-AT": lambda *batch: textbook_fast_at(*batch, steps=2),
    "PGD-10-AT": lambda *batch: textbook_fast_at(*batch, steps=10),
    "TRADES": textbook_trades,
    "Fast TRADES": lambda *batch: textbook_trades(*batch, steps=1),
    "Fast TRADES (2-step)": lambda *batch: textbook_trades(*batch, steps=2),
    "Backward Smoothing": textbook_backward_smoothing,
}


def textbook(name, options, data):
    """The same method's step as the field's repositories write it."""
    model = Plain(common.Classifier(options.arch, 10, options.width)).to(options.device)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
    loader = DataLoader(Images(*(part.cpu() for part in data.train[:2])), options.batch_size,
                        shuffle=True, num_workers=2, drop_last=True, persistent_workers=True,
                        pin_memory=options.device == "cuda")

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
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        ctypes.CDLL(None).malloc_trim(0)  # gives back what other methods used
        Path("/proc/self/clear_refs").write_text("5")
        step()
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
    except (OSError, AttributeError):
        return 0.0


def compare(options):
    """Measures options.methods for one architecture, precision and batch size; prints and returns
    their rows."""
    n, device = max(1024, options.batch_size), options.device
    x = torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8, device=device)
    part = x, torch.randint(10, (n,), device=device)
    data = common.Data((*part, torch.arange(n, device=device)), part, part, list("0123456789"),
                       flip=True)
    methods = {name: ours(name, options, data) for name in options.methods}
    baselines = {name: textbook(name, options, data) for name in options.methods
                 if options.baseline and name in TEXTBOOK}

    def seconds(function, times=1):
        torch.get_device_module(device).synchronize()
        start = time.perf_counter()
        for _ in range(times):
            function()
        torch.get_device_module(device).synchronize()
        return (time.perf_counter() - start) / times

    measured, peaks, rows = {name: [] for name in methods}, {}, []
    for i in range(options.steps + 1):
        for name, (forward, step) in methods.items():
            before, taken, after = seconds(forward, 3), seconds(step), seconds(forward, 3)
            slow = seconds(baselines[name]) if name in baselines else 0.0
            if i:
                measured[name].append((taken / (before + after) * 2, taken, slow / taken))
            else:  # the first round warms up
                peaks[name] = peak_memory(device, step)
    for name, rounds in measured.items():
        passes, taken, faster = zip(*rounds)
        formula, speed = METHODS[name][2], options.batch_size / statistics.median(taken)
        row = dict(method=name, arch=options.arch, precision=options.precision,
                   batch_size=options.batch_size, images_per_second=speed,
                   seconds_per_epoch=50_000 / speed, formula=formula,
                   measured=statistics.median(passes), lowest=min(passes), highest=max(passes),
                   mebibytes=peaks[name])
        line = (f"{name:22}{options.arch:18}{options.precision:>9}{options.batch_size:7}"
                f"{speed:11.1f}{50_000 / speed:9.1f}{formula:9}{row['measured']:10.1f}"
                f"{f'{min(passes):.1f}-{max(passes):.1f}':>14}{peaks[name]:7.0f}")
        if name in baselines:
            row |= dict(faster=statistics.median(faster), slowest=min(faster), fastest=max(faster))
            line += f"{row['faster']:12.2f}{f'{min(faster):.2f}-{max(faster):.2f}':>14}"
        rows.append(row)
        print(line, flush=True)
    return rows


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
    add("--baseline", action="store_true")
    add("--json", metavar="FILE")
    options, rows = parser.parse_args(), []
    usual = fast_at.parse_args(["--device", options.device])
    options.device = usual.device
    print(f"{options.device}, {torch.get_num_threads()} threads, torch {torch.__version__}, width "
          f"{options.width or 'default'}{', compiled' * options.compile}")
    print(f"{'method':22}{'architecture':18}{'precision':>9}{'batch':>7}{'images/s':>11}"
          f"{'s/epoch':>9}{'formula':>9}{'measured':>10}{'(range)':>14}{'MiB':>7}"
          + f"{'times faster (range)':>26}" * options.baseline)
    for arch, precision, size in itertools.product(options.arch, options.precision,
                                                   options.batch_size):
        rows += compare(argparse.Namespace(**vars(options) | dict(
            arch=arch, batch_size=size,
            precision=usual.precision if precision == "auto" else precision)))
    if options.json:
        Path(options.json).write_text(json.dumps(dict(options=vars(options), rows=rows), indent=1))


if __name__ == "__main__":
    common.progress = lambda items, *_: items  # there is no end whose distance could be shown
    main()
