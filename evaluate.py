"""Clean and robust accuracy of saved checkpoints.

    python evaluate.py runs/.../best.pt runs/.../last.pt        PGD with 50 steps and 10 restarts
    python evaluate.py runs/.../best.pt --steps 20 --restarts 1 --n-examples 200
    python evaluate.py weights.pth --arch resnet18 --dataset cifar10        a bare state dict

Prints one table, with a row for each checkpoint, and writes it to result.json. All numbers are
computed in fp32 on the test set; only pictures that are still right are attacked (again).
"""

import functools
import json
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch

import common
from data import load_data


def parse_args(argv=None):
    parser = common.Parser(__file__, __doc__)
    count = common.number(int, 1)
    add = parser.add_argument
    add("checkpoints", nargs="+", metavar="CKPT", help="best.pt, last.pt or a state dict")
    add("--steps", type=count, default=50, help="of PGD, each of length eps/4")
    add("--restarts", type=count, default=10, help="of PGD")
    add("--eps", type=common.pixels, metavar="PIXELS", help="None: as in training, else 8")
    add("--norm", choices=["linf", "l2"], help="None: as in training, else linf")
    add("--n-examples", type=count, help="test pictures, drawn at random; None: all")
    add("--batch-size", type=count, help="None: 64 on a CPU, else 1000")
    add("--arch", choices=common.ARCHS, metavar="NAME", help="of a state dict from elsewhere")
    add("--width", type=count, help="of that architecture; None: its own")
    add("--activation", choices=common.ACTIVATIONS, help="of that architecture; None: relu")
    add("--dataset", help="None: as in training; it also gives a state dict's colour statistics")
    add("--data-dir", metavar="DIR", help="None: as in training, else data")
    add("--seed", type=common.number(int, 0), default=0, help="of examples and noise")
    add("--device", default="auto", help="auto (CUDA, else MPS, else CPU), or one of torch's")
    add("--out", metavar="DIR", help="folder of result.json; None: the next free runs/evaluation-N")
    add("--sheet", metavar="FILE", help="also draw a picture of each class, attacked")
    add("--curves", metavar="FILE", help="also draw the training of all of them together")
    return parser.parse_args(argv)


def attacks(args, eps, norm):
    """Name -> attack(model, x, y) -> x_adv. Every further attack gets its column from here."""
    def pgd(model, x, y):
        return common.pgd_attack(model, x, y, eps, eps / 4, args.steps, args.restarts, norm,
                                 generator=generator)

    generator = torch.Generator(args.device).manual_seed(args.seed)
    return {f"PGD-{args.steps}-{args.restarts}": pgd}


def zero_gradients(model, x, y, batch_size):
    """Percent of the coordinates where cross-entropy's input gradient is exactly 0: there, attacks
    that follow the gradient do nothing."""
    zeros = 0
    for index in torch.arange(len(y)).split(batch_size or 64):
        picture = (x[index].float() / 255).requires_grad_()
        with common.exact(model):
            gradient, = torch.autograd.grad(common.cross_entropy(model(picture), y[index]), picture)
        zeros += (gradient == 0).sum().item()
    return 100 * zeros / x.numel()


def evaluate(path, args, read_data):
    """One row of the table, a dict: what was evaluated, n, and accuracies in percent. With --sheet
    also the examples to draw: a picture of each class, attacked, and what the model sees in it."""
    start = time.perf_counter()
    data = read_data(args.dataset, args.data_dir or "data") if args.dataset else None
    model, settings = common.load_model(path, args.device, args.arch, args.width,
                                        args.activation, data)
    if data is None:
        data = read_data(settings["dataset"], args.data_dir or settings["data_dir"])
    common.check_classes(path, settings, data)
    eps, norm = args.eps or settings.get("eps", 8 / 255), args.norm or settings.get("norm", "linf")
    x, y = data.test
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(args.seed)).to(y.device)
    x, y = x[order[:args.n_examples]], y[order[:args.n_examples]]
    row = dict(checkpoint=path, dataset=Path(args.dataset or settings["dataset"]).name,
               arch=args.arch or settings["arch"], n=len(y), eps=eps * 255, norm=norm)
    for name, attack in attacks(args, eps, norm).items():
        show = common.progress(f"{path}, {name}: picture", len(y))
        row["clean %"], row[f"{name} %"] = common.accuracy(model, x, y, attack, args.batch_size,
                                                           show)
    row["zero gradients %"] = zero_gradients(model, x, y, args.batch_size)
    row["seconds"] = time.perf_counter() - start
    if not args.sheet:
        return row, None
    index = torch.stack([(y == c).nonzero()[0, 0] for c in y.unique()[:10]])
    pictures, labels = x[index].float() / 255, y[index]
    with common.exact(model):
        attacked = attack(model, pictures, labels)
        with torch.no_grad():
            seen = [model(z).argmax(1).tolist() for z in (pictures, attacked)]
    words = [[data.classes[c] for c in each] for each in (labels.tolist(), *seen)]
    return row, (path, pictures, attacked, eps, *words)


