"""What the method scripts share: options, attacks, accuracy under them, and the optimisation.

Pictures are floats in [0, 1], N x 3 x H x W, except where uint8 is said. The command line takes eps
and steps in pixels of 255; `pixels` divides by 255, once.
"""

import argparse
import contextlib
import ctypes
import datetime
import math
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from models import ACTIVATIONS, ARCHS, build_model, folded

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # of torchrun


class UserError(Exception):
    """Bad input: one line that says what is wrong and what to do; `main` exits with status 2."""


def keep_memory():
    """Tells glibc to keep what is freed. Otherwise large tensors come and go with pages that the
    system has to clear each time: up to a third of a step in fp32 on a CPU."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            libc.mallopt(option, 2**31 - 1)


def main(parse_args, run):
    """Runs a script, run(parse_args()). Bad input, a full disk or memory, Ctrl-C, a scheduler's
    SIGTERM and the loss of one of torchrun's processes end in one line and status 2."""
    args = argparse.Namespace(out=None)
    keep_memory()
    handler = signal.signal(signal.SIGTERM, signal.default_int_handler)  # the same as Ctrl-C
    try:
        args = parse_args()
        if WORLD > 1:  # one may have to download and decode while the others wait
            dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo",
                                    timeout=datetime.timedelta(hours=2))
        return run(args)
    except UserError as error:
        message = error
    except OSError as error:
        message = f"{error.filename or 'input or output'}: {error.strerror or error}"
    except (KeyboardInterrupt, MemoryError, RuntimeError) as error:
        message = why_it_stopped(error)
        if not message:
            raise
        if args.out and Path(args.out, "args.json").exists():
            last = Path(args.out, "last.pt")
            kept = f"{last} holds all finished epochs" if last.exists() else "no epoch is finished"
            message += f": {kept}; the same command with --out {args.out} --resume goes on"
    finally:
        # To those that are ending already torchrun sends it once more.
        signal.signal(signal.SIGTERM, signal.SIG_IGN if WORLD > 1 else handler)
        if dist.is_initialized():
            dist.destroy_process_group()
    where = f"process {RANK + 1} of {WORLD}: " if WORLD > 1 else ""
    message = " ".join(str(message).split())  # one line, whatever a file's name holds
    print(f"{Path(sys.argv[0]).name}: error: {where}{message}", file=sys.stderr)
    raise SystemExit(2)


def why_it_stopped(error):
    """The words for an interruption that is nobody's mistake; None for all other errors."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, dist.DistError) or "gloo" in str(error):
        return "another process has ended, and none can go on alone"
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't alloc" in str(error):
        return "out of memory (a smaller --batch-size or --width takes less)"


def say(text):
    if RANK == 0:
        print(text, flush=True)


def progress(what, total, done=0):
    """Returns show(done), which tells the time left on stderr: in one line that is rewritten on a
    terminal, in a new line every 20 s elsewhere."""
    terminal, first, start = sys.stderr.isatty(), done, time.perf_counter()
    shown = start

    def show(done):
        nonlocal shown
        now = time.perf_counter()
        if RANK == 0 and now - shown > (0.2 if terminal else 20):
            left = round((now - start) / (done - first) * (total - done))
            line = f"{what} {done}/{total}, {left // 60}:{left % 60:02} left"
            print(f"{line:60}", end="\r" if terminal else "\n", file=sys.stderr, flush=True)
            shown = now
    return show


# ---------------------------------------------------------------------------------------- options

DATASETS = "cifar10, cifar100, svhn, stl10, tiny-imagenet, shapes"
SHAPES_DEFAULTS = dict(arch="resnet10", width=16, epochs=8, batch_size=64, val_size=200,
                       lr_schedule="cyclic")


def number(kind, low, high=2**31):
    """An argparse type: an int or float in [low, high]."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            limit = f"at most {high}" if value > high else f"at least {low}"
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {limit}")
        return value
    parse.__name__ = "number"  # argparse says "invalid number value: 'x'"
    return parse


