"""evaluate.py: command line, attacks, warnings, checklist, plots, and foreign checkpoints."""

import argparse
import json
import math
import os
import pickle
import re
import statistics

import matplotlib.image
import pytest
import torch
import torch.nn.functional as F
import torchvision
from test_models import Official
from torch import nn

import attacks
import common
import evaluate

FAST = ["--attack", "pgd", "--steps", 2, "--restarts", 2]
QUICK = ["--steps", 1, "--restarts", 1, "--apgd-steps", 2, "--queries", 5, "--n-examples", 9]
EPS = 8 / 255


@pytest.fixture(autouse=True)
def few_shapes(monkeypatch):
    """`shapes` with 50 test images instead of 1000."""
    draw = common.draw_shapes
    monkeypatch.setattr(common, "draw_shapes", lambda n, seed, size=32: draw(n // 20, seed, size))
    evaluate.test_images.cache_clear()


@pytest.fixture
def run(script):
    """run(options) -> (output, result), where evaluate.py is to succeed; or its one line."""
    def call(*options, fails=None):
        status, out, err = script(evaluate, *options)
        if fails:
            assert status == 2 and err.count("\n") == 1 and err.startswith("error: "), err
            return err
        assert status == 0, err
        folder = out.splitlines()[-1].removeprefix("see ")
        with open(f"{folder}/result.json") as file:
            return out, json.load(file)
    return call


def some_network(seed=0, classes=10, arch="resnet10"):
    """A small network whose BatchNorm statistics are not those of a fresh one, in eval mode, and
    which does not take all images of `shapes` for the same."""
    torch.manual_seed(seed)
    model = common.Classifier(arch, classes, 16)
    for _ in range(3):
        model(torch.rand(16, 3, 32, 32) * torch.rand(16, 3, 1, 1))
    with torch.no_grad():
        model.linear.bias -= model.eval()(common.draw_shapes(400, 2)[0] / 255).mean(0)
    return model


def save(path, model, seed=0, **changes):
    """Writes a checkpoint of ours."""
    args = dict(method="fast_at", dataset="shapes", data_dir="data", image_size=None, eps=EPS,
                norm="linf", seed=seed, out=str(path), lr=0.1) | changes.pop("args", {})
    rows = [dict(epoch=e, lr=0.1, loss=2 / e + seed, seconds=1.0, val_clean=50.0 + e + seed,
                 val_pgd=30.0 + e + seed) for e in range(1, 4 + (seed == 2))]
    path.parent.mkdir(exist_ok=True, parents=True)
    torch.save(dict(model=model.state_dict(), mean=model.mean, std=model.std, rows=rows, epoch=3,
                    options=model.options, args=args, classes=list(common.SHAPES)) | changes, path)
    return str(path)


@pytest.fixture
def ours(tmp_path):
    return save(tmp_path / "run/best.pt", some_network())


class Plane(nn.Module):
    """Logits W x, whose distances to the boundary are known. Quantised, it sees images in nine
    steps, so that the gradient is 0 and the network as weak as before; saturated, its softmax
    leaves no gradient; broken, its logits are finite and its gradients not."""

    def __init__(self, weight, kind=""):
        super().__init__()
        self.weight, self.kind = nn.Parameter(weight), kind

    def forward(self, x):
        logits = ((x * 8).round() / 8 if self.kind == "quantised" else x).flatten(1) @ self.weight.T
        return {"saturated": 1e5 * logits, "random": logits + 0.01 * torch.randn_like(logits),
                "broken": logits + (0 * logits).abs().sqrt()}.get(self.kind, logits)


def plane(n=30, classes=10, size=8, kind=""):
    """A network, images x uint8 and what it takes them for."""
    torch.manual_seed(4)
    weight = torch.randn(classes, 3 * size * size)
    model = Plane(weight - weight.mean(1, keepdim=True), kind)
    x = (torch.rand(n, 3, size, size) * 127 + 64).byte()
    with torch.no_grad():
        return model, x, model(x / 255).argmax(1)


def checkpoint_of(model, x, y, *options, norm="linf", eps=EPS):
    """A Checkpoint of any network, as if it had been loaded."""
    found = object.__new__(evaluate.Checkpoint)
    args = evaluate.parse_args(["x.pt", *map(str, options)])
    vars(found).update(
        path="x.pt", args=args, model=model, x=x, y=y, norm=norm, eps=eps, trained={}, ours=True,
        run="x", average="", classes=[str(i) for i in range(10)], epoch=0, log=[], name="x",
        about=dict(checkpoint="x.pt", dataset="plane", arch="plane", normalisation="none"))
    return found


def test_the_defaults_and_the_result(run, ours, tmp_path):
    """The columns, one unit for every eps, and the accuracy of each class."""
    out, result = run("r?n/*.pt", "--eps", 4, "--apgd-steps", 2, "--n-examples", 20, "--steps", 2,
                      "--restarts", 1, "--alpha", 1)
    row, = result["rows"]
    assert list(row) == ["checkpoint", "dataset", "arch", "normalisation", "n", "eps", "norm",
                         "clean %", "PGD-2-1 %", "AA-lite %", "worst case %", "zero gradients %",
                         "seconds"]
    assert row["worst case %"] <= min(row["PGD-2-1 %"], row["AA-lite %"]) <= row["clean %"] <= 100
    assert row["checkpoint"] == f"run{os.sep}best.pt"  # the pattern is not left to the shell
    assert row["n"] == 20 and row["normalisation"] == "of the run" and row["arch"] == "resnet10"
    assert row["eps"] == result["args"]["eps"] == pytest.approx(4)
    assert result["args"]["alpha"] == pytest.approx(1)
    x, y, classes = evaluate.test_images("shapes", "data", None, "cpu")
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))[:20]
    counts = y[order].bincount(minlength=10).tolist()
    for column in ("clean %", "worst case %"):
        parts = [result["classes"][0].get(name, {column: 0})[column] * n / 20
                 for name, n in zip(classes, counts)]
        assert sum(parts) == pytest.approx(row[column])
    assert (tmp_path / "runs/evaluation/result.json").exists()
    assert evaluate.parse_args(["x.pt", "--start", "zero"]).restarts == 1