def draw_sheet(examples, file):
    """For each model: clean pictures, the perturbation (-eps black, +eps white) and their sum, each
    under the class that the model sees in it."""
    from matplotlib.figure import Figure
    columns = max(len(example[1]) for example in examples)
    figure = Figure(figsize=(1.15 * columns + 1.3, 3.9 * len(examples)), layout="constrained")
    for part, example in zip(np.atleast_1d(figure.subfigures(len(examples))), examples):
        path, clean, attacked, eps, truth, seen, seen_attacked = example
        part.suptitle(path)
        axes = part.subplots(3, columns, squeeze=False)
        noise = (0.5 + (attacked - clean) / (2 * eps)).clamp(0, 1)
        rows = {"clean": (clean, seen), "attack": (noise, None),
                "attacked": (attacked, seen_attacked)}
        for line, (name, (pictures, classes)) in zip(axes, rows.items()):
            line[0].set_ylabel(name, fontsize=11)
            for i, picture in enumerate(pictures):
                line[i].imshow(picture.permute(1, 2, 0).cpu().numpy())
                if classes:
                    right = classes[i] == truth[i]
                    line[i].set_title(classes[i] if right else f"{classes[i]}!", fontsize=10,
                                      color="#0072b2" if right else "#d55e00")
        for ax in axes.flat:
            ax.set(xticks=[], yticks=[])
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)


def draw_curves(paths, file):
    """Held-out clean and PGD-10 accuracy of each checkpoint's run, against the epoch and against
    the seconds of training. UserError for a checkpoint without a run."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    by_epoch, by_time = figure.subplots(1, 2, sharey=True)
    colours = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"]
    for i, path in enumerate(paths):
        state, colour = common.load(path), colours[i % len(colours)]
        if "rows" not in state:
            raise common.UserError(f"{path} comes without the log that --curves draws")
        rows = state["rows"]
        seconds = np.cumsum([row["seconds"] for row in rows])
        prefix = "swa_" if Path(path).name.startswith("swa_") else ""
        kept = [i for i, row in enumerate(rows) if f"{prefix}val_pgd" in row]
        epochs, seconds = [rows[i]["epoch"] for i in kept], seconds[kept]
        clean, pgd = ([rows[i][f"{prefix}val_{key}"] for i in kept] for key in ("clean", "pgd"))
        label = Path(path).parent.name + " (average)" * bool(prefix)
        by_epoch.plot(epochs, clean, ":", color=colour)
        by_epoch.plot(epochs, pgd, "-", color=colour, label=label, linewidth=2)
        by_time.plot(seconds, pgd, "-", color=colour, linewidth=2)
    by_epoch.set(xlabel="epoch", ylabel="held-out accuracy (%)", ylim=(0, 102),
                 title="PGD-10 (solid) and clean (dotted)")
    by_time.set(xlabel="training time (s)", title="PGD-10")
    figure.legend(loc="outside lower center", ncols=4)
    by_epoch.xaxis.get_major_locator().set_params(integer=True)
    for axes in (by_epoch, by_time):
        axes.grid(alpha=0.3)
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)


def table(rows):
    """Rows, dicts with the same keys, as aligned text."""
    cells = [[f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    lines = [list(rows[0]), *cells]
    widths = [max(map(len, column)) for column in zip(*lines)]
    words = [cell.replace(".", "").replace("-", "").isdigit() for cell in cells[0]]
    return "\n".join("  ".join(cell.rjust(w) if number else cell.ljust(w) for cell, w, number in
                               zip(line, widths, words)) for line in lines)


def main(args):
    folders = [Path("runs", f"evaluation-{i}") for i in range(1, 10_000)]
    folder = Path(args.out) if args.out else next(f for f in folders if not f.exists())
    if (folder / "result.json").exists():
        raise common.UserError(f"{folder} holds a result, which is never overwritten: take "
                               "another --out")
    if args.curves:
        draw_curves(args.checkpoints, args.curves)
    read_data = functools.cache(lambda dataset, data_dir: load_data(dataset, data_dir, args.device))
    rows, examples = zip(*[evaluate(path, args, read_data) for path in args.checkpoints])
    print(table(rows))
    for row in rows:
        if row["zero gradients %"] > 1:
            print(f"warning: {row['checkpoint']}: {row['zero gradients %']:.1f} % of the input "
                  "gradient is exactly 0: attacks that follow it may fail for that reason alone")
    result = dict(command=shlex.join(sys.argv), args=vars(args), rows=rows)
    common.save(json.dumps(result, indent=1), folder / "result.json")
    if args.sheet:
        draw_sheet(examples, args.sheet)
    print(f"wrote {folder}/result.json")


if __name__ == "__main__":
    common.main(parse_args, main)
