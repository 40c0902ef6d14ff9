"""Judges saved checkpoints: accuracy under attack, signs of gradient masking, and pictures.

    python evaluate.py runs/.../best.pt runs/.../last.pt          clean, PGD-50-10, AutoAttack-lite
    python evaluate.py runs/.../best.pt --attack lite square --n-examples 200
    python evaluate.py runs/.../best.pt --checklist --surrogate runs/.../best.pt
    python evaluate.py runs/a/best.pt runs/b/best.pt --attack none --plots
    python evaluate.py weights.pth --arch resnet18 --dataset cifar10         from elsewhere

Prints one table, with a row for each checkpoint, and writes it to result.json in a folder of its
own, with the pictures. All is computed in fp32 on n test pictures; an attack only sees those that
are right without it, and leaves alone what it has fooled; PGD looks only between restarts. Every
accuracy under attack is an upper bound on the true one.
"""

import argparse
import functools
import json
import math
import shlex
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import common
from backward_smoothing import backward_smoothing
from bookkeeping import COLOURS, check_classes, draw_curves, load_model, save
from common import read, say, sum_of
from data import load_data
from fast_at import misalignment


def parse_args(argv=None):
    parser = common.Parser(__file__, __doc__)
    count = common.number(int, 1)
    add = parser.add_argument
    add("checkpoints", nargs="+", metavar="CKPT", help="best.pt, last.pt or a state dict")
    add("--attack", nargs="+", default=["pgd", "lite"], choices=[*ATTACKS, "none"], metavar="NAME",
        help="PGD on cross-entropy (pgd) or Carlini & Wagner's margin, AutoAttack-lite, Square, "
        "Carlini & Wagner's L2 attack (cw), RayS; or none: " + " ".join(ATTACKS))
    add("--surrogate", nargs="+", default=[], metavar="CKPT", help="also transfer PGD from these")
    add("--checklist", action="store_true", help="look for signs of gradient masking")
    add("--plots", nargs="*", choices=list(PLOTS), metavar="NAME",
        help="pictures, all or among " + ", ".join(PLOTS))
    add("--markdown", action="store_true", help="also print the table as Markdown")
    add("--steps", type=count, default=50, help="of PGD, each of length eps/4")
    add("--restarts", type=count, default=10, help="of PGD")
    add("--apgd-steps", type=count, default=100, help="of each part of AutoAttack-lite")
    add("--queries", type=count, default=5000, help="of Square and RayS, for each picture")
    add("--eps", type=common.pixels, metavar="PIXELS", help="None: as in training, else 8")
    add("--norm", choices=["linf", "l2"], help="None: as in training, else linf")
    add("--n-examples", type=count, help="test pictures, drawn at random; None: all")
    add("--n-plot", type=count, default=100, help="of them, those used for --plots")
    add("--batch-size", type=count, help="None: 128 on a CPU, else 1000")
    add("--arch", choices=common.ARCHS, metavar="NAME", help="of a state dict from elsewhere")
    add("--width", type=common.number(int, 8), help="of that architecture; None: its own")
    add("--activation", choices=common.ACTIVATIONS, help="of that architecture; None: relu")
    add("--mean", type=common.number(float, -1), nargs=3, help="normalisation of such a state dict")
    add("--std", type=common.number(float, 1e-6), nargs=3,
        help="both None: what it holds, else what fits better")
    add("--dataset", help="None: as in training")
    add("--seed", type=common.number(int, 0), default=0, help="of examples and noise")
    add("--out", metavar="DIR", help="folder of the results; None: the next free runs/evaluation-N")
    args = parser.parse_args(argv)
    if (args.mean is None) != (args.std is None):
        parser.error("--mean and --std go together")
    args.plots = list(PLOTS) if args.plots == [] else args.plots or []
    return args


# ------------------------------------------------------- attacks beside those that common.py has