def test_every_attack_has_its_column(run, ours):
    out, result = run(ours, "--attack", "pgd", "margin", "lite", "square", "cw", "rays", *QUICK,
                      "--surrogate", ours, ours, "--markdown", "--checklist")
    row, = result["rows"]
    for name in ("PGD-1-1 %", "margin-PGD-1-1 %", "AA-lite %", "Square-5 %", "CW-L2 %", "RayS-5 %",
                 "transfer 1 %", "transfer 2 %", "worst case %"):
        assert 0 <= row[name] <= row["clean %"]
    assert "CW-L2 mean distance" in row and "ADBD" in row
    assert row["transfer 1 %"] == row["PGD-1-1 %"]  # a network is its own best surrogate
    lines = [line for line in out.splitlines() if line.startswith("|")]
    assert len(lines) == 3 and len({line.count("|") for line in lines}) == 1
    assert "| AA-lite % |" in lines[0] and set(lines[1]) == set("|- ")
    assert len(result["checklist"][0]) == 8 and {verdict for verdict, _, _ in
                                                 result["checklist"][0]} <= {"pass", "WARN"}
    assert len(re.findall(r"^  (pass|WARN)  \w", out, re.M)) == 8
    _, result = run(ours, "--attack", "none")
    assert not [name for name in result["rows"][0] if "PGD" in name or "AA" in name]


def test_attacks_do_not_depend_on_each_other():
    """Each has noise of its own, and a second call gives the same."""
    def withstood(*attacks):
        options = "--apgd-steps", 2, "--steps", 1, "--restarts", 2, "--queries", 9
        some = checkpoint_of(*plane(60), "--attack", *attacks, *options, eps=0.006)
        return evaluate.evaluate(some, [])[1]
    alone, one, other = withstood("lite"), *(withstood("pgd", "square", "lite") for _ in "12")
    assert 0.2 < alone["lite"].float().mean() < 0.8 and torch.equal(alone["lite"], one["lite"])
    assert all(torch.equal(one[name], other[name]) for name in ("pgd", "square", "lite"))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_each_attack_has_the_checkpoints_eps_and_norm(norm):
    """For two classes the distance to the boundary is known: margin / the dual norm of w."""
    model, x, y = plane(20, classes=2, size=2)
    w = (model.weight[1] - model.weight[0]).detach()
    exact = (x.flatten(1) / 255 @ w).abs() / w.norm(p=1 if norm == "linf" else 2)
    eps = exact.sort().values[5:7].mean().item()
    some = checkpoint_of(model, x, y, "--attack", "pgd", "margin", "lite", "square", "--steps", 20,
                         "--queries", 300, norm=norm, eps=eps)
    row, _ = evaluate.evaluate(some, [])
    for column in ("PGD-20-10 %", "margin-PGD-20-10 %", "AA-lite %", "worst case %"):
        assert row[column] == 70, column
    assert 70 <= row["Square-300 %"] < 100


def test_the_restarts_of_pgd_have_noise_of_their_own():
    model, x, y = plane()
    some = checkpoint_of(model, x, y, "--attack", "pgd", "margin", "--steps", 1, "--alpha", 1)
    for _, parts in evaluate.chosen_attacks(some, []).values():
        one, other = (attack(model, x / 255, y) for attack in parts[:2])
        assert not torch.allclose(one, other, atol=1 / 255)


@pytest.mark.parametrize("options, message", [
    (["--norm", "l2"], "--norm is not that of "),
    (["--mean", 125.3, 123, 113.9, "--std", 63, 62, 66], "divide by 255"),
    (["--mean", 0.5, 0.5, 0.5], "--mean and --std go together"),
    (["--restarts", 0], "--restarts"), (["--n-examples", -5], "--n-examples"),
    (["--eps", 0.031], "did you mean 7.905"), (["--dataset", "cifra10"], "cifar10"),
    (["--surrogate", "missing.pt"], "missing.pt"), (["--out", "run"], "run is taken: choose")])
