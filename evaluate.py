"""Evaluates checkpoints: accuracy under attack, signs of gradient masking, and plots.

    python evaluate.py runs/*/best.pt                              clean, PGD-50-10, AutoAttack-lite
    python evaluate.py weights.pth --arch resnet18 --dataset cifar10     a state dict from elsewhere

All is in fp32; attacks only get images that are classified correctly. eps, step sizes and distances
are in units of 1/255. Runs that differ only in the seed are also averaged in an additional row.
"""

import copy
import functools
import glob
import itertools
import json
import math
import os
import re
import statistics
import sys
import textwrap
import time
from argparse import Namespace
from pathlib import Path

import torch
import torch.nn.functional as F

import common
from attacks import autoattack_lite, cw_l2, largest_eigenvalue, margin, rays, square
from backward_smoothing import backward_smoothing
from fast_at import misalignment

COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"]


def parse_args(argv=None):
    parser = common.Parser(usage="%(prog)s CKPT ... [options]", description=__doc__,
                           formatter_class=common.Parser.Format)
    add, number, count = parser.add_argument, common.number, common.number(int, 1)
    add("checkpoints", nargs="+", metavar="CKPT", help="best.pt, last.pt or a state dict")
    add("--attack", nargs="+", default=["pgd", "lite"], metavar="NAME", choices=[
        "pgd", "margin", "lite", "square", "cw", "rays", "none"], help="PGD on cross-entropy or on "
        "the margin, AutoAttack-lite, Square, Carlini & Wagner's L2 attack, RayS: %(choices)s")
    add("--surrogate", nargs="+", default=[], metavar="CKPT", help="also transfer PGD from these")
    add("--checklist", action="store_true", help="look for signs of gradient masking")
    add("--plots", nargs="*", choices=list(PLOTS), metavar="NAME", help="all or some: %(choices)s")
    add("--markdown", action="store_true", help="print the table as Markdown")
    add("--save-images", type=count, metavar="N", help="save N images, clean and under PGD")
    add("--steps", type=count, default=50, help="of PGD")
    add("--restarts", type=count, default=10, help="of PGD")
    add("--alpha", type=common.over_255, help="step size of PGD, in units of 1/255; None: eps/4")
    add("--start", choices=["uniform", "zero"], default="uniform", help="of PGD; zero: the image")
    add("--apgd-steps", type=count, default=100, help="of each attack in AutoAttack-lite")
    add("--queries", type=count, default=5000, help="of Square and RayS, per image")
    add("--eps", type=common.over_255, help="in units of 1/255; None: as in training, else 8")
    add("--norm", choices=["linf", "l2"], help="None: as in training, else linf")
    add("--n-examples", type=count, help="number of test images, chosen at random; None: all")
    add("--n-plot", type=count, default=100, help="number of these for the plots")
    add("--batch-size", type=count, help="None: smaller for larger images")
    add("--arch", choices=common.ARCHS, metavar="NAME", help="of a state dict from elsewhere")
    add("--width", type=count, help="of that architecture; None: the usual one")
    add("--activation", choices=common.ACTIVATIONS, default="relu", help="of that architecture")
    add("--mean", type=number(float, 0), nargs=3, help="its normalisation, for images in [0, 1]")
    add("--std", type=number(float, 1e-6), nargs=3, help="None: what the state dict holds, if any")
    add("--dataset", type=common.dataset_name, help="None: as in training")
    add("--data-dir", metavar="DIR", help="None: as in training, else data")
    add("--image-size", type=number(int, 32, 4096), help="None: as in training")
    add("--seed", type=number(int, 0), default=0, help="of the choice of images and the noise")
    add("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"], help="to compute on")
    add("--out", metavar="DIR", help="result folder; None: the next free runs/evaluation-...")
    args = parser.parse_args(argv)
    if bool(args.mean) != bool(args.std) or args.mean and max(args.mean + args.std) > 1.5:
        parser.error("--mean and --std go together, for images in [0, 1]: else divide by 255")
    args.checkpoints = [path for name in args.checkpoints for path in (  # Windows leaves patterns
        [name] * os.path.exists(name) or sorted(glob.glob(name)) or [name])]
    args.attack += ["pgd", "lite", "square"] if args.checklist else []
    args.restarts = 1 if args.start == "zero" else args.restarts
    args.plots = list(PLOTS) if args.plots == [] else args.plots or []
    args.plots += ["sheet"] if args.save_images and "sheet" not in args.plots else []
    args.device = common.set_up(args.device)
    return args