def eta(size):
    """The square that Square adds in L2: one half rises to its middle, the other falls; norm 1."""
    ring = (1 / torch.arange(1, size + 1) ** 2).flip(0).cumsum(0).flip(0)
    halves, columns = [], torch.arange(size)[None]
    for rows in (size // 2, size - size // 2):
        away = (torch.arange(rows)[:, None] - rows // 2).abs().maximum((columns - size // 2).abs())
        halves.append(ring[away] / ring[away].norm())
    return torch.cat([halves[0], -halves[1]]) / 2 ** 0.5


def square(model, x, y, eps, queries=5000, norm="linf", generator=None):
    """Square attack (Andriushchenko et al. 2020): random squares, kept where they help.

    x N x 3 x H x W in [0, 1] -> x_adv within eps of it. The batch shares the squares' places, and
    each picture draws its own signs.
    """
    def uniform(*size):
        return torch.rand(size, device=x.device, generator=generator)

    def sign(*size):
        return torch.where(uniform(len(x), 3, *size) < 0.5, -1.0, 1.0)

    def place(size):
        row, column = (int(uniform(1) * (whole - size + 1)) for whole in x.shape[2:])
        return (slice(None), slice(None), slice(row, row + size), slice(column, column + size))

    def energy(delta):
        return delta.square().sum((2, 3), keepdim=True)  # of each channel

    x_adv, index, side = x.clone(), torch.arange(len(x), device=x.device), min(x.shape[2:])
    with common.attacking(model, x), torch.no_grad():
        if norm == "linf":
            delta = eps * sign(1, x.shape[3])  # stripes
        else:
            tile = max(side // 5, 3)
            tiles = [whole // tile for whole in x.shape[2:]]
            signs = sign(*tiles).repeat_interleave(tile, 2).repeat_interleave(tile, 3)
            delta = torch.zeros_like(x)
            delta[:, :, :signs.shape[2], :signs.shape[3]] = eta(tile).to(x).repeat(tiles) * signs
            delta *= eps / common.l2_norm(delta)
        point = (x + delta).clamp(0, 1)
        best = common.margin(model(point), y)
        for query in range(1, queries):
            if (best >= 0).any():
                x_adv[index[best >= 0]] = point[best >= 0]
                index, x, y, point, best = (t[best < 0] for t in (index, x, y, point, best))
                if not len(index):
                    return x_adv
            # A square covers 0.8 of the picture, and half as much after certain parts of the way.
            halvings = sum(query / queries > part / 10_000
                           for part in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000))
            size = round((0.8 * 0.5 ** halvings * x.shape[2] * x.shape[3]) ** 0.5)
            delta = point - x
            if norm == "linf":
                delta[place(min(max(size, 1), side - 1))] = eps * sign(1, 1)
            else:  # moves one square's perturbation into another, with what clipping has spared
                size = min(max(size, 3) | 1, side - 1)
                window, other = place(size), place(size)
                old, before = delta[window].clone(), energy(delta)
                spare = (eps ** 2 - before.sum(1, keepdim=True)).clamp(min=0) / 3
                delta[window] = delta[other] = 0
                pattern = eta(size).to(x.device)
                new = (pattern if uniform(1) < 0.5 else pattern.T) * sign(1, 1)
                new = new + old / energy(old).sqrt().clamp(1e-12)
                new = new / energy(new).sqrt().clamp(1e-12)
                delta[window] = new * (spare + before - energy(delta)).clamp(min=0).sqrt()
                delta *= eps / common.l2_norm(delta)
            new = (x + delta).clamp(0, 1)
            value = common.margin(model(new), y)
            point = torch.where((value > best).view(-1, 1, 1, 1), new, point)
            best = value.maximum(best)
        x_adv[index] = point
    return x_adv


def cw_l2(model, x, y, constant=0.1, steps=100, lr=0.01):
    """Carlini & Wagner's L2 attack with KD-SWA's settings: no search for the constant. Minimises
    |x_adv - x|^2 + constant max(z_y - z_other, 0); x N x 3 x H x W in [0, 1]. There is no eps.

    Returns x_adv, the closest that fooled the model, or x.
    """
    w = torch.atanh((2 * x - 1) * 0.999999).requires_grad_()  # x_adv = (tanh(w) + 1) / 2
    optimizer = torch.optim.Adam([w], lr)
    x_adv, distance = x.clone(), torch.full(x.shape[:1], math.inf, device=x.device)
    with common.attacking(model, x):
        for _ in range(steps):
            point = (w.tanh() + 1) / 2
            margin, far = common.margin(model(point), y), common.l2_norm(point - x).flatten()
            closer = (margin > 0) & (far < distance)
            distance = torch.where(closer, far.detach(), distance)
            x_adv = torch.where(closer.view(-1, 1, 1, 1), point.detach(), x_adv)
            loss = ((point - x) ** 2).sum() + constant * (-margin).clamp(min=0).sum()
            w.grad, = torch.autograd.grad(loss, w)
            optimizer.step()
    return x_adv


@torch.no_grad()
def rays(model, x, y, queries=5000, tolerance=1e-3):
    """RayS (Chen & Gu 2020), which sees labels alone: the sign vectors along which the nearest
    wrong label lies closest, found by flipping ever smaller blocks of signs.

    x N x 3 x H x W in [0, 1] -> x_adv just behind the boundary, however far that is.
    """
    def fooled(index, direction, radius):
        point = (x[index] + radius[:, None, None, None] * direction.view(-1, *x.shape[1:]))
        return model(point.clamp(0, 1)).argmax(1) != y[index]

    n, size = len(x), x[0].numel()
    signs, radius = x.new_ones(n, size), x.new_ones(n)
    used, everyone = torch.zeros(n, device=x.device), torch.arange(n, device=x.device)
    level, block = 0, 0
    with common.attacking(model, x):
        while (index := everyone[used < queries]).numel():
            width = math.ceil(size / 2 ** level)
            trial = signs[index].clone()
            trial[:, block * width:(block + 1) * width] *= -1
            good = fooled(index, trial, radius[index])
            used[index] += 1
            index, trial = index[good], trial[good]
            low, high = torch.zeros_like(radius[index]), radius[index]
            while len(index) and (high - low).max() > tolerance:  # where along it is the boundary?
                middle = (low + high) / 2
                behind = fooled(index, trial, middle)
                low, high = torch.where(behind, low, middle), torch.where(behind, middle, high)
                used[index] += 1
            radius[index], signs[index] = high, trial
            block += 1
            if block * width >= size:
                level, block = (level + 1 if width > 1 else 0), 0
    return (x + radius.view(-1, 1, 1, 1) * signs.view_as(x)).clamp(0, 1)


ATTACKS = ["pgd", "margin", "lite", "square", "cw", "rays"]


class Subject(NamedTuple):
    """A checkpoint under evaluation, with the test pictures x uint8 and labels y it is shown."""
    path: str
    model: torch.nn.Module
    settings: dict
    classes: list
    x: torch.Tensor
    y: torch.Tensor
    eps: float  # of [0, 1]
    norm: str


def load_subject(path, args, read_data):
    """Reads a checkpoint and its data. UserError where they do not fit."""
    data = args.dataset and read_data(args.dataset, args.data_dir or "data", args.image_size)
    model, settings = load_model(path, args.device, args.arch, args.width, args.activation, data,
                                 args.mean, args.std)
    if not data:
        data = read_data(settings["dataset"], args.data_dir or settings["data_dir"],
                         args.image_size or settings.get("image_size"))
    check_classes(path, settings, data)
    x, y = data.test
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(args.seed)).to(y.device)
    index = order[:args.n_examples]
    return Subject(path, model, settings, data.classes, x[index], y[index],
                   args.eps or settings.get("eps", 8 / 255),
                   args.norm or settings.get("norm", "linf"))


def attacks(subject, args, surrogates):
    """Column -> attacks(model, x, y) -> x_adv, in turn: all those that args ask for."""
    def pgd(model, x, y, target=None, restarts=args.restarts, loss="ce"):
        return common.pgd_attack(target or model, x, y, eps, eps / 4, args.steps, restarts, norm,
                                 loss, generator)

    eps, norm, pgd_name = subject.eps, subject.norm, f"PGD-{args.steps}-{args.restarts}"
    generator = torch.Generator(args.device).manual_seed(args.seed)
    named = {
        "pgd": (pgd_name, pgd),
        "margin": (f"margin-{pgd_name}", functools.partial(pgd, loss="margin")),
        "lite": ("AA-lite", *[functools.partial(
            common.autoattack_lite_part, part=part, eps=eps, norm=norm, steps=args.apgd_steps,
            generator=generator) for part in range(min(10, len(subject.classes)))]),
        "square": (f"Square-{args.queries}", lambda *batch: square(
            *batch, eps, args.queries, norm, generator)),
        "cw": ("CW-L2", cw_l2),
        "rays": (f"RayS-{args.queries}", lambda *batch: rays(*batch, args.queries)),
    } | {f"transfer {i}": (f"transfer {i}", functools.partial(pgd, target=surrogate, restarts=1))
         for i, (_, surrogate, *_) in enumerate(surrogates, 1)}
    return {column: parts for name, (column, *parts) in named.items()
            if name in args.attack or name.startswith("transfer")}


def percent(mask):
    return 100 * mask.sum().item() / len(mask)


def withstand(subject, args, right, *attacks, name="clean"):
    """Which of the pictures in `right`, bool N, are right after the attacks, bool N."""
    kept = right.clone()
    show = common.progress(f"{subject.path}, {name}: picture", right.sum().item())
    kept[right] = common.still_right(subject.model, subject.x[right], subject.y[right], *attacks,
                                     batch_size=args.batch_size, show=show)
    return kept


def evaluate(subject, args, surrogates):
    """A row of the table, a dict with accuracies in percent, and by column which pictures withstood
    the attacks within eps, bool N."""
    def recorded(attack, model, x, y):
        x_adv = attack(model, x, y)
        moves.append((x_adv - x).flatten(1).norm(length, dim=1) * 255)
        return x_adv

    start, settings, kept = time.perf_counter(), subject.settings, {}
    row = dict(checkpoint=subject.path, dataset=Path(args.dataset or settings["dataset"]).name,
               arch=args.arch or settings["arch"], normalisation=settings["normalisation"],
               n=len(subject.y), eps=subject.eps * 255, norm=subject.norm)
    right = withstand(subject, args, torch.ones_like(subject.y).bool())
    row["clean %"] = percent(right)
    for name, parts in attacks(subject, args, surrogates).items():
        moves, length = [], math.inf if name.startswith("RayS") else 2
        robust = withstand(subject, args, right, *[
            functools.partial(recorded, attack) for attack in parts], name=name)
        if name == "CW-L2":  # knows no eps, so that the share alone says little
            fooled = (right & ~robust).sum().item()  # the others have not moved
            row["CW-L2 %"] = percent(robust)
            row["CW-L2 mean distance"] = sum_of(moves, args.device) / max(1, fooled)
        elif name.startswith("RayS"):  # what is wrong anyhow has distance 0
            row["ADBD"] = sum_of(moves, args.device) / len(right)
            if subject.norm == "linf":
                far = sum_of([move > subject.eps * 255 for move in moves], args.device)
                row[f"{name} %"] = 100 * far / len(right)
        else:
            row[f"{name} %"], kept[name] = percent(robust), robust
    if len(kept) > 1:
        row["worst case %"] = percent(functools.reduce(torch.logical_and, kept.values()))
    row["zero gradients %"] = common.zero_gradients(subject.model, subject.x, subject.y,
                                                    args.batch_size)
    row["seconds"] = time.perf_counter() - start
    return row, kept


# -------------------------------------------------------------------------------- gradient masking

def pgd_withstand(subject, args, right, eps, alpha, steps):
    """Which of the pictures in `right`, bool N, withstand one restart of PGD, bool N."""
    generator = torch.Generator(args.device).manual_seed(args.seed)
    return withstand(subject, args, right, lambda model, x, y: common.pgd_attack(
        model, x, y, eps, alpha, steps, norm=subject.norm, generator=generator),
        name=f"PGD-{steps}")


def checklist(subject, args, row, kept):
    """Signs that a network hides its gradients instead of being robust (Athalye et al. 2018;
    Carlini et al. 2019): a list of (verdict, what should hold, the figures behind it)."""
    white = functools.reduce(torch.logical_and, [
        mask for name, mask in kept.items() if not name.startswith(("Square", "transfer"))])
    found = []
    for word, claim in (("Square", "gradient-free attacks are weaker than white-box ones"),
                        ("transfer", "transferred attacks are weaker than white-box ones")):
        masks = [mask for name, mask in kept.items() if name.startswith(word)]
        for mask in masks:
            share, best, only = percent(mask), percent(white), percent(white & ~mask)
            found.append((only <= 1 and share >= best, claim,
                          f"{share:.1f} % against {best:.1f} %; it alone fools {only:.1f} %"))
        if not masks:
            found.append((None, claim, "not checked: no --surrogate"))
    largest = 0.5 * (subject.x.shape[1:].numel() ** 0.5 if subject.norm == "l2" else 1)
    shares, mask = {}, (everything := torch.ones_like(subject.y).bool())
    for radius in [factor * subject.eps for factor in (1, 2, 4, 8)] + [largest]:
        mask = pgd_withstand(subject, args, mask, radius, radius / 4, 20)
        shares[radius] = percent(mask)
    found.append((shares[largest] <= 1, "accuracy falls to 0 as eps grows", ", ".join(
        f"{share:.1f} % at {radius * 255:.0f}" for radius, share in shares.items())))
    shares = [percent(pgd_withstand(subject, args, everything, subject.eps, alpha * subject.eps,
                                    steps)) for steps, alpha in ((1, 1), (10, 0.25), (100, 0.25))]
    found.append((shares[0] >= shares[1] - 1 and shares[1] >= shares[2] - 1,
                  "more steps never help the defender", ", ".join(
                      f"{share:.1f} % after {n}" for share, n in zip(shares, (1, 10, 100)))))
    found.append((row["zero gradients %"] <= 1, "the input gradient is not 0",
                  f"{row['zero gradients %']:.1f} % of it is exactly 0"))
    return [({True: "pass", False: "WARN", None: "----"}[holds], *rest) for holds, *rest in found]


# ---------------------------------------------------------------------------------------- pictures

def figure_of(rows, columns, width, height, **options):
    """A figure to be read from the last row of a lecture hall, and its axes, rows x columns."""
    import matplotlib.figure  # takes half a second
    matplotlib.rcParams.update({"font.size": 13, "axes.grid": True, "grid.alpha": 0.3,
                                "lines.linewidth": 2.2})
    figure = matplotlib.figure.Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def label(subject):
    """What a picture calls a checkpoint: its folder and, where that says more, its name."""
    path = Path(subject.path)
    return f"{path.parent.name}/{path.stem}".lstrip("/")


def pictures(subject, args):
    """The first of the test pictures, float in [0, 1], and their labels."""
    some = torch.arange(min(args.n_plot, len(subject.y)), device=subject.y.device)
    (index, x), = read(subject.x, [some])
    return x.float() / 255, subject.y[index]


def attacked(subject, args, steps):
    """(x, y, x_adv under PGD, logits of x, logits of x_adv) for the pictures to draw."""
    (x, y), generator = pictures(subject, args), torch.Generator(args.device).manual_seed(args.seed)
    with common.exact(subject.model) as model:
        x_adv = common.pgd_attack(model, x, y, subject.eps, subject.eps / 4, steps,
                                  norm=subject.norm, generator=generator)
        with torch.no_grad():
            return x, y, x_adv, model(x), model(x_adv)


def draw_lines(lines, xlabel, ylabel, **options):
    """lines: (label, colour's number, style, xs, ys), on one picture."""
    figure, ((axes,),) = figure_of(1, 1, 8, 5.2)
    for name, i, style, xs, ys in lines:
        axes.plot(xs, ys, style, color=COLOURS[i % len(COLOURS)], label=name)
    axes.set(xlabel=xlabel, ylabel=ylabel, **options)
    axes.legend(fontsize=11)
    return figure


def along_training(subjects, values, ylabel, **options):
    """values[i], the numbers of subject i by name, against its epoch: a colour for each network,
    which is all the checkpoints of a folder, averaged or not, and a line style for each name."""
    networks, lines = {}, []
    for subject, numbers in zip(subjects, values):
        path = Path(subject.path)
        network = path.parent, path.parent.name + " (average)" * path.name.startswith("swa_")
        networks.setdefault(network, []).append((subject.settings.get("epoch", 0), numbers))
    for i, ((_, network), points) in enumerate(networks.items()):
        for name, style in zip(values[0], ("o-", "s--", "^:")):
            line = zip(*sorted((epoch, numbers[name]) for epoch, numbers in points))
            lines.append((f"{network}: {name}", i, style, *line))
    return draw_lines(lines, "epoch", ylabel, xlim=(0, None), **options), values


def largest_eigenvalue(model, x, y, iterations=20):
    """Largest eigenvalue of the Hessian of cross-entropy in the input, N, by power iteration.
    x float N x 3 x H x W; per unit of [0, 1] squared."""
    x = x.detach().requires_grad_()
    gradient, = torch.autograd.grad(common.cross_entropy(model(x), y), x, create_graph=True)
    v = torch.randn_like(x)
    for _ in range(iterations):
        v = v / common.l2_norm(v).clamp(min=1e-30)
        product, = torch.autograd.grad(gradient, x, v, retain_graph=True)
        value, v = (v * product).flatten(1).sum(1), product
    return value.detach()


def plot_curvature(subjects, args):
    """Backward Smoothing's Figure 3: how curved the loss is at, and near, the pictures."""
    values = []
    for subject in subjects:
        (x, y), eps, norm = pictures(subject, args), subject.eps, subject.norm
        with common.exact(subject.model) as model:
            points = {"clean": x, "random": common.random_start(x, eps, norm),
                      "backward-smoothed": backward_smoothing(model, x, eps, eps, alone=True,
                                                              norm=norm)}
            values.append({name: torch.cat([
                largest_eigenvalue(model, *part) for part in zip(point.split(50), y.split(50))
            ]).mean().item() for name, point in points.items()})
    return along_training(subjects, values, "largest Hessian eigenvalue (mean)", yscale="log")


def plot_alignment(subjects, args):
    """KD-SWA's Figure A11, Fast-BAT's Figure 2: do the gradients at a picture and near it agree?"""
    values = []
    for subject in subjects:
        with common.exact(subject.model) as model:
            apart = misalignment(model, *pictures(subject, args), subject.eps, subject.norm, "eval")
            values.append({"gradient alignment": 1 - apart.item()})
    return along_training(subjects, values, "gradient alignment (cosine)")


@torch.no_grad()
def plot_landscape(subjects, args):
    """KD-SWA's Figure 6: the loss of two pictures along the gradient's sign and random signs."""
    figure, axes = figure_of(2, len(subjects), 4.2 * len(subjects) + 1, 7.4)
    ticks, levels, values = torch.linspace(-2, 2, 41), np.geomspace(1e-4, 100, 25), []
    for column, subject in enumerate(subjects):
        start, labels = (part[:2] for part in pictures(subject, args))
        with common.exact(subject.model) as model:
            with torch.enable_grad():
                loss = common.cross_entropy(model(start.requires_grad_()), labels)
                along = torch.autograd.grad(loss, start)[0].sign() * subject.eps
            across = torch.randn_like(along).sign() * subject.eps
            for row, y in enumerate(labels):
                grid = torch.stack([start[row] + a * along[row] + b * across[row]
                                    for b in ticks for a in ticks])
                surface = torch.cat([F.cross_entropy(model(part), y.expand(len(part)),
                                                     reduction="none") for part in grid.split(64)])
                surface = surface.view(len(ticks), -1).cpu().clamp(levels[0] * 1.01, levels[-1])
                drawn = axes[row, column].contourf(ticks, ticks, surface, levels, norm="log",
                                                   cmap="cividis")
                axes[row, column].set(xlabel="gradient sign (eps)", title=label(subject),
                                      ylabel="random signs (eps)")
        values.append({"highest loss in the second picture": surface.max().item()})
    figure.colorbar(drawn, ax=axes, label="loss", ticks=levels[::4])
    return figure, values


def plot_eps(subjects, args):
    """Accuracy under PGD-20 against eps."""
    lines, values = [], []
    for i, subject in enumerate(subjects):
        few, shares = subject._replace(x=subject.x[:args.n_plot], y=subject.y[:args.n_plot]), {}
        kept = torch.ones_like(few.y).bool()
        for factor in (0, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4):
            radius = factor * subject.eps
            kept = pgd_withstand(few, args, kept, radius, radius / 4, 20)
            shares[f"{radius * 255:g}"] = percent(kept)
        lines.append((label(subject), i, "o-", list(map(float, shares)), list(shares.values())))
        values.append(shares)
    return draw_lines(lines, "eps (pixels of 255)", "accuracy under PGD-20 (%)",
                      ylim=(-2, 102)), values


def plot_weights(subjects, args):
    """KD-SWA's Figure 7: the loss under PGD-10 when the weights move in 10 random directions."""
    lines, values, distances = [], [], (50, 40, 30, 20, 10, 0)  # 0 last: it puts the weights back
    for i, subject in enumerate(subjects):
        weights, losses = list(subject.model.parameters()), []
        trained = [weight.detach().clone() for weight in weights]
        for _ in range(10):
            noise = [torch.randn_like(weight) for weight in trained]
            whole, far = (sum(w.square().sum() for w in part).sqrt() for part in (trained, noise))
            for distance in distances:
                with torch.no_grad():
                    for weight, middle, direction in zip(weights, trained, noise):
                        weight.copy_(middle + distance / 100 * whole / far * direction)
                _, y, _, _, logits = attacked(subject, args, 10)
                losses.append(F.cross_entropy(logits, y).item())
        losses = np.array(losses).reshape(10, -1).mean(0).tolist()
        lines.append((label(subject), i, "o-", distances, losses))
        values.append({f"{distance} %": loss for distance, loss in zip(distances, losses)})
    return draw_lines(lines, "distance from the trained weights (% of their norm)",
                      "loss under PGD-10 (mean)", yscale="log"), values


def plot_logits(subjects, args):
    """KD-SWA's Figure 5: logits of three classes, clean and under PGD-20, in the plane in which
    the clean ones vary most."""
    figure, (line,) = figure_of(1, len(subjects), 4.6 * len(subjects), 4.8)
    values = []
    for ax, subject in zip(line, subjects):
        _, y, _, clean, moved = attacked(subject, args, 20)
        middle = clean.mean(0)
        _, spread, axes = torch.linalg.svd(clean - middle, full_matrices=False)
        for colour, c in zip(COLOURS, y.unique()[:3].tolist()):
            for logits, marker, word in ((clean, "o", ""), (moved, "*", ", attacked")):
                ax.scatter(*((logits[y == c] - middle) @ axes[:2].T).T.cpu(), marker=marker, s=45,
                           color=colour, alpha=0.6, label=subject.classes[c] + word)
        ax.set(xlabel="first principal axis", ylabel="second principal axis", title=label(subject))
        share = spread[:2].square().sum() / spread.square().sum()
        values.append({"variance in the plane %": 100 * share.item()})
    figure.legend(*line[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure, values


def plot_sheet(subjects, args):
    """A picture of each class: clean, the perturbation (-eps black, +eps white) and their sum, each
    under the class that the model sees in it."""
    columns, values = min(10, max(len(subject.classes) for subject in subjects)), []
    figure, axes = figure_of(3 * len(subjects), columns, 1.15 * columns + 1.3, 4 * len(subjects))
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    for subject, lines in zip(subjects, axes.reshape(len(subjects), 3, columns)):
        index = torch.stack([(subject.y == c).nonzero()[0, 0] for c in subject.y.unique()[:10]])
        some = subject._replace(x=subject.x[index], y=subject.y[index])
        x, y, x_adv, *logits = attacked(some, args, 20)
        seen, seen_attacked = (part.argmax(1).tolist() for part in logits)
        noise = (0.5 + (x_adv - x) / (2 * subject.eps)).clamp(0, 1)
        for line, word, shown, guesses in zip(lines, ("clean", "attack", "attacked"),
                                              (x, noise, x_adv), (seen, y, seen_attacked)):
            line[0].set_ylabel(word, fontsize=11)
            for ax, picture, guess, truth in zip(line, shown, guesses, y):
                ax.imshow(picture.permute(1, 2, 0).cpu().numpy())
                if shown is not noise:
                    ax.set_title(subject.classes[guess] + "!" * (guess != truth), fontsize=10,
                                 color=COLOURS[int(guess != truth)])
        lines[1, columns // 2].set_title(label(subject), fontsize=12)
        values.append({"fooled %": percent(torch.tensor(seen_attacked) != y.cpu())})
    return figure, values


def plot_curves(subjects, args):
    """Robust overfitting: the log of each checkpoint's run, up to the checkpoint."""
    logs, values = [], []
    for subject in subjects:
        if "rows" not in subject.settings:
            raise common.UserError(f"{subject.path} comes without the log that 'curves' draws")
        rows, prefix = subject.settings["rows"], "swa_" * Path(subject.path).name.startswith("swa_")
        pgd = [row[f"{prefix}val_pgd"] for row in rows if f"{prefix}val_pgd" in row]
        logs.append((label(subject), rows, prefix))
        values.append({"best held-out PGD-10 %": max(pgd), "last": pgd[-1]})
    return draw_curves(logs), values


PLOTS = {name.removeprefix("plot_"): function for name, function in list(globals().items())
         if name.startswith("plot_")}


def table(rows, markdown=False):
    """Rows, dicts, as aligned text or as Markdown; a column that a row lacks is left empty."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names] + [[f"{row[name]:.2f}" if isinstance(row.get(name), float) else
                        str(row.get(name, "")) for name in names] for row in rows]
    if markdown:
        return "\n".join(f"| {' | '.join(line)} |" for line in (
            lines[:1] + [["---"] * len(names)] + lines[1:]))
    widths = [max(map(len, column)) for column in zip(*lines)]
    words = [isinstance(rows[0].get(name), str) for name in names]
    return "\n".join("  ".join(
        cell.ljust(width) if word else cell.rjust(width)
        for cell, width, word in zip(line, widths, words)).rstrip() for line in lines)


def main(args):
    folders = [Path("runs", f"evaluation-{i}") for i in range(1, 10_000)]
    folder = Path(args.out) if args.out else next(f for f in folders if not f.exists())
    if (folder / "result.json").exists():
        raise common.UserError(f"{folder} holds a result, never overwritten: take another --out")
    if args.checklist:
        args.attack = list(dict.fromkeys([*args.attack, "pgd", "lite", "square"]))
    read_data = functools.cache(lambda dataset, data_dir, image_size: load_data(
        argparse.Namespace(**vars(args) | dict(
            dataset=dataset, data_dir=data_dir, val_size=1, train_size=None, label_noise=0,
            image_size=image_size))))
    subjects = [load_subject(path, args, read_data) for path in args.checkpoints]
    surrogates = [load_subject(path, args, read_data) for path in args.surrogate]
    for path, _, _, classes, *_ in surrogates:
        if any(classes != subject.classes for subject in subjects):
            raise common.UserError(f"{path} cannot be a surrogate: it knows other classes")
    rows, kept = zip(*[evaluate(subject, args, surrogates) for subject in subjects])
    result = dict(command=shlex.join(sys.argv), args=vars(args), rows=rows, plots={})
    say(table(rows) + ("\n\n" + table(rows, markdown=True)) * args.markdown)
    for subject, row in zip(subjects, rows):
        if len(subject.classes) < 4 and "lite" in args.attack:
            say(f"{subject.path}: DLR needs 4 classes for a target; AA-lite took cross-entropy")
        if row["zero gradients %"] > 1:
            say(f"warning: {subject.path}: {row['zero gradients %']:.1f} % of the input gradient "
                "is exactly 0: attacks that follow it may fail for that reason alone")
    if args.checklist:
        result["checklist"] = [checklist(subject, args, *each)
                               for subject, *each in zip(subjects, rows, kept)]
        for subject, found in zip(subjects, result["checklist"]):
            say(f"\n{subject.path}: signs of gradient masking")
            for verdict, claim, figures in found:
                say(f"  {verdict}  {claim}: {figures}")
    save(json.dumps(result, indent=1), folder / "result.json")  # and again with the plots
    for name in args.plots:
        torch.manual_seed(args.seed)
        figure, values = PLOTS[name](subjects, args)
        if common.RANK == 0:
            figure.savefig(folder / f"{name}.png", dpi=100)
        result["plots"][name] = values
        for subject, numbers in zip(subjects, values):
            say(f"{name}, {subject.path}: " + ", ".join(
                f"{key} {number:.4g}" for key, number in numbers.items()))
    save(json.dumps(result, indent=1), folder / "result.json")
    say(f"wrote {folder}/result.json" + "".join(f" {name}.png" for name in args.plots))


if __name__ == "__main__":
    common.main(parse_args, main)