def test_mistakes_get_one_line(run, ours, tmp_path, options, message):
    (tmp_path / "run/result.json").write_text("{}")
    assert message in run(ours, *options, fails=True)
    assert not (tmp_path / "runs").exists() and (tmp_path / "run/result.json").read_text() == "{}"


def test_a_plot_that_fails_is_a_warning_and_the_result_is_there_before(run, ours, monkeypatch):
    def plot(checkpoints):
        with open("runs/evaluation/result.json") as file:
            assert json.load(file)["rows"][0]["n"] == 50
        raise RuntimeError("no LaTeX")
    monkeypatch.setitem(evaluate.PLOTS, "logits", plot)
    out, result = run(ours, *FAST, "--plots", "logits", "sheet", "--n-plot", 5)
    assert "warning: the plot logits failed: no LaTeX" in out
    assert list(result["plots"]) == ["sheet"] and "PGD-2-2 %" in result["rows"][0]


def test_images_are_saved(run, ours, tmp_path):
    words = "--attack none --save-images 4 --steps 2 --alpha 1 --start zero"
    out, result = run(ours, ours, *words.split())
    saved = torch.load(tmp_path / "runs/evaluation/images.pt", weights_only=True)
    assert saved["x"].shape == saved["x_adv"].shape == (4, 3, 32, 32)
    assert 0 < (saved["x_adv"] - saved["x"]).abs().max() <= 2 / 255 + 1e-6
    assert saved["x_adv"].min() >= 0 and saved["x_adv"].max() <= 1
    with torch.no_grad():
        for images, name in (("x", "predictions"), ("x_adv", "predictions_adv")):
            assert torch.equal(some_network()(saved[images]).argmax(1), saved[name])
    assert saved["classes"] == list(common.SHAPES) and saved["y"].max() < 10
    assert (tmp_path / "runs/evaluation/images-2.pt").exists() and "sheet" in result["plots"]


def seeds(tmp_path, **changes):
    return [save(tmp_path / f"runs/fast_at-seed{i}/best.pt", some_network(i), i, **changes)
            for i in range(3)]


def test_seeds_are_summed_up_in_a_row(run, tmp_path):
    paths = seeds(tmp_path)
    save(tmp_path / "runs/data/best.pt", some_network(9), 9, args=dict(dataset="stl10"))
    assert run(paths[0], "runs/data/best.pt", paths[0], "--dataset", "shapes", *FAST)[1][
        "summary"] == []  # trained on other data, or the same run twice
    other = save(tmp_path / "runs/other/best.pt", some_network(7), 7, args=dict(lr=0.2))
    last = save(tmp_path / "runs/fast_at-seed0/last.pt", some_network(8))
    few = [*FAST, "--eps", "0.5/255"]  # so that not all images are fooled
    out, result = run(paths[2], other, paths[0], last, paths[1], paths[0], *few)
    assert [row["checkpoint"] for row in result["rows"]] == [paths[2], other, paths[0], last,
                                                             paths[1], paths[0]]
    summary, = result["summary"]
    values = [result["rows"][i]["PGD-2-2 %"] for i in (0, 2, 4)]
    assert len(set(values)) > 1, values
    assert summary["PGD-2-2 %"] == pytest.approx(dict(mean=statistics.mean(values),
                                                      std=statistics.stdev(values)))
    assert summary["n"] == 50 and "fast_at/best.pt (3 seeds)" in summary["checkpoint"]
    text = "{mean:.2f} +- {std:.2f}".format(**summary["PGD-2-2 %"])
    assert text in out.splitlines()[-2]
    assert len({len(line) for line in out.splitlines()[-7:-1]}) == 1  # aligned
    assert text in run(*paths, *few, "--markdown")[0]


def test_seeds_are_one_line_with_a_band_as_far_as_all_have_come(run, tmp_path, monkeypatch):
    seen, plot = [], evaluate.PLOTS["curves"]
    monkeypatch.setitem(evaluate.PLOTS, "curves", lambda few: seen.append(plot(few)) or seen[0])
    other = save(tmp_path / "runs/b/fast_at-seed0/best.pt", some_network(), args=dict(lr=1))
    _, result = run(*seeds(tmp_path), other, "--attack", "none", "--plots", "curves")
    *_, axes = seen[0][0].axes
    line, _ = axes.lines
    assert line.get_xydata().tolist() == [[1, 32], [2, 33], [3, 34]]
    low, high = axes.collections[0].get_paths()[0].get_extents().get_points()
    assert (low.tolist(), high.tolist()) == ([1, 31], [3, 35]) and axes.get_ylim()[0] <= 0
    assert {text.get_text() for text in axes.texts} == {"fast_at", "b/fast_at-seed0"}
    assert [v["held-out PGD-10 %"][-1][1] for v in result["plots"]["curves"]] == [33, 34, 35, 33]
    assert "training loss" not in evaluate.curves(argparse.Namespace(average="swa_", log=[{}]))