# ------------------------------------------------------------------------------------- checkpoints
class Checkpoint:
    """A network, and the test images x uint8 N x 3 x H x W and labels y that it is evaluated on."""

    def __init__(self, path, args):
        content = common.load(path)
        self.ours = isinstance(content, dict) and "options" in content
        content = content if self.ours else convert_foreign(content, path, args)
        self.path, self.args, self.trained = path, args, content["args"]
        self.epoch, self.log = content["epoch"], content["rows"]
        dataset = args.dataset or common.dataset_name(self.trained["dataset"])
        data_dir, size = self.trained["data_dir"], args.image_size or self.trained["image_size"]
        if dataset not in common.DATASETS and (self.ours or content["options"]["size"] > 32):
            size = size or content["options"]["size"]
        self.x, self.y, self.classes = test_images(dataset, args.data_dir or (
            data_dir if Path(data_dir).is_dir() else "data"), size, args.device)
        self.model = model = load_network(content, path, self.classes).to(args.device)
        self.norm = args.norm or self.trained["norm"]
        if args.eps is None and self.norm != self.trained["norm"] and path in args.checkpoints:
            common.fail(f"--norm is not that of {path}: add --eps")
        self.eps = self.trained["eps"] if args.eps is None else args.eps  # for images in [0, 1]
        self.about = dict(checkpoint=path, dataset=Path(dataset).name, arch=model.options["arch"],
                          normalisation=content.get("normalisation", "of the run"))
        self.average = "swa_" * Path(path).name.startswith("swa_")  # of KD-SWA
        shared = os.path.commonprefix([Path(p).parts[:-2] for p in args.checkpoints])
        self.name = "/".join(Path(path).with_suffix("").parts[len(shared):]).replace("$", r"\$")
        folder = self.ours and os.path.dirname(self.name) or self.name
        self.run = folder + " (average)" * bool(self.average)  # both for plots
        if args.n_examples:
            vars(self).update(vars(self.choose(args.n_examples)))

    def noise(self, restart=0):
        return torch.Generator(self.args.device).manual_seed(self.args.seed + restart)

    def take(self, index):
        """The same with the images of these indices."""
        few = copy.copy(self)
        few.x, few.y = self.x[index.to(self.x.device)], self.y[index.to(self.y.device)]
        return few

    def choose(self, n):
        """The same with n of its images, chosen at random."""
        generator = torch.Generator().manual_seed(self.args.seed)
        return self.take(torch.randperm(len(self.y), generator=generator)[:n])

    def batches(self, mask=None):
        """Yields, in parts small enough for gradients, the images in the mask (None: all) and the
        model for evaluation: model, indices, x float in [0, 1], y."""
        index = (torch.ones_like(self.y) if mask is None else mask).nonzero()[:, 0]
        size = self.args.batch_size or max(1, 64 * 32**2 // self.x[0, 0].numel())
        with common.exact(self.model) as model:
            parts = index.split(size) if len(index) else []
            for part in common.progress(parts, f"{self.path}, batch"):
                few = self.take(part)
                yield model, part, few.x.to(part.device) / 255, few.y

    def withstand(self, attacks, label):
        """Which images are classified correctly without an attack and after each attack, bool N."""
        return common.still_correct(self.model, self.x, self.y, lambda model, x, y: x, *attacks,
                                    batch_size=self.args.batch_size, label=f"{self.path}, {label}")

    def pgd(self, eps, alpha, steps, **options):
        """PGD with one restart: a function of model, x and y."""
        return functools.partial(common.pgd_attack, eps=eps, alpha=alpha, steps=steps,
                                 norm=self.norm, **dict(generator=self.noise()) | options)

    def attacked(self, steps):
        """x, y, x_adv under PGD, logits and logits_adv of all its images."""
        alpha, parts = self.eps / 4 if self.args.alpha is None else self.args.alpha, []
        attack = self.pgd(self.eps, alpha, steps, start=self.args.start)
        for model, _, x, y in self.batches():
            x_adv = attack(model, x, y)
            with torch.no_grad():
                parts.append((x, y, x_adv, model(x), model(x_adv)))
        return [torch.cat(part) for part in zip(*parts)]

    def by_eps(self, radii):
        """The accuracy in % under PGD-20 for each of some growing eps."""
        mask = True
        return [percent(mask := mask & self.withstand([self.pgd(eps, eps / 4, 20)], "PGD-20"))
                for eps in radii]


@functools.cache
def test_images(dataset, data_dir, image_size, device):
    """A data set's test images x uint8, labels and class names. Of a folder it decodes no more."""
    args = Namespace(dataset=dataset, data_dir=data_dir, image_size=image_size, device=device,
                     val_size=1, train_size=None, test_size=None, label_noise=0)
    if dataset in common.DATASETS and dataset != "tiny-imagenet":
        data = common.load_data(args)
        return *data.test, data.classes
    _, (paths, labels), classes = common.list_folder(dataset, data_dir)
    return common.decode(paths, args), torch.tensor(labels, device=device), classes


def load_network(content, path, classes):
    """The network of a checkpoint, its outputs in the order of the data set's classes."""
    weights, known = content["model"], content["classes"]
    model = common.Classifier(**content["options"])
    if "preact" in content["options"]["arch"] and not {"bn.weight", "bn.bias"} & weights.keys():
        model.bn = model.activation = torch.nn.Identity()  # as RobustBench's PreActResNet-18
    own = model.state_dict()
    for name in own | weights:
        here, there = (tuple(d[name].shape) if name in d else "missing" for d in (own, weights))
        if here != there and (here == "missing" or "num_batches" not in name):  # old files lack it
            common.fail(f"{path} does not fit the network: {name} is {there} instead of {here}")
    model.load_state_dict(own | weights)
    model.mean, model.std = content["mean"], content["std"]
    if model.options["classes"] != len(classes):
        common.fail(f"{path} knows {model.options['classes']} classes, the data set {len(classes)}")
    if known and known != classes and sorted(known) == sorted(classes):
        order, last = [known.index(name) for name in classes], list(model.children())[-1]
        with torch.no_grad():
            last.weight.copy_(last.weight[order])
            last.bias.copy_(last.bias[order])
        print(f"{path}: the data set has the same classes in another order: matched by name")
    elif known and known != classes:
        theirs, here = sorted({*known} - {*classes})[:5], sorted({*classes} - {*known})[:5]
        print(f"warning: {path} knows other classes than the data set: {theirs} instead of {here}")
    def check(model, x, logits):
        if not logits.isfinite().all():
            common.fail(f"{path}: the network's logits are not finite")
    model.register_forward_hook(check)
    return model.eval()


def tensors_in(content, place=""):
    """All tensors in nested dicts, by the keys that lead to them, joined by slashes."""
    if torch.is_tensor(content):
        return {place: content}
    parts = content.items() if isinstance(content, dict) else ()
    return {name: tensor for key, part in parts
            for name, tensor in tensors_in(part, f"{place}/{key}".strip("/")).items()}


def convert_foreign(content, path, args):
    """A checkpoint of another repository in the form of ours. Parameters are matched by name, and
    the normalisation is what it holds: nothing is guessed."""
    if not args.arch or not args.dataset:
        common.fail(f"{path} is not a checkpoint of these scripts: add --arch and --dataset")
    copies = re.compile(r"(^|[./])(attacker|sub_block1|model_preact\w*)\.")
    tensors = {name: part for name, part in tensors_in(content).items() if not copies.search(name)}
    first = re.compile(r"(.*[./]|)(conv1|features\.0)\.weight")  # one of a network is for RGB
    prefixes = [first.fullmatch(name)[1] for name, tensor in tensors.items()
                if first.fullmatch(name) and tensor.shape[1] == 3]
    best = [prefix for prefix in prefixes if "best" in re.split("[./]", prefix)] or prefixes
    names = textwrap.shorten(", ".join(prefixes), 60)
    if len(best) != 1:
        common.fail(f"{path} holds several networks, {names}: save one alone" if best
                    else f"{path} does not fit the network: conv1.weight is missing")
    prefix, others = best[0], tuple(prefix for prefix in prefixes if prefix != best[0])
    if others:
        print(f"{path} holds the networks {names}: taking {prefix}")
    beside = prefix[:prefix.rfind("/") + 1]  # in the same dict as the network
    weights, held, renamed = {}, {"mean": set(), "std": set()}, {  # from TRADES and torchvision
        r"^block(\d)\.layer\.": r"layer\1.", "convShortcut": "shortcut.0", r"^fc\.": "linear.",
        "downsample": "shortcut"}
    renamed |= {r"^bn1\.": "bn."} if "preact" in common.ARCHS[args.arch] else {}
    for theirs, tensor in [pair for pair in tensors.items() if not pair[0].startswith(others)]:
        last, folder = re.split("[./]", theirs)[-1], theirs[:theirs.rfind("/") + 1]
        kind = dict(mean="mean", mu="mean", std="std", sigma="std").get(last.removeprefix("new_"))
        name = theirs.removeprefix(prefix)
        for pattern, ours in renamed.items():
            name = re.sub(pattern, ours, name)
        if kind and tensor.numel() == 3 and folder.startswith(beside[:len(folder)]):
            held[kind].add(tuple(tensor.flatten().tolist()))
        elif theirs.startswith(beside) and last != "n_averaged":
            if name in weights or not theirs.startswith(prefix):
                common.fail(f"{path} does not fit the network: {theirs} is not a part of it")
            weights[name] = tensor.float() if tensor.is_floating_point() else tensor
    mean, std, normalisation = [0.0] * 3, [1.0] * 3, "none"
    if args.mean:
        mean, std, normalisation = args.mean, args.std, "as given"
    elif held["mean"] or held["std"]:
        pairs = list(itertools.product(*held.values()))
        if len(pairs) != 1 or max(pairs[0][0] + pairs[0][1]) > 1.5 or min(pairs[0][1]) <= 0:
            common.fail(f"{path} holds no clear normalisation: add --mean and --std")
        (mean, std), normalisation = pairs[0], "of the checkpoint"
    mean, std = torch.tensor([mean, std]).view(2, 3, 1, 1)
    large = "conv1.weight" in weights and weights["conv1.weight"].shape[-1] == 7  # ImageNet's stem
    last = weights.get("linear.weight", weights.get("classifier.weight", mean))
    options = dict(arch=args.arch, classes=len(last), width=args.width, activation=args.activation,
                   size=224 if large else 32)
    trained = dict(dataset=args.dataset, data_dir="data", image_size=None, eps=8 / 255, norm="linf")
    return dict(model=weights, mean=mean, std=std, options=options, classes=None, args=trained,
                epoch=0, rows=[], normalisation=normalisation)


# --------------------------------------------------------------------------------------- the table
def chosen_attacks(checkpoint, surrogates):
    """The attacks within eps, name -> (column, list of attack(model, x, y) -> x_adv), each with its
    own noise, so that it does not matter which others there are."""
    def transfer(model, x, y, surrogate):
        with common.exact(surrogate.model) as source:
            return pgd()(source, x, y)

    args, noise, partial = checkpoint.args, checkpoint.noise, functools.partial
    eps, norm, pgd_name = checkpoint.eps, checkpoint.norm, f"PGD-{args.steps}-{args.restarts}"
    pgd = partial(checkpoint.pgd, eps, eps / 4 if args.alpha is None else args.alpha, args.steps,
                  start=args.start)
    lite = partial(autoattack_lite, eps=eps, norm=norm, steps=args.apgd_steps, generator=noise())
    blind = partial(square, eps=eps, norm=norm, queries=args.queries, generator=noise())
    found = {"pgd": (pgd_name, [pgd(generator=noise(i)) for i in range(args.restarts)]),
             "margin": (f"margin-{pgd_name}", [pgd(generator=noise(i), loss=margin)
                                               for i in range(args.restarts)]),
             "lite": ("AA-lite", [lite]), "square": (f"Square-{args.queries}", [blind])}
    return {name: found[name] for name in found if name in args.attack} | {
        f"transfer {i}": (f"transfer {i}", [partial(transfer, surrogate=surrogate)])
        for i, surrogate in enumerate(surrogates, 1)}


def percent(mask):
    return 100 * mask.sum().item() / len(mask)


def distance_to_fool(checkpoint, attack, correct):
    """How far an attack without eps moves each image to fool the model, in both norms, each N: 0
    where it is not `correct` without an attack, infinity where the attack fails."""
    distances = {norm: torch.zeros_like(correct, dtype=torch.float) for norm in ("l2", "linf")}
    for model, index, x, y in checkpoint.batches(correct):
        x_adv = attack(model, x, y)
        with torch.no_grad():
            fooled = model(x_adv).argmax(1) != y
        for distance, order in zip(distances.values(), (2, math.inf)):
            moved = torch.linalg.vector_norm(x_adv - x, order, dim=(1, 2, 3))
            distance[index] = moved.masked_fill(~fooled, math.inf)
    return distances


def inspect(checkpoint, clean):
    """How much of the input gradient is exactly 0, in %, so that attacks cannot follow it. Warns of
    what makes the figures of this checkpoint doubtful."""
    zeros, predicted, n, classes = 0, 0, len(checkpoint.y), len(checkpoint.classes)
    for model, _, x, y in checkpoint.batches():
        logits = model(x.requires_grad_())
        gradient, = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), x)
        if not gradient.isfinite().all():
            common.fail(f"{checkpoint.path}: the input gradients are not finite")
        zeros += 100 * (~(gradient.abs() > 0)).float().mean((1, 2, 3)).sum().item() / n
        predicted += 100 * logits.argmax(1).bincount(minlength=classes) / n
    start, most = f"warning: {checkpoint.path}", max(checkpoint.y.bincount())
    if not checkpoint.ours and clean < min(200 / classes, 75):
        print(f"{start}: only {clean:.1f} % are right. Usual causes: the normalisation (--mean, "
              "--std), the block (preactresnet18 or preactresnet18-v2), the order of the classes: "
              f"here {textwrap.shorten(', '.join(checkpoint.classes), 150)}")
    elif clean <= 120 / classes or predicted.max() >= 95 and most < 0.8 * n:
        print(f"{start}: {clean:.1f} % are right, and by chance {100 / classes:.1f} % would be; "
              f"{predicted.max():.0f} % of the images get the same prediction")
    if zeros > 1:
        print(f"{start}: {zeros:.1f} % of the input gradients are exactly 0: attacks need them")
    return zeros


