"""evaluate.py through its command line, its attacks, its verdict on masking, and its pictures."""

import json
import math
import pickle
import re

import matplotlib.image
import pytest
import torch

import backward_smoothing
import common
import data
import evaluate
import kd_swa
import models
from bookkeeping import load_model
from conftest import TINY, data_options
from test_runs import one_line, weights

FAST = ["--steps", "2", "--restarts", "2", "--attack", "pgd"]
EPS = 8 / 255


@pytest.fixture
def checkpoint(script, tmp_path):
    options = ["--epochs", 1, "--lr-schedule", "piecewise", "--batch-size", 64, "--out", "run"]
    script(backward_smoothing, *TINY, *options)
    return tmp_path / "run/best.pt"


def result(tmp_path, folder="runs/evaluation-1"):
    return json.loads((tmp_path / folder / "result.json").read_text())


def test_evaluate_needs_nothing_but_the_checkpoint(script, checkpoint, tmp_path):
    status, out, err = script(evaluate, "run/best.pt", "run/last.pt", *FAST)
    assert status == 0, err
    head, *rows, last = out.splitlines()
    assert len(rows) == 2 and len({len(line) for line in (head, *rows)}) == 1  # aligned
    assert "PGD-2-2 %" in head and "clean %" in head
    row = result(tmp_path)["rows"][0]
    assert row["n"] == 50 and row["eps"] == 8
    assert row["norm"] == "linf" and row["arch"] == "resnet10"
    assert 0 <= row["PGD-2-2 %"] <= row["clean %"] <= 100
    assert script(evaluate, "run/best.pt", *FAST)[0] == 0  # the next free folder
    assert (tmp_path / "runs/evaluation-2/result.json").exists()


def test_the_default_attacks(script, checkpoint, tmp_path):
    """Clean, PGD and AutoAttack-lite; and the last is an attack on what is right alone."""
    options = ["--steps", 2, "--restarts", 1, "--apgd-steps", 2, "--eps", 1, "--n-examples", 20]
    assert script(evaluate, "run/best.pt", *options)[0] == 0
    row = result(tmp_path)["rows"][0]
    assert list(row) == ["checkpoint", "dataset", "arch", "normalisation", "n", "eps", "norm",
                         "clean %", "PGD-2-1 %", "AA-lite %", "worst case %", "zero gradients %",
                         "seconds"]
    assert row["worst case %"] <= min(row["PGD-2-1 %"], row["AA-lite %"]) <= row["clean %"]
    args = evaluate.parse_args(["x.pt"])
    assert (args.steps, args.restarts, args.apgd_steps) == (50, 10, 100)


def test_every_attack_has_its_column(script, checkpoint, tmp_path):
    options = ["--steps", 1, "--restarts", 1, "--apgd-steps", 2, "--queries", 5, "--n-examples", 9]
    status, out, err = script(evaluate, "run/best.pt", "--attack", *evaluate.ATTACKS, *options,
                              "--surrogate", "run/last.pt", "run/best.pt", "--markdown")
    assert status == 0, err
    row = result(tmp_path)["rows"][0]
    for name in ("PGD-1-1 %", "margin-PGD-1-1 %", "AA-lite %", "Square-5 %", "CW-L2 %",
                 "CW-L2 mean distance", "RayS-5 %", "ADBD", "transfer 1 %", "transfer 2 %"):
        assert math.isfinite(row[name])
    lines = [line for line in out.splitlines() if line.startswith("|")]
    assert len(lines) == 3 and len({line.count("|") for line in lines}) == 1
    assert "| AA-lite % |" in lines[0] and set(lines[1]) == set("|- ")
    script(evaluate, "run/best.pt", "--attack", "none", "--out", "none")
    assert not any("PGD" in key for key in result(tmp_path, "none")["rows"][0])


def test_the_schema_of_the_result(script, checkpoint, tmp_path):
    script(evaluate, "run/best.pt", *FAST, "--checklist", "--apgd-steps", 2, "--queries", 5,
           "--n-examples", 6, "--plots", "alignment", "--out", "all")
    found = result(tmp_path, "all")
    assert set(found) == {"command", "args", "rows", "checklist", "plots"}
    assert found["command"].startswith("evaluate.py run/best.pt --steps 2")
    assert found["args"]["queries"] == 5 and len(found["rows"]) == 1
    verdict, claim, figures = found["checklist"][0][0]
    assert verdict in ("pass", "WARN") and "gradient-free" in claim and "%" in figures
    assert -1 <= found["plots"]["alignment"][0]["gradient alignment"] <= 1