def test_classes_in_another_order_are_matched_by_name(run, tmp_path):
    model, names, order = some_network(), list(common.SHAPES), torch.randperm(10)
    save(tmp_path / "a.pt", model)
    for weight in model.linear.parameters():
        weight.detach().copy_(weight[order])
    save(tmp_path / "b.pt", model, classes=[names[i] for i in order])
    out, result = run("a.pt", "b.pt", *FAST)
    first, second = (row | dict(checkpoint=0, seconds=0) for row in result["rows"])
    assert first == second and result["classes"][0] == result["classes"][1]
    assert re.findall("(.*): .*same classes in another order", out) == ["b.pt"]


def test_other_classes_are_noticed(run, tmp_path, folder):
    save(tmp_path / "a.pt", some_network(), classes=["disc", "hoop", *list(common.SHAPES)[2:]])
    out, _ = run("a.pt", "--attack", "none")
    assert "a.pt knows other classes than the data set: ['hoop'] instead of ['ring']" in out
    assert "a.pt knows 10 classes" in run("a.pt", "--dataset", "pets", fails=True)
    for path in (folder / "train").rglob("*.png"):
        path.write_bytes(b"")  # only the test images are decoded
    save(tmp_path / "pets.pt", some_network(classes=2), classes=["cat", "dog"],
         args=dict(dataset=str(folder)))
    assert run("pets.pt", "--attack", "lite", "--apgd-steps", 2)[1]["rows"][0]["n"] == 8
    assert "pets.pt cannot be a surrogate" in run("a.pt", "--surrogate", "pets.pt", fails=True)


def test_data_of_another_machine_is_looked_for_here(run, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(evaluate, "test_images", lambda *args: seen.append(args) or (
        torch.zeros(10, 3, 32, 32).byte(), torch.arange(10), list(common.SHAPES)))
    (tmp_path / "here").mkdir()
    for where in ("/gone", "here"):
        save(tmp_path / "a.pt", some_network(), args=dict(dataset="cifar10", data_dir=where))
        run("a.pt", "--attack", "none")
        run("a.pt", "--attack", "none", "--data-dir", "mine")
    assert [args[1] for args in seen] == ["data", "mine", "here", "mine"]


def test_a_network_that_answers_one_class_is_noticed(run, tmp_path):
    model = some_network()
    model.linear.bias.detach()[3] += 1000
    save(tmp_path / "one.pt", model)
    out, _ = run("one.pt", "--attack", "none", "--n-examples", 16)  # of which 1.6 may be more
    assert re.search("warning: one.pt: .* % are right.* 100 % of the images get the same", out)


def test_zero_gradients_are_noticed(run, ours, tmp_path):
    model = some_network()
    for weight in model.linear.parameters():
        weight.detach().mul_(1e6)
    save(tmp_path / "masked.pt", model)
    out, result = run(ours, "masked.pt", "--attack", "none")
    assert re.search(r"warning: masked.pt: [\d.]+ % of the input gradients are exactly 0", out)
    assert result["rows"][0]["zero gradients %"] < 1 < result["rows"][1]["zero gradients %"]


def test_networks_that_are_not_finite_are_refused_by_name(run, ours, tmp_path, capsys):
    model = some_network()
    model.linear.bias.detach()[0] = math.nan
    save(tmp_path / "nan.pt", model)
    assert "nan.pt" in run("nan.pt", *FAST, fails=True)
    assert "nan.pt" in run(ours, "--surrogate", "nan.pt", *FAST, fails=True)
    with pytest.raises(SystemExit):
        evaluate.evaluate(checkpoint_of(*plane(kind="broken")), [])
    assert "x.pt: the input gradients are not finite" in capsys.readouterr().err


def no_gradient(monkeypatch):
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **kwargs: pytest.fail("gradient"))


@pytest.mark.parametrize("norm, eps", [("linf", 0.03), ("l2", 0.5)])
def test_square_fools_within_eps_and_without_a_gradient(monkeypatch, norm, eps):
    model, x, y = plane()
    x, left, seen = x / 255, [], []
    no_gradient(monkeypatch)
    model.register_forward_hook(lambda *args: seen.append(torch.is_grad_enabled()))
    for queries in (1, 20, 300):
        seen.clear()
        x_adv = attacks.square(model, x, y, eps, norm=norm, queries=queries,
                                generator=torch.Generator().manual_seed(0))
        assert len(seen) <= queries and not any(seen)
        distance = (x_adv - x).flatten(1).norm(math.inf if norm == "linf" else 2, dim=1)
        assert distance.max() <= eps + 1e-6 and x_adv.min() >= 0 and x_adv.max() <= 1
        left.append((model(x_adv).argmax(1) == y).sum())
    assert left[0] > left[2] and left[2] < 15