def pixels(text):
    """Pixels of 255 on the command line, [0, 1] units in the program: '8' -> 8/255."""
    if not 0 < float(text) <= 255:
        raise argparse.ArgumentTypeError(f"{text} is out of range: above 0 and at most 255 pixels")
    return float(text) / 255


class Parser(argparse.ArgumentParser):
    """Names itself after `script`, a __file__, and tells a bad option in one line."""

    class Format(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
        pass

    def __init__(self, script, doc):
        super().__init__(Path(script).name, description=doc, formatter_class=self.Format)
        add = self.add_argument_group("options of pictures and machine").add_argument
        add("--data-dir", metavar="DIR", help="where data sets are kept and cached")
        add("--image-size", type=number(int, 32, 4096), metavar="PIXELS",
            help="bring the shorter side to this, and crop the middle; None: as they are")
        add("--stream", action="store_true",
            help="read a folder's pictures when they are needed, even where all fit into memory")
        add("--on-bad-file", default="stop", choices=["stop", "skip"],
            help="what to do at a picture that cannot be read; in a test, a skipped one is wrong")
        add("--device", default="auto", help="auto (CUDA, else MPS, else CPU), or one of torch's")

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n" if RANK == 0 else None)

    def parse_args(self, argv=None):
        """As usual, with the device looked up, and paths that can be found again from anywhere."""
        args = super().parse_args(argv)
        for name in ("dataset", "data_dir"):
            path = getattr(args, name)
            if path and path not in DATASETS.split(", "):
                setattr(args, name, os.path.abspath(path))
        args.device = find_device(args.device)
        return args


class TrainingParser(Parser):
    """The options that all methods have; `defaults` are those of the method's paper."""

    def __init__(self, script, doc, **defaults):
        super().__init__(script, doc)
        count, positive, share = number(int, 1), number(float, 1e-9), number(float, 0, 1)
        add = self.add_argument_group("options of every method").add_argument
        add("--dataset", default="cifar10", help=f"{DATASETS}, or a folder of pictures")
        add("--arch", default="resnet18", choices=ARCHS, metavar="NAME", help=", ".join(ARCHS))
        add("--width", type=number(int, 8), help="channels of the first stage; None: 64, wrn 16 K")
        add("--activation", default="relu", choices=ACTIVATIONS, help="after each BatchNorm")
        add("--eps", type=pixels, default="8", metavar="PIXELS", help="radius of the attack")
        add("--norm", default="linf", choices=["linf", "l2"], help="norm of that radius")
        add("--attack-bn", choices=["eval", "train"], help="BatchNorm in the training attack")
        add("--epochs", type=count, help="passes over the training set")
        add("--batch-size", type=count, default=128, help="pictures per step")
        add("--lr", type=positive, default=0.1, help="the highest learning rate")
        add("--lr-schedule", default="piecewise", choices=["piecewise", "cyclic"],
            help="divided by 10 at each milestone, or up to --lr at half time and back to 0")
        add("--milestones", type=share, nargs="+", default=[0.5, 0.75], help="parts of --epochs")
        add("--weight-decay", type=number(float, 0), default=5e-4, help="on all parameters")
        add("--val-size", type=count, default=1000, help="training pictures held out for best.pt")
        add("--train-size", type=count, help="use only so many training pictures; None: all")
        add("--label-noise", type=share, default=0.0, help="share of training labels made wrong")
        add("--keep-epochs", action="store_true", help="keep a checkpoint of every epoch")
        add("--seed", type=number(int, 0, 2**31), default=0, help="of weights, order and noise")
        add("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"],
            help="of training; auto: bf16 where the hardware has it. Results are always fp32")
        add("--compile", action="store_true", help="torch.compile the network for training")
        add("--out", metavar="DIR", help="run folder; None: runs/METHOD-DATASET-ARCH-epsE-seedS")
        add("--resume", action="store_true", help="go on with the run in that folder")
        self.set_defaults(method=Path(script).stem, processes=WORLD, data_dir="data", **defaults)

    def parse_args(self, argv=None):
        """The defaults that depend on the data set or the machine are resolved here."""
        if self.parse_known_args(argv)[0].dataset == "shapes":
            self.set_defaults(**SHAPES_DEFAULTS)
        args = super().parse_args(argv)
        if args.precision == "auto":
            native = (torch.cuda.is_bf16_supported(False) if args.device.startswith("cuda") else
                      args.device == "cpu" and torch.cpu._is_avx512_bf16_supported())
            args.precision = "bf16" if native else "fp32"
        if args.batch_size % WORLD:
            self.error(f"--batch-size {args.batch_size} cannot be shared by {WORLD} processes")
        return args