def test_evaluate_is_deterministic_and_its_options_count(script, checkpoint, tmp_path):
    def row(*options):
        assert script(evaluate, "run/best.pt", *FAST, *options)[0] == 0
        folder = max((tmp_path / "runs").iterdir(), key=lambda p: int(p.name.split("-")[1]))
        row = json.loads((folder / "result.json").read_text())["rows"][0]
        return {key: value for key, value in row.items() if key != "seconds"}
    assert row() == row()
    every = ["--attack", *evaluate.ATTACKS, "--queries", 9, "--apgd-steps", 3, "--n-examples", 9]
    assert row(*every) == row(*every)
    assert row("--n-examples", 7)["n"] == 7
    other = row("--eps", "255", "--norm", "l2")
    assert other["eps"] == 255 and other["norm"] == "l2"
    harmless = row("--eps", "0.0001")  # pixels
    assert harmless["PGD-2-2 %"] == harmless["clean %"]
    assert row("--batch-size", 9)["clean %"] == row()["clean %"]


@pytest.mark.parametrize("norm, eps", [("linf", 8 / 255), ("l2", 200 / 255)])
def test_dropping_what_is_fooled_changes_nothing(checkpoint, norm, eps):
    """The same pictures stay right as when every restart attacks all of them."""
    model, _ = load_model(checkpoint, "cpu")
    x = data.load_data(data_options()).test[0].float() / 255
    model.eval()
    with torch.no_grad():
        y = model(x).argmax(1)
    x_adv = common.pgd_attack(model, x, y, eps, eps / 4, 1, 6, norm,
                              generator=torch.Generator().manual_seed(0))
    noise, right = torch.Generator().manual_seed(0), []
    for _ in range(6):
        all_adv = common.pgd_attack(model, x, y, eps, eps / 4, 1, 1, norm, generator=noise)
        right.append(model(all_adv).argmax(1) == y)
    assert torch.equal(model(x_adv).argmax(1) == y, torch.stack(right).all(0))
    assert 0 < torch.stack(right).all(0).sum() < right[0].sum()  # restarts fool more


# ----------------------------------------------------------------------------- the attacks' sense

class Plane(models.Classifier):
    """Logits W x, without normalisation: all distances are known."""

    def __init__(self, weight):
        super().__init__((0.0,) * 3, (1.0,) * 3)
        self.weight = torch.nn.Parameter(weight)

    def logits(self, x):
        return x.flatten(1) @ self.weight.T


def plane(n=30, classes=10, size=8):
    torch.manual_seed(4)
    weight = torch.randn(classes, 3 * size * size)
    model = Plane(weight - weight.mean(1, keepdim=True))
    x = (torch.rand(n, 3, size, size) * 127 + 64).byte()
    with torch.no_grad():
        return model, x, model(x.float() / 255).argmax(1)


@pytest.mark.parametrize("norm, eps", [("linf", 0.03), ("l2", 0.5)])
def test_square_fools_within_eps_and_without_a_gradient(monkeypatch, norm, eps):
    model, x, y = plane()
    x = x.float() / 255
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **kwargs: pytest.fail("gradient"))
    monkeypatch.setattr(torch.Tensor, "backward", lambda *args: pytest.fail("gradient"))
    seen = []
    model.register_forward_hook(lambda *args: seen.append(torch.is_grad_enabled()))
    left = []
    for queries in (1, 20, 300):
        x_adv = evaluate.square(model, x, y, eps, queries, norm, torch.Generator().manual_seed(0))
        distance = (x_adv - x).flatten(1).norm(math.inf if norm == "linf" else 2, dim=1)
        assert distance.max() <= eps + 1e-6 and x_adv.min() >= 0 and x_adv.max() <= 1
        left.append((model(x_adv).argmax(1) == y).sum())
        assert len(seen) <= queries + 1 and not any(seen[:-1])
        seen.clear()
    assert left[0] > left[2] and left[2] < 15