def test_a_tie_is_not_fooled():
    """Square goes on where the margin is 0, and argmax still gives the right class."""
    def model(x):
        calls.append(len(x))
        return torch.stack([x.mean((1, 2, 3)) * 0, x.mean((1, 2, 3)) * 0], 1)
    calls, module = [], nn.Module()
    module.forward = model
    attacks.square(module, torch.rand(3, 3, 8, 8), torch.zeros(3).long(), 0.1, queries=5)
    assert calls == [3] * 5


def test_rays_finds_the_boundary_without_a_gradient(monkeypatch):
    """For two classes the distance in Linf is margin / |w|_1; bisected to 1e-3 in L2."""
    model, x, y = plane(20, classes=2, size=2)
    x = x / 255
    w = (model.weight[1] - model.weight[0]).detach()
    exact = (x.flatten(1) @ w).abs() / w.abs().sum()
    no_gradient(monkeypatch)
    near = exact < 0.3  # beyond, the bounds of [0, 1] get in the way
    few, many = ((attacks.rays(model, x, y, queries=n) - x).flatten(1).norm(math.inf, dim=1)[near]
                 for n in (30, 400))
    assert near.sum() > 5 and (many >= exact[near] - 1e-6).all()
    assert (many <= few + 1e-6).all() and many.mean() < few.mean()
    assert torch.allclose(many, exact[near], atol=1e-3 / 12 ** 0.5)


def test_rays_does_not_depend_on_the_batch_and_leaves_what_it_cannot_fool():
    model, x, y = plane(12, classes=3, size=4)
    x, y[3] = x / 255, 1
    model.weight.detach()[2] = -100  # never the answer
    whole = attacks.rays(model, x, y, queries=60)
    parts = [attacks.rays(model, *part, queries=60) for part in zip(x.split(1), y.split(1))]
    assert torch.allclose(whole, torch.cat(parts), atol=1e-6)
    constant = Plane(torch.zeros(2, 48))
    assert torch.equal(attacks.rays(constant, x, torch.zeros(12).long(), queries=60), x)