def find_device(name):
    """'auto' or a device of torch -> the name of a device that is here; of torchrun's processes
    each takes a GPU of its own."""
    if name == "auto":
        name = ("cuda" if torch.cuda.is_available() else
                "mps" if torch.backends.mps.is_available() else "cpu")
    if name == "cuda" and WORLD > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.zeros(1, device=name).item()
    except Exception:  # what is raised depends on the device
        raise UserError(f"no device '{name}' here: leave out --device, or say cpu") from None
    if name.startswith("cuda:"):
        torch.cuda.set_device(name)
    return name


# ---------------------------------------------------------------------------------------- attacks

@contextlib.contextmanager
def attacking(model, x, bn="eval"):
    """Surrounds every attack on x: BatchNorm uses its running ("eval") or the batch's ("train")
    statistics and updates none; modes are restored. ValueError unless 0 <= x <= 1."""
    inside = ((x >= 0) & (x <= 1)).all()
    if x.device.type == "cuda":
        torch._assert_async(inside)  # does not make the host wait
    elif not inside:
        raise ValueError("attacks take pictures in [0, 1]: normalise inside the model")
    before = [(module, module.training) for module in model.modules()]
    norms = [module for module, _ in before if isinstance(module, nn.BatchNorm2d)]
    # Autograd leaves out the gradients that nobody asked for, here the weights'; compiled code,
    # which knows no call but its own, can only if they are frozen.
    compiled = getattr(model, "compiled", False)
    frozen = [weight for weight in model.parameters() if compiled and weight.requires_grad]
    for weight in frozen:
        weight.requires_grad_(False)
    model.train(bn == "train")
    for module in norms:
        module.track_running_stats = False  # in train mode: batch statistics, kept nowhere
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
        for module in norms:
            module.track_running_stats = True
        for weight in frozen:
            weight.requires_grad_(True)


@contextlib.contextmanager
def exact(model):
    """How every reported number is computed: on a copy in fp32 and eval mode, not compiled, with
    BatchNorm folded into the convolutions; deterministic, and without TF32."""
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        yield folded(model)


def l2_norm(x):
    return x.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def project(x_adv, x, eps, norm="linf"):
    """P: pulls x_adv back into the eps-ball around x, and into [0, 1]."""
    delta = x_adv - x
    delta = delta.clamp(-eps, eps) if norm == "linf" else delta * (eps / l2_norm(delta).clamp(eps))
    return (x + delta).clamp(0, 1)


def step(x_adv, gradient, x, eps, alpha, norm="linf"):
    """P(x_adv + alpha direction): the gradient's sign for Linf, its direction for L2. alpha < 0
    descends; units of [0, 1], one for all pictures or N x 1 x 1 x 1."""
    direction = (gradient.sign() if norm == "linf" else
                 gradient / l2_norm(gradient).clamp(min=1e-12))
    return project(x_adv.detach() + alpha * direction, x, eps, norm)


def random_start(x, eps, norm="linf", generator=None):
    """A point drawn uniformly from the eps-ball around x, then clipped to [0, 1]."""
    if norm == "linf":
        noise = torch.empty_like(x).uniform_(-1, 1, generator=generator)
    else:
        noise = torch.empty_like(x).normal_(generator=generator)
        radius = torch.empty_like(x[:, :1, :1, :1]).uniform_(generator=generator)
        noise *= radius ** (1 / x[0].numel()) / l2_norm(noise)
    return (x + eps * noise).clamp(0, 1)


def cross_entropy(logits, y):
    """Summed, not averaged: a mean over a large batch makes gradients vanish in fp16."""
    return F.cross_entropy(logits, y, reduction="sum")