def evaluate(checkpoint, surrogates):
    """A row of the table, a dict, and by attack which images withstand it within eps, bool N."""
    start, args = time.perf_counter(), checkpoint.args
    correct = checkpoint.withstand([], "clean")
    kept, row = {"clean": correct}, checkpoint.about | {
        "n": len(correct), "eps": 255 * checkpoint.eps, "norm": checkpoint.norm,
        "clean %": percent(correct)}
    zeros = inspect(checkpoint, row["clean %"])
    for name, (column, parts) in chosen_attacks(checkpoint, surrogates).items():
        kept[name] = checkpoint.withstand(parts, column)
        row[f"{column} %"] = percent(kept[name])
    if "cw" in args.attack:
        distance = distance_to_fool(checkpoint, cw_l2, correct)["l2"]
        row["CW-L2 %"] = percent(distance == math.inf)
        fooled = distance[correct & (distance < math.inf)]
        row["CW-L2 mean distance"] = 255 * fooled.mean().item() if len(fooled) else None
    if "rays" in args.attack:
        attack = functools.partial(rays, queries=args.queries)
        distances = distance_to_fool(checkpoint, attack, correct)
        row["ADBD"] = 255 * distances["linf"].clamp(max=1).mean().item()  # 255: never fooled
        kept["rays"] = distances[checkpoint.norm] > checkpoint.eps
        row[f"RayS-{args.queries} %"] = percent(kept["rays"])
    kept["worst case"] = torch.stack(list(kept.values())).all(0)
    if len(kept) > 3:
        row["worst case %"] = percent(kept["worst case"])
    return row | {"zero gradients %": zeros, "seconds": time.perf_counter() - start}, kept