def test_distances():
    """ADBD: 0 for images that are wrong anyway, 255 for those that are never fooled."""
    model, x, y = plane(20, classes=2, size=2)
    w = (model.weight[1] - model.weight[0]).detach()
    exact = (x.flatten(1) / 255 @ w).abs() / w.abs().sum()
    x, y, exact = (part[exact < 0.3] for part in (x, y, exact))
    wrong, middle = 1 - y[:1], exact.sort().values[len(exact) // 2:][:2].mean().item()
    some = checkpoint_of(model, x, torch.cat([wrong, y[1:]]), "--attack", "rays", "cw", "--queries",
                         300, "--batch-size", 4, eps=middle)
    row, kept = evaluate.evaluate(some, [])
    exact[0] = 0
    assert row["ADBD"] == pytest.approx(255 * exact.mean().item(), abs=0.2)
    assert row["RayS-300 %"] == pytest.approx(100 * (exact > some.eps).float().mean(), abs=6)
    assert torch.equal(kept["worst case"], kept["rays"]) and 10 < row["RayS-300 %"] < 90
    assert 0 < row["CW-L2 mean distance"] < 255
    robust = checkpoint_of(Plane(torch.tensor([[1.0], [0]]).expand(2, 12) * 0), x, y * 0,
                           "--attack", "rays", "cw", "--queries", 20)
    row, _ = evaluate.evaluate(robust, [])
    assert row["CW-L2 mean distance"] is None and row["ADBD"] == 255
    assert row["CW-L2 %"] == row["RayS-20 %"] == 100 and "None" not in evaluate.table([row])
    some.norm, some.eps = "l2", 4 * some.eps  # RayS counts in the norm of the checkpoint
    row, kept = evaluate.evaluate(some, [])
    assert 0 < row["RayS-300 %"] < 100 and torch.equal(kept["worst case"], kept["rays"])
    some.y = 1 - model(some.x / 255).argmax(1)  # none is right
    assert evaluate.evaluate(some, [])[0]["RayS-300 %"] == 0


def test_cw_finds_the_closest_point_behind_the_boundary():
    model, x, y = plane(20, classes=2, size=4)
    x = x / 255
    w = (model.weight[1] - model.weight[0]).detach()
    exact = (x.flatten(1) @ w).abs() / w.norm()
    near = exact < 0.3  # with a constant of 0.1 the attack lets go of what is farther away
    x_adv = attacks.cw_l2(model, x[near], y[near])
    assert near.sum() > 3 and (model(x_adv).argmax(1) != y[near]).all()
    distance = (x_adv - x[near]).flatten(1).norm(dim=1)
    assert (distance >= exact[near] - 1e-5).all() and (distance < 1.3 * exact[near] + 0.02).all()


def verdicts(kind, *options):
    model, x, y = plane(kind=kind)
    some = checkpoint_of(model, x, y, "--checklist", "--queries", 300, "--steps", 10, "--restarts",
                         2, "--apgd-steps", 10, *options)
    row, kept = evaluate.evaluate(some, [])
    return row, [(verdict, claim) for verdict, claim, _ in evaluate.checklist(some, row, kept)]


def test_the_checklist_passes_an_honest_network():
    row, found = verdicts("")
    assert [verdict for verdict, _ in found] == 5 * ["pass"] and row["zero gradients %"] == 0


@pytest.mark.parametrize("kind, options, warns", [
    ("quantised", [], ["strongest", "not 0"]), ("saturated", [], ["not 0"]),
    ("quantised", ["--attack", "rays", "--queries", 600], ["strongest"]),
    ("random", [], ["deterministic"])])
def test_the_checklist_catches_masked_gradients(kind, options, warns):
    row, found = verdicts(kind, *options)
    for words in warns:
        assert "WARN" in [verdict for verdict, claim in found if words in claim], found
    if "rays" in options:
        assert row["worst case %"] <= row["RayS-600 %"] < row["PGD-10-2 %"]
        assert [verdict for verdict, claim in found if "strongest" in claim] == ["WARN"] * 2


def test_the_checklists_pgd_sees_no_image_that_was_wrong_before():
    model, x, y = plane()
    y[:15] = (y[:15] + 1) % 10
    some = checkpoint_of(model, x, y, "--checklist", *QUICK[:-2], eps=0.0)
    row, kept = evaluate.evaluate(some, [])
    lines = [figures for _, claim, figures in evaluate.checklist(some, row, kept)
             if "grows" in claim or "steps" in claim]
    assert row["clean %"] == 50 and lines[0].startswith("50.0 % at 0, 50.0 % at 0, ")
    assert lines[1] == "50.0 % after 1, 50.0 % after 10, 50.0 % after 100"


def test_every_plot_is_drawn(run, drawn, tmp_path, ours, monkeypatch):
    monkeypatch.setattr(evaluate, "range", lambda *n: range(*n)[:2], raising=False)  # is faster
    paths = [save(tmp_path / "bs/epoch-1.pt", some_network(1), epoch=1), ours]
    out, result = run(*paths, "--attack", "none", "--n-plot", 4, "--plots", "--out", "plots")
    assert set(result["plots"]) == set(evaluate.PLOTS), out
    for name, values in result["plots"].items():
        picture = matplotlib.image.imread(tmp_path / f"plots/{name}.png")
        assert min(picture.shape[:2]) > 300 and picture[..., :3].std() > 0.02, name  # not blank
        assert len(values) == 2 and out.count(f"\n{name}, ") == 2
        assert "NaN" not in json.dumps(values) and "Infinity" not in json.dumps(values)


def test_the_eps_curve_is_right_at_0():
    """L2 with eps 0 was 0/0."""
    model, x, y = plane()
    y[:6] = (y[:6] + 1) % 10
    for norm in ("linf", "l2"):
        some = checkpoint_of(model, x, y, norm=norm, eps=0.05)
        radii, shares = zip(*evaluate.robustness(some)["accuracy under PGD-20 (%)"])
        assert radii[0] == 0 and shares[0] == 80 and list(shares) == sorted(shares)[::-1]


def test_the_gradients_of_two_classes_on_a_plane_are_aligned():
    assert evaluate.alignment(checkpoint_of(*plane(classes=2)))["gradient alignment"] == [
        (0, pytest.approx(1))]


def test_fooled_counts_images_that_were_right():
    model, x, y = plane(20)
    wrong = checkpoint_of(model, x, (y + 1) % 10)
    assert evaluate.sheet([wrong])[1] == [{"fooled %": 0}]
    assert evaluate.sheet([checkpoint_of(model, x, y, eps=1.0)])[1] == [{"fooled %": 100}]


def test_the_largest_eigenvalue_is_that_of_the_hessian():
    """Cross-entropy on a plane: H = W^T (diag(p) - p p^T) W, whose eigenvalues are known."""
    model, x, y = plane(4, size=2)
    model, x = model.double(), x.double() / 255
    found = attacks.largest_eigenvalue(model, x, y, 200)
    for value, p in zip(found, model(x).softmax(1)):
        hessian = model.weight.T @ (p.diag() - p[:, None] * p) @ model.weight
        assert value.item() == pytest.approx(torch.linalg.eigvalsh(hessian)[-1].item(), rel=1e-3)


class PreActResNet(Official):
    """Wong's, GradAlign's, Fast-BAT's or ("activated") Rice's, also without the final BatchNorm
    (kuangliu, GradAlign, RobustBench), with RobustBench's buffers, with what GradAlign's holds
    twice."""

    def __init__(self, kind="raw", final_bn=True, buffers=False, copies=False):
        super().__init__(kind, (2, 2, 2, 2), 16, F.relu, final_bn)
        self.register_buffer("mu", torch.rand(1, 3, 1, 1) if buffers else None)
        self.register_buffer("sigma", torch.rand(1, 3, 1, 1) + 0.1 if buffers else None)
        if copies:
            self.model_preact_hl1 = nn.Sequential(nn.Identity(), self.conv1, self.layer1[0].bn1)

    def forward(self, x):
        return super().forward(x if self.mu is None else (x - self.mu) / self.sigma)


class Normalised(nn.Module):
    """robustness' wrapper, whose attacker holds everything a second time."""

    def __init__(self, model):
        super().__init__()
        self.normalizer, self.model, self.attacker = nn.Module(), model, nn.Module()
        for name, value in dict(new_mean=[0.5, 0.4, 0.3], new_std=[0.2, 0.25, 0.3]).items():
            self.normalizer.register_buffer(name, torch.tensor(value).view(3, 1, 1))
        self.attacker.model, self.attacker.normalize = model, self.normalizer

    def forward(self, x):
        return self.model((x - self.normalizer.new_mean) / self.normalizer.new_std)


def network(kind=PreActResNet, *options, size=32, **more):
    torch.manual_seed(0)
    model = kind(*options, **more)
    for _ in range(2):  # the BatchNorm statistics
        model(torch.rand(8, 3, size, size))
    return model.eval()


def prefixed(prefix, model):
    return {prefix + name: value for name, value in model.state_dict().items()}


def written(kind):
    """A network and its checkpoint, as its authors write it."""
    model = network(PreActResNet, "activated" if kind in ("Rice", "kuangliu", "RobustBench V2") else
                    "raw", final_bn=kind not in ("kuangliu", "GradAlign", "Wong2020Fast"),
                    buffers=kind in ("Wong2020Fast", "RobustBench V2"), copies=kind == "GradAlign")
    state = model.state_dict()
    if kind == "torchvision":
        model = network(torchvision.models.resnet18, size=64, num_classes=10)
    if kind == "TRADES":  # a WideResNet by other names, which holds its first block a second time
        model, state = network(Official, "activated", (2, 2, 2), 32, F.relu), {}
        for name, value in model.state_dict().items():
            name = re.sub(r"^layer(\d)", r"block\1.layer", name.replace("linear", "fc"))
            name = name.replace("shortcut.0", "convShortcut").replace("bn.", "bn1.")
            state |= {f"module.{name}": value}
            state |= {f"module.sub_{name}": value + 1} if name.startswith("block1") else {}
    if kind in ("normalize", "robustness", "Sequential"):
        model = Normalised(model)
    if kind in ("Sequential", "normalize"):  # other names of the same
        renamed = {"normalizer.new_": "0.", "model.": "1."} if kind == "Sequential" else {
            "normalizer.new_": "normalize.", "model.": ""}
        del model.attacker
        state = model.state_dict()
        for ours, theirs in renamed.items():
            state = {name.replace(ours, theirs): value for name, value in state.items()}
    if kind == "half":
        state = {name: value.half() if value.is_floating_point() else value
                 for name, value in state.items()}
        model.load_state_dict(state)
    if kind == "Rice":
        optimizer = torch.optim.Adam(model.parameters())
        model(torch.rand(2, 3, 32, 32)).sum().backward()
        state = dict(state_dict=state, args=argparse.Namespace(lr=1), opt=optimizer.state_dict())
    if kind == "GradAlign":
        state = {"last": {name: value + 1 for name, value in state.items()}, "best": state}
    return model, {
        "torchvision": model.state_dict(),
        "kuangliu": {"net": prefixed("module.", model), "acc": 81.0, "epoch": 3},
        "robustness": {"model": prefixed("module.", model), "epoch": 1},
        "AveragedModel": {"ema": torch.optim.swa_utils.AveragedModel(model).state_dict()},
        "half": {"model_state_dict": state},
        "old": {name: value for name, value in state.items() if "num_batches" not in name},
    }.get(kind, state)


KINDS = {"preactresnet18": ["plain", "Sequential", "robustness", "normalize", "AveragedModel",
                            "half", "old", "GradAlign", "Wong2020Fast"],
         "preactresnet18-v2": ["Rice", "kuangliu", "RobustBench V2"], "resnet18": ["torchvision"],
         "wrn-16-8": ["TRADES"]}
FOREIGN = ["--arch", "preactresnet18", "--width", 16, "--dataset", "shapes"]


@pytest.mark.parametrize("arch, kind", [(arch, kind) for arch in KINDS for kind in KINDS[arch]])
def test_a_foreign_checkpoint_is_the_same_function(tmp_path, monkeypatch, arch, kind):
    data, seen = evaluate.test_images("shapes", "data", None, "cpu"), []
    monkeypatch.setattr(evaluate, "test_images", lambda *args: seen.append(args) or data)
    model, content = written(kind)
    path, size = str(tmp_path / "theirs.pt"), 64 if kind == "torchvision" else 32
    torch.save(content, path)
    width = {"torchvision": [], "TRADES": ["--width", "32"]}.get(kind, ["--width", "16"])
    found = evaluate.Checkpoint(path, evaluate.parse_args(
        [path, "--arch", arch, "--dataset", str(tmp_path), *width]))
    assert seen == [(str(tmp_path), "data", 224 if kind == "torchvision" else None, "cpu")]
    x = torch.rand(4, 3, size, size)
    with torch.no_grad(), common.exact(found.model) as same:
        assert torch.allclose(model.eval()(x), same(x), atol=1e-5, rtol=1e-5)
    held = kind in ("Sequential", "robustness", "normalize", "Wong2020Fast", "RobustBench V2")
    assert found.about["normalisation"] == ("of the checkpoint" if held else "none")


def test_the_table_says_which_normalisation_was_used(run, tmp_path, ours):
    torch.save(network().state_dict(), tmp_path / "theirs.pt")
    out, result = run("theirs.pt", ours, *FOREIGN, *FAST, "--plots", "curves")
    assert "warning: the plot curves failed: theirs.pt holds no log" in out
    assert [row["normalisation"] for row in result["rows"]] == ["none", "of the run"]
    assert [row["arch"] for row in result["rows"]] == ["preactresnet18", "resnet10"]
    assert re.findall("warning: (.*): only .* normalisation .*the block .*order of the classes",
                      out) == ["theirs.pt"]
    given = ["--mean", 0.5, 0.4, 0.3, "--std", 0.2, 0.25, 0.3]
    torch.save(written("Sequential")[1], tmp_path / "held.pt")
    rows = run("theirs.pt", "held.pt", *FOREIGN, *FAST, *given)[1]["rows"]
    assert [row["normalisation"] for row in rows] == 2 * ["as given"]
    held, = run("held.pt", *FOREIGN, *FAST)[1]["rows"]
    assert held["PGD-2-2 %"] == rows[0]["PGD-2-2 %"] == rows[1]["PGD-2-2 %"] > 0


def test_what_does_not_fit_is_named(run, tmp_path):
    state, ones = network().state_dict(), torch.ones(3)
    within, size = {f"model.{name}": value for name, value in state.items()}, torch.ones(7, 128)
    for content, message in (
            ({"ema": state, "model": state}, "several networks, ema/, model/: save one"),
            (state | {"head.weight": ones}, "head.weight is (3,) instead of missing"),
            ({"net": within | {"head.weight": ones}}, "net/head.weight is not a part of it"),
            ({"net": within | {"scale": ones[:1]}}, "net/scale is not a part of it"),
            (state | {"bn1.bias": ones}, "bn1.bias is not a part of it"),
            (state | {"a.num_batches_tracked": ones}, "tracked is (3,) instead of missing"),
            (state | {"linear.weight": size, "linear.bias": size[:, 0]}, "knows 7 classes, the "),
            ({name: state[name] for name in state if name != "linear.bias"},
             "linear.bias is missing instead of (10,)"),
            (state | {"mean": ones / 2}, "no clear normalisation"),
            (state | {"mean": 125 * ones, "std": 63 * ones}, "no clear normalisation"),
            (state | {"mean": ones / 2, "b.mean": ones, "std": ones}, "no clear normalisation")):
        torch.save(content, tmp_path / "theirs.pt")
        assert message in run("theirs.pt", *FOREIGN, fails=True)
    torch.save(state, tmp_path / "theirs.pt")
    assert "add --arch and --dataset" in run("theirs.pt", fails=True)
    assert "bn.weight is (128,) instead of (64,)" in run(
        "theirs.pt", "--arch", "wrn-16-8", "--width", 16, "--dataset", "shapes", fails=True)
    two = {name: state | {"mu": ones * mu, "sigma": ones * 0.3}
           for name, mu in (("best", 0.25), ("best_swa", 0.5), ("last", 0.75))}
    torch.save({"model": two}, tmp_path / "theirs.pt")
    some = evaluate.Checkpoint("theirs.pt", evaluate.parse_args(["theirs.pt", *map(str, FOREIGN)]))
    assert some.model.mean.flatten().tolist() == [0.25] * 3


class Code:
    __reduce__ = lambda self: (print, ("EXECUTED",))  # noqa: E731


@pytest.mark.filterwarnings("ignore:Detected pickle")
def test_bad_files_get_one_line_and_execute_nothing(run, tmp_path, ours, capsys):
    (tmp_path / "cut.pt").write_bytes((tmp_path / "run/best.pt").read_bytes()[:5000])
    (tmp_path / "page.pt").write_text("<!DOCTYPE html><html>404</html>")
    (tmp_path / "old_code.pt").write_bytes(pickle.dumps(Code()))
    for name, content in dict(code=Code(), whole=network(), list=[1, 2], tensor=torch.zeros(3),
                              nothing={"epoch": 3}).items():
        torch.save(content, tmp_path / f"{name}.pt")
    for name in ("cut", "page", "old_code", "code", "whole", "list", "tensor", "nothing", "none"):
        assert f"{name}.pt" in run(f"{name}.pt", *FOREIGN, fails=True)
    assert "EXECUTED" not in capsys.readouterr().out