def margin(logits, y):
    """Carlini & Wagner's margin, N: the highest wrong logit minus the true one."""
    true = F.one_hot(y, logits.shape[1]).bool()
    return logits.masked_fill(true, -math.inf).amax(1) - logits[true]


def pgd_attack(model, x, y, eps, alpha, steps, restarts=1, norm="linf", loss="ce", generator=None):
    """Projected gradient ascent (Madry et al. 2018) on loss "ce" or "margin", from random starts.

    x N x 3 x H x W in [0, 1], labels y; eps, alpha in units of [0, 1]. A restart attacks only what
    the earlier ones left right. Returns x_adv: the end of the restart that fooled the model, or
    of the last one. ValueError for x outside [0, 1].
    """
    objective = {"ce": cross_entropy, "margin": lambda *args: margin(*args).sum()}[loss]
    x_adv, right = x.clone(), torch.arange(len(x), device=x.device)
    with attacking(model, x):
        for _ in range(restarts):
            # Drawn for all of them, so that leaving some out changes nothing for the others.
            point = random_start(x, eps, norm, generator)[right]
            if not len(right):
                continue
            clean, label = x[right], y[right]
            for _ in range(steps):
                point.requires_grad_()
                gradient, = torch.autograd.grad(objective(model(point), label), point)
                point = step(point, gradient, clean, eps, alpha, norm)
            x_adv[right] = point
            with torch.no_grad():
                right = right[model(point).argmax(1) == label]
    return x_adv


def dlr_loss(logits, y, target=None):
    """Difference-of-logits ratio (Croce & Hein 2020), N: -(z_y - z_other) / (z_1 - z_3), where
    z_1 >= z_2 >= ... are the sorted logits and other is the likeliest wrong class (eq. 6). With
    targets N it is the target, over z_1 - (z_3 + z_4) / 2 (eq. 7). For 3 and 4 classes at least."""
    first, _, third, *fourth = logits.topk(3 if target is None else 4).values.T
    if target is None:
        target = logits.scatter(1, y[:, None], -math.inf).argmax(1)
    else:
        third = (third + fourth[0]) / 2
    true, other = (logits.gather(1, label[:, None])[:, 0] for label in (y, target))
    return (other - true) / (first - third).clamp(min=1e-12)


def apgd_loss(logits, y, target=None, loss="ce"):
    """What Auto-PGD climbs, N: cross-entropy or DLR, for a target minus its cross-entropy or the
    targeted DLR. Fewer classes than DLR needs: cross-entropy."""
    if loss == "dlr" and logits.shape[1] >= (3 if target is None else 4):
        return dlr_loss(logits, y, target)
    if target is None:
        return F.cross_entropy(logits, y, reduction="none")
    return -F.cross_entropy(logits, target, reduction="none")


def apgd_checkpoints(steps):
    """The iterations after which Auto-PGD looks back: w_j = ceil(p_j steps) (section 3.2)."""
    before, now, found = 0.0, 0.22, []
    while now <= 1:
        found.append(math.ceil(now * steps - 1e-9))
        before, now = now, now + max(now - before - 0.03, 0.06)
    return found


def must_halve(rises, steps, halved, best, best_before):
    """Auto-PGD's rule for its step size, bool N: halve where fewer than 3/4 of the last `steps`
    steps rose, or where neither the size nor the best value has changed since the last look."""
    return (rises < 0.75 * steps) | ~halved & (best <= best_before)