def same_but_seed(checkpoints):
    """The checkpoints, in lists of those whose runs differ in nothing but the seed."""
    groups, free = {}, ("seed", "out", "data_dir", "device", "resume", "keep_epochs")
    for checkpoint in checkpoints:
        key = [re.sub(r"seed\d+", "", f"{name} {value}")  # as in the path of a teacher
               for name, value in sorted(checkpoint.trained.items()) if name not in free]
        key = [Path(checkpoint.path).name, *key] if checkpoint.ours else [checkpoint.path]
        groups.setdefault(tuple(key), []).append(checkpoint)
    return list(groups.values())


def summarise(rows):
    """A row for several runs: each number is a dict of its mean and sample standard deviation."""
    name = re.sub(r"-?seed\d+", "", rows[0]["checkpoint"])
    summary = rows[0] | dict(checkpoint=f"{name} ({len(rows)} seeds)")
    for name in [name for name in summary if isinstance(summary[name], float) and name != "eps"]:
        values = [row[name] for row in rows]
        summary[name] = None if None in values else dict(mean=statistics.mean(values),
                                                         std=statistics.stdev(values))
    return summary


def table(rows, markdown=False):
    """Rows, dicts, as aligned text or as Markdown; what a row lacks is left empty."""
    def text(value):
        if isinstance(value, dict):
            return f"{value['mean']:.2f} +- {value['std']:.2f}"
        return f"{value:.2f}" if isinstance(value, float) else "" if value is None else str(value)

    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names] + [[text(row.get(name)) for name in names] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    if markdown:
        cells.insert(1, ["-" * width for width in widths])
    lines = [(" | " if markdown else "  ").join(map(str.rjust, line, widths)) for line in cells]
    return "\n".join(f"| {line} |" if markdown else line for line in lines)


def checklist(checkpoint, row, kept):
    """Signs that gradients are masked (Athalye et al. 2018; Carlini et al. 2019): a list of
    (verdict, what should hold, the figures behind it)."""
    found, eps, size = [], checkpoint.eps, checkpoint.x[0].numel()
    white_box = kept["pgd"] & kept["lite"] & kept.get("margin", True)
    for name in [name for name in kept if name in ("square", "rays") or "transfer" in name]:
        share, best, alone = map(percent, (kept[name], white_box, white_box & ~kept[name]))
        found.append((alone <= 1 and share >= best, "white-box attacks are the strongest",
                      f"{name}: {share:.1f} % against {best:.1f} %; it alone fools {alone:.1f} %"))
    radii = [eps, 2 * eps, 4 * eps, 8 * eps, 0.5 * size ** 0.5 if checkpoint.norm == "l2" else 0.5]
    shares = checkpoint.by_eps(radii)
    found.append((shares[-1] <= 1, "accuracy falls to 0 as eps grows", ", ".join(
        f"{share:.1f} % at {radius * 255:.0f}" for share, radius in zip(shares, radii))))
    one, ten, hundred = (percent(checkpoint.withstand([checkpoint.pgd(eps, alpha, n)], f"PGD-{n}"))
                         for n, alpha in ((1, eps), (10, eps / 4), (100, eps / 4)))
    found.append((one >= ten - 1 and ten >= hundred - 1, "accuracy does not rise with more steps",
                  f"{one:.1f} % after 1, {ten:.1f} % after 10, {hundred:.1f} % after 100"))
    found.append((row["zero gradients %"] <= 1, "input gradients are not 0",
                  f"{row['zero gradients %']:.1f} % of them are exactly 0"))
    with torch.no_grad():
        model, _, x, _ = next(checkpoint.batches())
        found.append((torch.equal(model(x), model(x)), "the network is deterministic",
                      "logits of the same images, computed twice"))
    return [("pass" if holds else "WARN", *rest) for holds, *rest in found]


# ------------------------------------------------------------------------------------------- plots
def new_figure(rows, columns, width, height):
    import matplotlib.figure  # takes half a second
    matplotlib.rcParams.update({"font.size": 18, "axes.grid": True, "lines.linewidth": 3})
    figure = matplotlib.figure.Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def line_plot(checkpoints, measure, xlabel, span=(), **options):
    """A panel for each key of measure(checkpoint): title -> list of (x, y). Several y at one x, of
    several seeds, make a band around their mean. The vertical axes include `span`."""
    values, panels = [measure(checkpoint) for checkpoint in checkpoints], {}
    names = [checkpoint.run if xlabel == "epoch" else checkpoint.name for checkpoint in checkpoints]
    colours = dict(zip(dict.fromkeys(names), itertools.cycle(COLOURS)))  # the same in all panels
    for name, numbers in zip(names, values):
        for title, points in numbers.items():
            panels.setdefault(title, {}).setdefault(name, []).extend(points)
    figure, (row,) = new_figure(1, len(panels), 4.5 * len(panels) + 3, 5)
    for axes, (title, lines) in zip(row, panels.items()):
        axes.set(title=textwrap.fill(title, 20), xlabel=xlabel, **options)
        ends, limit = [], 1
        for name, points in lines.items():
            xs = sorted({x for x, _ in points})
            seeds = [[y for other, y in points if other == x] for x in xs]
            ys, low, high = (list(map(f, seeds)) for f in (statistics.mean, min, max))
            axes.plot(xs, ys, "o-" if len(xs) < 50 else "-", color=colours[name])
            axes.fill_between(xs, low, high, color=colours[name], alpha=0.2)
            axes.update_datalim([(xs[0], edge) for edge in span])
            ends.append((ys[-1], xs[-1], colours[name], textwrap.wrap(name, 18)))
        axes.autoscale_view()
        axes.locator_params("x", integer=True)
        for y, x, colour, words in sorted(ends, reverse=True):
            height = axes.transLimits.transform(axes.transScale.transform((x, y)))[1]
            # Each name is below the one before, and none reaches into the title.
            limit = min(height + 0.04 * len(words), limit) - 0.08 * len(words)
            axes.text(1.02, limit, "\n".join(words), color=colour, transform=axes.transAxes)
    return figure, values


def curves(checkpoint):
    """The log of a run, up to the checkpoint. The loss is not that of an average of weights."""
    keys = {"training loss": "loss", "held-out clean %": f"{checkpoint.average}val_clean",
            "held-out PGD-10 %": f"{checkpoint.average}val_pgd"}
    if not checkpoint.log:
        raise ValueError(f"{checkpoint.path} holds no log")
    return {title: [(row["epoch"], row[key]) for row in checkpoint.log if key in row]
            for title, key in keys.items() if not (checkpoint.average and key == "loss")}


def curvature(checkpoint):
    """Backward Smoothing's Figure 3: the curvature of the loss at the images and near them."""
    found, eps, norm = {"clean": [], "random": [], "smoothed": []}, checkpoint.eps, checkpoint.norm
    for model, _, x, y in checkpoint.batches():
        smoothed = backward_smoothing(model, x, eps, eps, alone=True, norm=norm)
        for part, point in zip(found.values(), (x, common.random_start(x, eps, norm), smoothed)):
            part.append(largest_eigenvalue(model, point, y))
    return {f"largest eigenvalue, {name}": [(checkpoint.epoch, torch.cat(part).mean().item())]
            for name, part in found.items()}


def alignment(checkpoint):
    """KD-SWA's Figure A11, Fast-BAT's Figure 2: do the gradients at an image and near it agree?"""
    apart = sum(len(y) * misalignment(model, x, y, checkpoint.eps, checkpoint.norm, "eval").item()
                for model, _, x, y in checkpoint.batches())
    return {"gradient alignment": [(checkpoint.epoch, 1 - apart / len(checkpoint.y))]}


def robustness(checkpoint):
    """Accuracy under PGD-20 against eps."""
    radii = [part / 4 * (checkpoint.eps or 8 / 255) for part in (0, 1, 2, 3, 4, 6, 8, 12, 16)]
    shares = checkpoint.by_eps(radii)
    return {"accuracy under PGD-20 (%)": [(255 * eps, y) for eps, y in zip(radii, shares)]}


def flatness(checkpoint):
    """KD-SWA's Figure 7: the loss under PGD-10, as the weights move in 10 random directions."""
    moved, losses = copy.copy(checkpoint), dict.fromkeys(range(0, 60, 10), 0)
    with common.exact(checkpoint.model) as moved.model:
        trained = torch.cat([weight.flatten() for weight in moved.model.parameters()])
        for _ in range(10):
            direction = F.normalize(torch.randn_like(trained), dim=0) * trained.norm()
            for distance in losses:
                torch.nn.utils.vector_to_parameters(trained + distance / 100 * direction,
                                                    moved.model.parameters())
                _, y, *_, logits = moved.attacked(10)
                losses[distance] += F.cross_entropy(logits, y).item() / 10
    return {"loss under PGD-10": list(losses.items())}


def panel_plot(checkpoints, draw, n=1):
    """n panels for each checkpoint, filled by draw(axes, checkpoint, i), which returns numbers."""
    n = min(n, len(checkpoints[0].y))
    figure, rows = new_figure(n, len(checkpoints), 5 * len(checkpoints) + 1, 4.6 * n)
    values = [{} for _ in checkpoints]
    for i, row in enumerate(rows):
        for axes, checkpoint, numbers in zip(row, checkpoints, values):
            numbers |= draw(axes, checkpoint, i)
            axes.set(title=textwrap.fill(checkpoint.name, 26))
    return figure, values


def landscape(axes, checkpoint, i):
    """KD-SWA's Figure 6: the loss of image i along the gradient (linf: its sign) and at random."""
    ticks, levels = torch.linspace(-2, 2, 41), torch.linspace(0, 6, 25)
    model, _, x, y = next(checkpoint.take(torch.tensor([i])).batches())
    gradient, = torch.autograd.grad(1e12 * F.cross_entropy(model(x.requires_grad_()), y), x)
    unit = functools.partial(F.normalize, dim=(1, 2, 3)) if checkpoint.norm == "l2" else torch.sign
    along, across = (checkpoint.eps * unit(part) for part in (gradient, torch.randn_like(x)))
    line = x.detach() + ticks.to(x.device).view(-1, 1, 1, 1) * along
    with torch.no_grad():
        surface = torch.stack([F.cross_entropy(model(line + b * across), y.expand(41),
                                               reduction="none") for b in ticks]).cpu()
    drawn = axes.contourf(ticks, ticks, surface, levels, extend="max")
    axes.set(xlabel="along the gradient (eps)", ylabel="at random (eps)")
    axes.figure.colorbar(drawn, ax=axes, label="loss", ticks=levels[::4])
    return {f"highest loss of image {i}": surface.max().item()}


def outputs(axes, checkpoint, i):
    """KD-SWA's Figure 5: logits of three classes, clean and attacked, where the clean vary most."""
    _, y, _, clean, moved = (part.cpu() for part in checkpoint.attacked(20))
    _, spread, directions = torch.linalg.svd(clean - clean.mean(0), full_matrices=False)
    for colour, c in zip(COLOURS, y.unique()[:3].tolist()):
        for logits, marker, word in ((clean, "o", ""), (moved, "*", ", attacked")):
            points = (logits[y == c] - clean.mean(0)) @ directions[:2].T
            axes.scatter(*points.T, marker=marker, s=45, color=colour, alpha=0.6,
                         label=checkpoint.classes[c] + word)
    axes.set(xlabel="first principal axis", ylabel="second")
    axes.legend(fontsize=10)
    return {"variance in the plane %": 100 * (spread[:2].norm() / spread.norm()).item() ** 2}


def sheet(checkpoints):
    """An image of each class: clean, the perturbation (scaled) and their sum, and what the network
    takes them for. "fooled" is the share of those that were right before."""
    n, columns, values = len(checkpoints), min(10, len(checkpoints[0].y.unique())), []
    figure, rows = new_figure(3 * n, columns, 1.25 * columns + 1, 4.4 * n)
    for checkpoint, lines in zip(checkpoints, rows.reshape(n, 3, columns)):
        first = [(checkpoint.y == c).nonzero()[0, 0] for c in checkpoint.y.unique()[:columns]]
        x, y, x_adv, *logits = checkpoint.take(torch.stack(first)).attacked(20)
        before, after = (part.argmax(1) for part in logits)
        delta = 0.5 + (x_adv - x) / (x_adv - x).abs().amax().clamp(min=1e-9) / 2
        for line, word, images, guesses in zip(lines, ("clean", "perturbation", "attacked"),
                                               (x, delta, x_adv), (before, y, after)):
            line[0].set_ylabel(word, fontsize=13)
            for axes, image, guess, truth in zip(line, images, guesses, y):
                axes.imshow(image.permute(1, 2, 0).cpu().numpy())
                axes.set(xticks=[], yticks=[])
                name = checkpoint.classes[guess][:11] if images is not delta else ""
                axes.set_title(name, fontsize=13, color=COLOURS[int(guess != truth)])
        middle = lines[0, columns // 2]
        middle.set_title(f"{checkpoint.name}\n\n{middle.get_title()}", fontsize=13)
        fooled = (after != y)[before == y]
        values.append({"fooled %": percent(fooled) if len(fooled) else 0.0})
    return figure, values


PLOTS = {name: functools.partial(plot, **options) for name, plot, options in (
    ("curvature", line_plot, dict(measure=curvature, xlabel="epoch", yscale="symlog", span=(0, 9))),
    ("alignment", line_plot, dict(measure=alignment, xlabel="epoch", span=(0, 1))),
    ("landscape", panel_plot, dict(draw=landscape, n=2)),
    ("eps", line_plot, dict(measure=robustness, xlabel="eps (1/255)", span=(0, 100))),
    ("weights", line_plot, dict(measure=flatness, xlabel="distance of the weights (%)")),
    ("logits", panel_plot, dict(draw=outputs)), ("sheet", sheet, {}),
    ("curves", line_plot, dict(measure=curves, xlabel="epoch", span=(0,))))}


# -------------------------------------------------------------------------------------------- main
def main(args):
    def save():
        if common.RANK == 0:
            (folder / "result.json").write_text(json.dumps(result, indent=1))

    checkpoints, surrogates = ([Checkpoint(path, args) for path in paths]
                               for paths in (args.checkpoints, args.surrogate))
    for surrogate in surrogates:
        if any(surrogate.classes != checkpoint.classes for checkpoint in checkpoints):
            common.fail(f"{surrogate.path} cannot be a surrogate: it knows other classes")
    folder = Path("" if common.RANK else common.claim_folder(args.out, "evaluation", "result.json"))
    in_255 = {name: 255 * vars(args)[name] for name in ("eps", "alpha") if vars(args)[name]}
    result = dict(command=sys.argv, args=vars(args) | in_255, rows=[], classes=[], checklist=[],
                  summary=[], plots={})
    for checkpoint in checkpoints:
        row, kept = evaluate(checkpoint, surrogates)
        result["rows"].append(row)
        result["classes"].append({name: {
            f"{part} %": percent(kept[part][members]) for part in ("clean", "worst case")}
            for c, name in enumerate(checkpoint.classes) if (members := checkpoint.y == c).any()})
        print(checkpoint.path + "".join(f", {name} {value:.1f}" for name, value in row.items()
                                        if name.endswith("%")), flush=True)
        if args.checklist:
            result["checklist"].append(checklist(checkpoint, row, kept))
            for verdict, claim, figures in result["checklist"][-1]:
                print(f"  {verdict}  {claim}: {figures}", flush=True)
        save()
    for group in same_but_seed(checkpoints):
        runs = {checkpoint.trained.get("seed"): checkpoint for checkpoint in group}.values()
        if len(runs) == 1:
            continue
        result["summary"].append(summarise([result["rows"][checkpoints.index(c)] for c in runs]))
        names = [re.sub(r"[-/]?seed\d+", "", old) or old for old in (group[0].name, group[0].run)]
        epochs = min(len(checkpoint.log) for checkpoint in group)
        for checkpoint in group:  # in plots they are one line
            checkpoint.name, checkpoint.run, checkpoint.log = *names, checkpoint.log[:epochs]
    print("\n" + table(result["rows"] + result["summary"], args.markdown), flush=True)
    for i, checkpoint in enumerate(checkpoints if args.save_images and common.RANK == 0 else [], 1):
        x, y, x_adv, *logits = (part.cpu() for part in
                                checkpoint.choose(args.save_images).attacked(args.steps))
        found = dict(zip(("predictions", "predictions_adv"), (part.argmax(1) for part in logits)))
        torch.save(found | dict(x=x, x_adv=x_adv, y=y, classes=checkpoint.classes),
                   folder / f"images{f'-{i}' * (i > 1)}.pt")
    few = [checkpoint.choose(args.n_plot) for checkpoint in checkpoints]
    for name in args.plots:
        torch.manual_seed(args.seed)
        save()
        try:
            figure, values = PLOTS[name](few)
            if common.RANK == 0:
                figure.savefig(folder / f"{name}.png", dpi=100)
        except Exception as error:  # the numbers are safe
            print(f"warning: the plot {name} failed: {error}")
            continue
        result["plots"][name] = values
        for checkpoint, numbers in zip(checkpoints, values):
            short = re.sub(r"(\.\d{3})\d+", r"\1", str(numbers))
            print(f"{name}, {checkpoint.path}: {textwrap.shorten(short, 150)}", flush=True)
    save()
    print(f"see {folder}")


if __name__ == "__main__":
    main(parse_args())