def test_the_square_of_the_l2_attack():
    for size in (3, 6, 7):
        shape = evaluate.eta(size)
        assert shape.shape == (size, size) and shape.norm().item() == pytest.approx(1)
        assert (shape[:size // 2] > 0).all() and (shape[size // 2:] < 0).all()


def test_rays_finds_the_boundary_without_a_gradient(monkeypatch):
    """For two classes the distance in Linf is margin / |w|_1; RayS comes close, from above."""
    model, x, y = plane(20, classes=2, size=2)
    x = x.float() / 255
    w = (model.weight[1] - model.weight[0]).detach()
    exact = (x.flatten(1) @ w).abs() / w.abs().sum()
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **kwargs: pytest.fail("gradient"))
    near = exact < 0.3  # beyond, the bounds of [0, 1] get in the way
    few, many = (((evaluate.rays(model, x, y, n) - x).flatten(1).norm(math.inf, dim=1))[near]
                 for n in (30, 400))
    assert near.sum() > 5 and (many >= exact[near] - 1e-6).all()
    assert (many <= few + 1e-6).all() and many.mean() < few.mean()
    assert torch.allclose(many, exact[near], atol=4e-3)


def test_cw_finds_the_closest_point_behind_the_boundary():
    model, x, y = plane(20, classes=2, size=4)
    x = x.float() / 255
    w = (model.weight[1] - model.weight[0]).detach()
    exact = (x.flatten(1) @ w).abs() / w.norm()
    near = exact < 0.3  # with a constant of 0.1 the attack lets go of what is farther away
    x_adv = evaluate.cw_l2(model, x[near], y[near])
    assert near.sum() > 3 and (model(x_adv).argmax(1) != y[near]).all()
    distance = (x_adv - x[near]).flatten(1).norm(dim=1)
    assert (distance >= exact[near] - 1e-5).all() and (distance < 1.3 * exact[near] + 0.02).all()


# -------------------------------------------------------------------------- the verdict on masking

class Quantised(Plane):
    """Sees pictures in nine steps: the gradient is 0 everywhere, the network as weak as before."""

    def logits(self, x):
        return super().logits((x * 8).round() / 8)


class Saturated(Plane):
    """So sure that the softmax leaves no gradient."""

    def logits(self, x):
        return 1e5 * super().logits(x)


def subject(model, x, y):
    args = evaluate.parse_args("x.pt --attack pgd lite square --queries 300 --steps 10 --restarts 2"
                               " --apgd-steps 10".split())
    found = evaluate.Subject("x.pt", model, dict(dataset="plane", arch="plane", normalisation=""),
                             list("0123456789"), x, y, EPS, "linf")
    row, kept = evaluate.evaluate(found, args, [])
    return row, {claim: verdict for verdict, claim, _ in evaluate.checklist(found, args, row, kept)}


def test_the_checklist_passes_an_honest_network():
    row, verdicts = subject(*plane())
    assert list(verdicts.values()) == ["pass", "----", "pass", "pass", "pass"]
    assert row["zero gradients %"] == 0


@pytest.mark.parametrize("masked, warns", [(Quantised, ["gradient-free", "gradient is not 0"]),
                                           (Saturated, ["gradient is not 0"])])
def test_the_checklist_catches_masked_gradients(masked, warns):
    model, x, _ = plane()
    model = masked(model.weight.detach())
    with torch.no_grad():
        y = model(x.float() / 255).argmax(1)
    row, verdicts = subject(model, x, y)
    for words in warns:
        assert [verdict for claim, verdict in verdicts.items() if words in claim] == ["WARN"]
    assert row["zero gradients %"] > 90


def test_transferred_attacks_are_made_on_the_surrogate(script, checkpoint, tmp_path):
    """On itself a transferred attack is one restart of PGD; and the checklist reports it."""
    options = [*FAST, "--n-examples", 20, "--apgd-steps", 2, "--queries", 5, "--restarts", 1]
    status, out, _ = script(evaluate, "run/best.pt", *options, "--surrogate", "run/best.pt",
                            "--checklist")
    row = result(tmp_path)["rows"][0]
    assert row["transfer 1 %"] == pytest.approx(row["PGD-2-1 %"], abs=15)
    assert re.search(r"(pass|WARN)  transferred attacks", out)
    assert re.search(r"(pass|WARN)  accuracy falls to 0 as eps grows: .* % at 8, .* % at 128", out)


def test_a_surrogate_with_other_classes(script, checkpoint, folder, tmp_path):
    script(backward_smoothing, "--dataset", "pets", "--arch", "resnet10", "--width", 8, "--epochs",
           1, "--batch-size", 4, "--val-size", 4, "--out", "pets-run")
    one_line(*script(evaluate, "run/best.pt", *FAST, "--surrogate", "pets-run/best.pt")[::2],
             "pets-run/best.pt cannot be a surrogate: it knows other classes")


def test_a_result_is_never_overwritten(script, checkpoint, tmp_path):
    assert script(evaluate, "run/best.pt", "--attack", "none", "--out", "there")[0] == 0
    before = (tmp_path / "there/result.json").read_bytes()
    one_line(*script(evaluate, "run/best.pt", "--attack", "none", "--out", "there")[::2],
             "there holds a result, never overwritten: take another --out")
    assert (tmp_path / "there/result.json").read_bytes() == before


def test_zero_gradients_are_noticed(script, checkpoint, tmp_path):
    """Logits a million times larger saturate the softmax, so that no gradient is left to follow."""
    state = torch.load(checkpoint, weights_only=True)
    for name in ("linear.weight", "linear.bias"):
        state["model"][name] *= 1e6
    torch.save(state, tmp_path / "masked.pt")
    out = script(evaluate, "run/best.pt", "masked.pt", *FAST)[1]
    assert re.search(r"warning: masked.pt: \d.*exactly 0", out)
    assert "warning: run/best.pt" not in out


def test_fewer_classes_than_dlr_needs_are_said(script, folder, tmp_path):
    script(backward_smoothing, "--dataset", "pets", "--arch", "resnet10", "--width", 8, "--epochs",
           1, "--batch-size", 4, "--val-size", 4, "--out", "run")
    out = script(evaluate, "run/best.pt", "--attack", "lite", "--apgd-steps", 2)[1]
    assert "DLR needs 4 classes" in out and "took cross-entropy" in out


# ---------------------------------------------------------------------------------------- pictures

def test_every_picture_is_drawn(script, drawn, tmp_path):
    options = [*TINY, "--epochs", 2, "--keep-epochs"]
    script(backward_smoothing, *options, "--out", "bs")
    script(kd_swa, *options, "--kd", "none", "--steps", 1, "--out", "kd")
    assert (tmp_path / "kd/swa_epoch-2.pt").exists() and (tmp_path / "bs/epoch-1.pt").exists()
    paths = ["bs/epoch-1.pt", "kd/swa_last.pt"]
    status, out, err = script(evaluate, *paths, "--attack", "none", "--n-plot", 2, "--plots",
                              "--out", "pictures")
    assert status == 0, err
    numbers = result(tmp_path, "pictures")["plots"]
    assert list(numbers) == list(evaluate.PLOTS)
    for name, values in numbers.items():
        picture = matplotlib.image.imread(tmp_path / f"pictures/{name}.png")
        assert min(picture.shape[:2]) > 300 and picture[..., :3].std() > 0.02, name  # not blank
        assert len(values) == 2 and out.count(f"\n{name}, ") == 2
        assert all(math.isfinite(number) for value in values for number in value.values())
    assert numbers["curves"][0]["last"] == numbers["curves"][0]["best held-out PGD-10 %"]


def test_the_weights_are_put_back(checkpoint):
    model, settings = load_model(checkpoint, "cpu")
    before = [weight.detach().clone() for weight in model.parameters()]
    x, y = data.load_data(data_options()).test
    found = evaluate.Subject("x.pt", model, settings, [], x[:2], y[:2], EPS, "linf")
    evaluate.plot_weights([found], evaluate.parse_args(["x.pt"]))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_the_largest_eigenvalue_is_that_of_the_hessian():
    """Cross-entropy on a plane: H = W^T (diag(p) - p p^T) W, whose eigenvalues are known."""
    model, x, y = plane(4, size=2)
    model, x = model.double(), x.double() / 255
    found = evaluate.largest_eigenvalue(model, x, y, 200)
    for i, p in enumerate(model(x).softmax(1)):
        w = model.weight
        hessian = w.T @ (p.diag() - p[:, None] * p) @ w
        assert found[i].item() == pytest.approx(torch.linalg.eigvalsh(hessian)[-1].item(), rel=1e-3)


def test_curves_need_a_log(script, checkpoint, tmp_path):
    torch.save(weights(checkpoint), tmp_path / "bare.pth")
    options = ["--arch", "resnet10", "--width", 8, "--dataset", "shapes", "--attack", "none"]
    one_line(*script(evaluate, "bare.pth", *options, "--plots", "curves")[::2],
             "bare.pth comes without the log")


# ---------------------------------------------------------------------- checkpoints from elsewhere

def from_elsewhere(state, form):
    """A state dict of ours as others write it."""
    statistics = {"mean": torch.full((3,), 0.3), "std": torch.full((3,), 0.2)}
    prefixed = {f"1.{name}": value for name, value in state.items()}
    return {
        "plain": state,
        "module.": {f"module.{name}": value for name, value in state.items()},
        "_orig_mod.": {f"_orig_mod.module.{name}": value for name, value in state.items()},
        "state_dict": {"state_dict": state, "epoch": 9},
        "net": {"net": {f"module.{name}": value for name, value in state.items()}, "acc": 80.0},
        "Sequential": {"0.mean": statistics["mean"].view(1, 3, 1, 1),
                       "0.std": statistics["std"].view(1, 3, 1, 1)} | prefixed,
        "mu and sigma": {"mu": statistics["mean"], "sigma": statistics["std"]} | state,
        "normalize": {"state_dict": {f"normalize.{k}": v for k, v in statistics.items()} | state},
        "robustness": {"model": {"module.normalizer.new_mean": statistics["mean"],
                                 "module.normalizer.new_std": statistics["std"]} | {
            f"module.model.{k}": v for k, v in state.items()} | {
            f"module.attacker.model.{k}": v for k, v in state.items()}},
        "torchvision": {name.replace("linear", "fc").replace("shortcut", "downsample"): value
                        for name, value in state.items()},
    }[form]


FORMS = ["plain", "module.", "_orig_mod.", "state_dict", "net", "Sequential", "mu and sigma",
         "normalize", "robustness", "torchvision"]


def pictures_of(model):
    """A data set, of which the model knows every picture."""
    torch.manual_seed(6)
    x = (torch.rand(60, 3, 32, 32) * torch.rand(60, 3, 1, 1) * 255).byte()
    with common.exact(model) as network, torch.no_grad():
        part = x, network(x.float() / 255).argmax(1)
    return data.Data(part, part, part, list("0123456789"), True)


@pytest.mark.parametrize("form", FORMS)
def test_a_state_dict_from_elsewhere(tmp_path, form):
    """The same weights, and the normalisation that it holds, or else that which fits."""
    torch.manual_seed(0)
    given = form in FORMS[5:9]
    mean, std = ((0.3,) * 3, (0.2,) * 3) if given else ((0.0,) * 3, (1.0,) * 3)
    model = models.build_model("resnet10", 10, 8, mean=mean, std=std).eval()
    torch.save(from_elsewhere(model.state_dict(), form), tmp_path / "bare.pth")
    known = pictures_of(model)
    found, settings = load_model(tmp_path / "bare.pth", "cpu", "resnet10", 8, data=known)
    assert settings["normalisation"] == ("of the checkpoint" if given else "none")
    assert torch.allclose(found.mean, model.mean) and torch.allclose(found.std, model.std)
    assert all(torch.equal(value, found.state_dict()[name])
               for name, value in model.state_dict().items())
    found, settings = load_model(tmp_path / "bare.pth", "cpu", "resnet10", 8, data=known,
                                        mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    assert settings["normalisation"] == "as given"
    assert found.std.flatten().tolist() == pytest.approx([0.4, 0.5, 0.6])


def test_the_datas_statistics_are_assumed_where_they_fit(tmp_path):
    torch.manual_seed(0)
    model = models.build_model("resnet10", 10, 8)
    x = (torch.rand(60, 3, 32, 32) * torch.rand(60, 3, 1, 1) * 255).byte()
    part = x, torch.zeros(60, dtype=torch.long)
    mean, std = common.statistics(data.Data(part, part, part, [], True))
    model = models.build_model("resnet10", 10, 8, mean=mean, std=std).eval()
    with torch.no_grad():  # otherwise it takes nearly all of them for one class
        model.linear.bias -= model(x.float() / 255).mean(0)
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    _, settings = load_model(tmp_path / "bare.pth", "cpu", "resnet10", 8,
                                    data=pictures_of(model))
    assert settings["normalisation"] == "of the data"


def test_wide_resnets_of_trades_and_robustbench(tmp_path):
    """Their names: block1.layer.0, convShortcut, bn1 in the end, fc, and sub_block1, a copy."""
    torch.manual_seed(0)
    model = models.build_model("wrn-16-8", 10, 8)
    theirs = {}
    for name, value in model.state_dict().items():
        name = re.sub(r"^layer(\d)", r"block\1.layer", name).replace("shortcut.0", "convShortcut")
        name = re.sub(r"^bn\.", "bn1.", name).replace("linear", "fc")
        theirs["module." + name] = value
        if "block1" in name:
            theirs["module." + name.replace("block1", "sub_block1")] = value
    torch.save(theirs, tmp_path / "trades.pth")
    found, _ = load_model(tmp_path / "trades.pth", "cpu", "wrn-16-8", 8,
                                 data=pictures_of(model))
    assert all(torch.equal(value, found.state_dict()[name])
               for name, value in model.state_dict().items())


def test_the_table_says_which_normalisation_was_assumed(script, checkpoint, tmp_path):
    torch.save(weights(checkpoint), tmp_path / "bare.pth")
    options = ["--arch", "resnet10", "--width", 8, "--dataset", "shapes", *FAST]
    status, out, err = script(evaluate, "bare.pth", "run/best.pt", *options)
    assert status == 0, err
    assert re.search(r"^bare.pth +shapes +resnet10 +(none|of the data) ", out, re.M)
    assert re.search(r"^run/best.pt +shapes +resnet10 +of the run ", out, re.M)
    one_line(*script(evaluate, "bare.pth", *options, "--mean", 0, 0, 0)[::2], "--mean and --std")


class Code:
    def __reduce__(self):
        return print, ("EXECUTED",)


def test_bad_checkpoints(script, checkpoint, tmp_path):
    whole = checkpoint.read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "page.pt").write_text("<!DOCTYPE html><html>404</html>")
    torch.save(Code(), tmp_path / "code.pt")
    (tmp_path / "old_code.pt").write_bytes(pickle.dumps(Code()))
    torch.save(weights(checkpoint), tmp_path / "bare.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"epoch": 3}, tmp_path / "nothing.pt")
    messages = {"cut.pt": "cut short", "empty.pt": "cut short", "page.pt": "web page",
                "code.pt": "execute", "old_code.pt": "execute", "missing.pt": "does not exist",
                "bare.pt": "--arch and --dataset", "list.pt": "--arch and --dataset"}
    for name, message in messages.items():
        status, out, err = script(evaluate, name)
        one_line(status, err, message)
        assert "EXECUTED" not in out + err
    elsewhere = ["--arch", "resnet18", "--dataset", "shapes"]
    for name in ("run/best.pt", "bare.pt", "list.pt", "nothing.pt"):
        one_line(*script(evaluate, name, *elsewhere)[::2], "another architecture")
    assert not (tmp_path / "runs").exists()


def test_evaluate_on_a_data_set_with_other_classes(script, checkpoint, folder):
    status, _, err = script(evaluate, "run/best.pt", "--dataset", "pets")
    one_line(status, err, "10 classes.* 2: .*--dataset")


def test_evaluate_notices_that_the_folder_has_other_classes_than_in_training(script, folder):
    script(backward_smoothing, "--dataset", "pets", "--arch", "resnet10", "--width", 8, "--epochs",
           1, "--batch-size", 4, "--val-size", 4, "--out", "run")
    for part in ("train", "test"):
        (folder / part / "fox").mkdir()
        (folder / part / "cat/0.png").rename(folder / part / "fox/0.png")
    one_line(*script(evaluate, "run/best.pt", *FAST)[::2], "2 classes.* 3: .*--dataset")