def apgd_attack(model, x, y, eps, steps=100, norm="linf", loss="ce", target=None, generator=None):
    """Auto-PGD (Croce & Hein 2020, Algorithm 1), which finds its step size, from a random start.

    x N x 3 x H x W in [0, 1], labels y, targets N or None, loss "ce" or "dlr"; eps in units of
    [0, 1]. A picture that fools the model is attacked no further. Returns x_adv: what fooled the
    model, else the point of the highest loss. ValueError for x outside [0, 1].
    """
    def climb(point):
        """The loss and its gradient at `point`, and whether the model is right there."""
        logits = model(point.requires_grad_())
        value = apgd_loss(logits, labels[0], *labels[1:], loss=loss)
        gradient, = torch.autograd.grad(value.sum(), point)
        return point.detach(), value.detach(), gradient, logits.argmax(1) == labels[0]

    x_adv, index = x.clone(), torch.arange(len(x), device=x.device)
    labels = torch.stack([y] if target is None else [y, target])
    checkpoints, look = apgd_checkpoints(steps), 0
    with attacking(model, x):
        point, value, gradient, right = climb(random_start(x, eps, norm, generator))
        previous = best = point
        best_gradient, best_value, value_before = gradient, value, value
        size, rises = torch.full_like(x[:, :1, :1, :1], 2 * eps), torch.zeros_like(value)
        halved = torch.ones_like(right)  # the second condition has to wait for the second look
        for k in range(steps):
            if not right.all():
                x_adv[index[~right]], labels = point[~right], labels[:, right]
                (index, x, point, previous, value, gradient, best, best_gradient, best_value,
                 value_before, size, rises, halved) = (tensor[right] for tensor in (
                     index, x, point, previous, value, gradient, best, best_gradient, best_value,
                     value_before, size, rises, halved))
                if not len(index):
                    return x_adv
            if k in checkpoints:  # where the rule says so, halve the step and go back to the best
                halved = must_halve(rises, k - look, halved, best_value, value_before)
                there = halved.view(-1, 1, 1, 1)
                size = torch.where(there, size / 2, size)
                point = torch.where(there, best, point)
                gradient = torch.where(there, best_gradient, gradient)
                value = torch.where(halved, best_value, value)
                value_before, rises, look = best_value, torch.zeros_like(rises), k
            z = step(point, gradient, x, eps, size, norm)
            if k:
                z = project(point.lerp(z, 0.75) + 0.25 * (point - previous), x, eps, norm)
            previous, last = point, value
            point, value, gradient, right = climb(z)
            better, rises = value > best_value, rises + (value > last)
            best_value = torch.where(better, value, best_value)
            better = better.view(-1, 1, 1, 1)
            best = torch.where(better, point, best)
            best_gradient = torch.where(better, gradient, best_gradient)
        x_adv[index] = torch.where(right.view(-1, 1, 1, 1), best, point)
    return x_adv


def autoattack_lite_part(model, x, y, part, eps, norm="linf", steps=100, generator=None):
    """Part 0 of AutoAttack-lite is Auto-PGD on cross-entropy; part k, up to 9, is Auto-PGD on the
    targeted DLR loss for the kth likeliest wrong class. Arguments as for apgd_attack."""
    if part == 0:
        return apgd_attack(model, x, y, eps, steps, norm, generator=generator)
    with attacking(model, x), torch.no_grad():
        wrong = model(x).scatter(1, y[:, None], -math.inf)
    target = wrong.topk(part).indices[:, -1]
    return apgd_attack(model, x, y, eps, steps, norm, "dlr", target, generator)


def autoattack_lite(model, x, y, eps, norm="linf", steps=100, generator=None):
    """The white-box half of AutoAttack (Croce & Hein 2020): all parts in turn, each on what is
    still right; so an upper bound on the accuracy under AutoAttack. Arguments as for apgd_attack.
    """
    x_adv, index = x.clone(), torch.arange(len(x), device=x.device)
    for part in range(10):
        with attacking(model, x), torch.no_grad():
            logits = model(x_adv[index])
        index = index[logits.argmax(1) == y[index]]
        if part < logits.shape[1] and len(index):
            x_adv[index] = autoattack_lite_part(model, x[index], y[index], part, eps, norm, steps,
                                                generator)
    return x_adv


def total(x):
    """The sum of a tensor over torchrun's processes."""
    if WORLD > 1:
        dist.all_reduce(x)
    return x


def sum_of(parts, device):
    """The sum of the tensors in `parts`, of all processes, a number."""
    return total(sum((part.sum() for part in parts), torch.zeros((), device=device))).item()


def read(x, parts):
    """(index, x[index]) for each index tensor of `parts`, uint8; from disk if x is a data.Stream,
    which may leave out some of them."""
    return x.read(parts) if hasattr(x, "read") else ((index, x[index]) for index in parts)


def still_right(model, x, y, *attacks, batch_size=None, show=lambda done: None):
    """Which pictures the model gets right after all of the attacks(model, x, y) -> x_adv, of which
    each only sees what the earlier ones have left, in full batches; without any, which it gets
    right at all. bool N, computed in fp32. x uint8 N x 3 x H x W. `show` is told of N how many.
    Each of torchrun's processes takes its share, and all return the whole."""
    size, right = batch_size or (128 if y.device.type == "cpu" else 1000), torch.ones_like(y).bool()
    with exact(model) as network:
        for i, attack in enumerate(attacks or [lambda model, x, y: x]):
            left, done = right.nonzero()[RANK::WORLD, 0], 0
            right = torch.zeros_like(right)  # as those stay that cannot be read
            for index, picture in read(x, left.split(size) if len(left) else []):
                done += len(index)
                if len(index):  # else none of a part can be read
                    x_adv = attack(network, picture.float() / 255, y[index])
                    with torch.no_grad():
                        right[index] = network(x_adv).argmax(1) == y[index]
                show(int(len(y) * (i + done / len(left)) / max(1, len(attacks))))
            right = total(right.int()).bool()
    return right


def accuracy(model, x, y, attack, **options):
    """Percent that is right, in fp32: (clean, under attack). The attack sees only the pictures
    that are right without it. Arguments as for still_right."""
    right = still_right(model, x, y, **options)
    robust = still_right(model, x[right], y[right], attack, **options)
    return tuple(100 * kept.sum().item() / len(y) for kept in (right, robust))


def zero_gradients(model, x, y, batch_size=None):
    """Percent of the coordinates where cross-entropy's input gradient is exactly 0: there, attacks
    that follow the gradient do nothing. x uint8."""
    shares, mine = [], torch.arange(len(y), device=y.device)[RANK::WORLD]
    with exact(model) as network:
        for index, picture in read(x, mine.split(batch_size or 64)):
            picture = (picture.float() / 255).requires_grad_()
            loss = cross_entropy(network(picture), y[index])
            shares.append((torch.autograd.grad(loss, picture)[0] == 0).flatten(1).float().mean(1))
    return 100 * sum_of(shares, y.device) / len(y)


# ------------------------------------------------------------------------------- the optimisation

def prepare_model(args, data):
    """The network that args ask for, ready for training, with the data's mean and deviation."""
    torch.manual_seed(args.seed)
    model = build_model(args.arch, len(data.classes), args.width, args.activation,
                        *statistics(data), min(data.train[0].shape[2:]))
    precisions = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)
    model.to(args.device).compute_in(precisions[args.precision])
    if args.compile:
        model.network, model.compiled = torch.compile(model.logits), True
    torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = True, False
    return model


def statistics(data):
    """Mean and standard deviation of each channel, of at most 10,000 training pictures of 32x32,
    or of as many pixels."""
    x = data.train[0]
    some = torch.arange(min(len(x), -(-10_000 * 32 * 32 // (x.shape[2] * x.shape[3]))))
    x = torch.cat([picture.cpu() for _, picture in read(x, some.split(1000))])
    std, mean = torch.std_mean(x.float() / 255, dim=(0, 2, 3))
    return mean.tolist(), std.clamp(min=1e-3).tolist()


def learning_rate(args, progress):
    """At `progress` in [0, 1] through the run: piecewise decay, or a triangle, highest half-way."""
    if args.lr_schedule == "cyclic":
        return args.lr * (1 - abs(2 * progress - 1))
    return args.lr * 0.1 ** sum(progress >= milestone for milestone in args.milestones)


@torch.no_grad()
def average(tensors):
    """Replaces each tensor by its mean over torchrun's processes, with one all-reduce."""
    if WORLD > 1:
        tensors = list(tensors)
        flat = torch.cat([tensor.flatten() for tensor in tensors]) / WORLD
        dist.all_reduce(flat)
        for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(mean.view_as(tensor))
