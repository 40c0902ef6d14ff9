"""Each method's step, recomputed here from its equations on a small smooth network in float64."""

import argparse
import copy
import math

import pytest
import torch
import torch.nn.functional as F

import backward_smoothing
import common
import data
import fast_at
import fast_bat
import kd_swa
import models
import trades

EPS = 8 / 255


@pytest.fixture
def smooth():
    """A network of Softplus in float64, in eval mode: finite differences converge."""
    torch.manual_seed(0)
    model = models.build_model("resnet10", 10, width=8, activation="softplus").double()
    model(torch.rand(16, 3, 32, 32, dtype=torch.float64))
    model.dtype = torch.float64
    return model.eval()


@pytest.fixture
def pictures():
    torch.manual_seed(1)
    return torch.rand(4, 3, 32, 32, dtype=torch.float64), torch.tensor([3, 1, 4, 1])


def settings(module, *options):
    return module.parse_args(["--dataset", "shapes", "--attack-bn", "eval", *map(str, options)])


def gradient_of(loss, model, direction):
    """The derivative along `direction`, from autograd."""
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return sum((g * d).sum() for g, d in zip(gradients, direction)).item()


def difference_quotient(function, model, direction, h=1e-8):
    """The same by central differences; `function` is evaluated at moved parameters."""
    values = []
    with torch.no_grad():
        for sign in (1, -2):
            for p, d in zip(model.parameters(), direction):
                p += sign * h * d
            with torch.enable_grad():
                values.append(function().item())
        for p, d in zip(model.parameters(), direction):
            p += h * d
    return (values[0] - values[1]) / (2 * h)


def some_direction(model):
    return [torch.randn_like(p) for p in model.parameters()]


def sign_step(x_adv, gradient, x, eps, alpha):
    return torch.min(torch.max(x_adv + alpha * gradient.sign(), x - eps), x + eps).clamp(0, 1)


# ---------------------------------------------------------------------------------------- fast_at

@pytest.mark.parametrize("steps, init", [(1, "uniform"), (1, "zero"), (2, "uniform"), (3, "zero")])
def test_fast_at_is_projected_ascent_on_cross_entropy(smooth, pictures, steps, init):
    x, y = pictures
    torch.manual_seed(5)
    x_adv = fast_at.fast_at(smooth, x, y, EPS, 0.6 * EPS, steps, init, bn="eval")
    torch.manual_seed(5)
    expected = (x + EPS * torch.empty_like(x).uniform_(-1, 1)).clamp(0, 1)
    expected = x.clone() if init == "zero" else expected
    for _ in range(steps):
        expected.requires_grad_()
        probability = torch.softmax(smooth(expected), 1)[range(len(y)), y]
        gradient, = torch.autograd.grad(-probability.log().sum(), expected)
        expected = sign_step(expected.detach(), gradient, x, EPS, 0.6 * EPS)
    assert torch.allclose(x_adv, expected, atol=1e-12)
    assert (x_adv - x).abs().max() > EPS / 2


def test_fast_at_without_steps_is_standard_training(smooth, pictures):
    x, y = pictures
    assert fast_at.fast_at(smooth, x, y, EPS, EPS, 0) is x
    loss = fast_at.training_loss(smooth, x, y, settings(fast_at, "--steps", 0))
    assert torch.equal(loss, F.cross_entropy(smooth(x), y))


def test_the_steps_of_fast_at_have_their_papers_length():
    lengths = {0: 0.25, 1: 1.25, 2: 0.5, 10: 0.25}
    for steps, length in lengths.items():
        args = settings(fast_at, "--eps", 8, "--steps", steps)
        assert args.alpha == pytest.approx(length * EPS)
    assert settings(fast_at, "--alpha", 10).alpha == 10 / 255


def test_gradalign_and_its_gradient(smooth, pictures):
    """1 - cos of the input gradients at x and x + eta; only the second is differentiated."""
    x, y = pictures

    def input_gradient(point):
        point = point.clone().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(smooth(point), y), point)[0].flatten(1)

    def misalignment(target=None):
        torch.manual_seed(2)
        noisy = (x + EPS * torch.empty_like(x).uniform_(-1, 1)).clamp(0, 1)
        a, b = input_gradient(x) if target is None else target, input_gradient(noisy)
        return (1 - (a * b).sum(1) / a.norm(dim=1) / b.norm(dim=1)).mean()

    torch.manual_seed(2)
    value = fast_at.misalignment(smooth, x, y, EPS, bn="eval")
    assert value.item() == pytest.approx(misalignment().item(), rel=1e-9) and value > 1e-6
    direction, target = some_direction(smooth), input_gradient(x)
    derivative = gradient_of(value, smooth, direction)
    expected = difference_quotient(lambda: misalignment(target), smooth, direction)
    assert derivative == pytest.approx(expected, rel=1e-4)
    both = difference_quotient(misalignment, smooth, direction)
    assert abs(both - expected) > 1e-2 * abs(expected)  # the first gradient would have changed it


def test_gradalign_is_added_with_its_weight(smooth, pictures):
    losses = []
    for weight in (0, 0.5, 1):
        torch.manual_seed(4)
        args = settings(fast_at, "--grad-align", weight)
        losses.append(fast_at.training_loss(smooth, *pictures, args).item())
    assert losses[2] - losses[1] == pytest.approx(losses[1] - losses[0], rel=1e-6)
    assert losses[1] > losses[0]


def test_fast_at_plus_notices_a_collapse(smooth, monkeypatch):
    x, y = torch.zeros(300, 3, 32, 32, dtype=torch.uint8), torch.zeros(300, dtype=torch.int64)
    pictures = data.Data(None, (x, y), None, list("abc"), False)
    seen = []

    def accuracy(model, x, y, attack):
        seen.append(len(x))
        return 90, now
    monkeypatch.setattr(common, "accuracy", accuracy)

    def collapsed(*epochs):
        run = argparse.Namespace(rows=[dict(val_pgd=e) for e in epochs], pgd=lambda steps: None)
        return fast_at.has_collapsed(smooth, pictures, run)
    now = 41.0
    assert not collapsed() and not collapsed(50, 30) and collapsed(30, 52, 20)
    assert seen == [128] * 3  # one batch, not all
    now = 5.0
    assert collapsed(12, 11) and not collapsed(9.0)  # where there is no fall of 10 points to see


def test_fast_at_plus_trains_by_pgd_10_until_it_is_back(script, monkeypatch):
    answers = iter([True] * 3 + [False] * 100)
    monkeypatch.setattr(fast_at, "has_collapsed", lambda *args: next(answers))
    steps, loss = [], fast_at.training_loss

    def record(model, x, y, args):
        steps.append((args.steps, args.alpha))
        return loss(model, x, y, args)
    monkeypatch.setattr(fast_at, "training_loss", record)
    options = ["--dataset", "shapes", "--width", 8, "--val-size", 20, "--batch-size", 16]
    assert script(fast_at, *options, "--epochs", 1, "--recover", "--out", "a")[0] == 0
    assert steps == [(10, EPS / 4)] * 3 + [(1, 1.25 * EPS)] * (len(steps) - 3) and len(steps) > 4


# ----------------------------------------------------------------------------------------- trades

@pytest.mark.parametrize("steps, init", [(1, "uniform"), (2, "uniform"), (3, "normal")])
def test_trades_is_projected_ascent_on_kl(smooth, pictures, steps, init):
    x, _ = pictures
    torch.manual_seed(5)
    x_adv = trades.trades(smooth, x, EPS, EPS / 2, steps, init)
    torch.manual_seed(5)
    if init == "normal":
        expected = x + 0.001 * torch.randn_like(x)
    else:
        torch.randn_like(x)
        expected = (x + EPS * torch.empty_like(x).uniform_(-1, 1)).clamp(0, 1)
    s = torch.softmax(smooth(x), 1).detach()
    for _ in range(steps):
        expected.requires_grad_()
        divergence = (s * (s / torch.softmax(smooth(expected), 1)).log()).sum()
        gradient, = torch.autograd.grad(divergence, expected)
        expected = sign_step(expected.detach(), gradient, x, EPS, EPS / 2)
    assert torch.allclose(x_adv, expected, atol=1e-12)


@pytest.mark.parametrize("module, attack", [(trades, "trades"),
                                            (backward_smoothing, "backward_smoothing")])
def test_trades_loss_and_its_gradient(smooth, pictures, monkeypatch, module, attack):
    """CE(f(x), y) + beta KL(s(f(x)) || s(f(x_adv))), both of its networks differentiated."""
    x, y = pictures
    x_adv = (x + EPS * torch.randn_like(x).sign()).clamp(0, 1)
    monkeypatch.setattr(module, attack, lambda *args, **kwargs: x_adv)
    value = module.training_loss(smooth, x, y, settings(module, "--beta", 4))

    def spelled_out():
        s, s_adv = torch.softmax(smooth(x), 1), torch.softmax(smooth(x_adv), 1)
        return (-s[range(len(y)), y].log() + 4 * (s * (s / s_adv).log()).sum(1)).mean()
    assert value.item() == pytest.approx(spelled_out().item(), rel=1e-9)
    direction = some_direction(smooth)
    derivative = gradient_of(value, smooth, direction)
    expected = difference_quotient(spelled_out, smooth, direction)
    assert derivative == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("module", [trades, backward_smoothing, kd_swa])
def test_extreme_logits_stay_finite(batch, module):
    """Probabilities of exactly 0: log-softmax on both sides of KL keeps NaN out."""
    torch.manual_seed(0)
    model = models.build_model("resnet10", 10, width=8)
    with torch.no_grad():
        model.linear.weight *= 1e5
    x, y = batch
    assert (torch.softmax(model.eval()(x), 1) == 0).any()
    args = settings(module, *(["--attack", "trades"] if module is kd_swa else []))
    loss = module.training_loss(model, x, y, args, *([[]] if module is kd_swa else []))
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())


def test_fast_trades_has_its_papers_step():
    for options, pixels in ((["--steps", 1], 6), (["--steps", 2], 6), ([], 2)):
        assert settings(trades, "--eps", 8, *options).alpha * 255 == pytest.approx(pixels)


# --------------------------------------------------------------------------------------- fast_bat

def box(x, eps=EPS):
    return (x - eps).clamp(min=0), (x + eps).clamp(max=1)


def attack_gradient(model, point, y):
    point = point.detach().clone().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(model(point), y, reduction="sum"), point)[0]


def steepness(model, x, y):
    """A lmbda at which about half of the coordinates of delta* end inside their bounds."""
    return attack_gradient(model, x, y).abs().median().item() / EPS


def test_the_update_of_fast_bat_is_the_gradient_of_the_bilevel_objective(smooth, pictures,
                                                                        monkeypatch):
    """d/d theta of CE(theta, P(z + grad CE(theta, z)/lmbda)) by differences, z held."""
    x, y = pictures
    low, high = box(x)
    z = (x + EPS / 2 * torch.empty_like(x).uniform_(-1, 1)).clamp(0, 1)
    monkeypatch.setattr(fast_bat, "linearization_point", lambda *args: z.clone())
    lmbda = steepness(smooth, x, y)

    def objective():
        x_adv = (z + attack_gradient(smooth, z, y) / lmbda).clamp(low, high)
        return F.cross_entropy(smooth(x_adv), y)

    x_adv, inside, _ = fast_bat.fast_bat(smooth, x, y, EPS, lmbda, bn="eval")
    assert 0.2 < inside.double().mean() < 0.8  # both kinds of coordinates
    assert torch.equal(inside, (x_adv > low) & (x_adv < high))
    args = settings(fast_bat, "--lmbda", lmbda, "--alpha2", 1)
    value = fast_bat.training_loss(smooth, x, y, args)
    assert value.item() == pytest.approx(objective().item(), rel=1e-9)  # cross-entropy alone
    direction = some_direction(smooth)
    whole = gradient_of(value, smooth, direction)
    assert whole == pytest.approx(difference_quotient(objective, smooth, direction), rel=1e-6)

    def implicit_part():  # x_adv moves, minus x_adv held: the small term by itself
        return objective() - F.cross_entropy(smooth(x_adv), y)

    args.alpha2 = 0
    plain = gradient_of(fast_bat.training_loss(smooth, x, y, args), smooth, direction)
    expected = difference_quotient(implicit_part, smooth, direction)
    assert whole - plain == pytest.approx(expected, rel=1e-3) and abs(expected) > 1e-4
    args.alpha2 = 0.5
    half = gradient_of(fast_bat.training_loss(smooth, x, y, args), smooth, direction)
    assert half - plain == pytest.approx((whole - plain) / 2, rel=1e-6)


def test_the_hessian_aware_update_is_that_of_the_problem_that_is_not_linearised(smooth, pictures,
                                                                               monkeypatch):
    """delta* = argmin over C of -CE + lmbda/2 |delta - z|^2, solved to the end. The first-order
    inverse of lmbda + H must come far closer to the differences than 1/lmbda does."""
    x, y = pictures
    low, high = box(x)
    lmbda = steepness(smooth, x, y)

    def solution():
        point = x
        for _ in range(60):
            point = (x + attack_gradient(smooth, point, y) / lmbda).clamp(low, high)
        return point

    x_adv = solution()

    def implicit_part():  # x_adv moves, minus x_adv held
        return F.cross_entropy(smooth(solution()), y) - F.cross_entropy(smooth(x_adv), y)

    inside = (x_adv > low) & (x_adv < high)
    assert 0.2 < inside.double().mean() < 0.8
    assert torch.allclose(x_adv, (x + attack_gradient(smooth, x_adv, y) / lmbda).clamp(low, high),
                          atol=1e-12)  # it has converged

    def solved(model, *args):  # in place of the one step of (8)
        point = x_adv.clone().requires_grad_()
        rise = F.cross_entropy(model(point), y, reduction="sum")
        gradient, = torch.autograd.grad(rise, point, create_graph=True)
        return x_adv.clone(), inside, gradient
    monkeypatch.setattr(fast_bat, "fast_bat", solved)
    direction = some_direction(smooth)
    expected, found = difference_quotient(implicit_part, smooth, direction), {}
    for options in (("--alpha2", 0), ("--alpha2", 1), ("--alpha2", 1, "--hessian-aware")):
        args = settings(fast_bat, "--lmbda", lmbda, *options)
        found[options] = gradient_of(fast_bat.training_loss(smooth, x, y, args), smooth, direction)
    plain, free, aware = found.values()
    free, aware = abs(free - plain - expected), abs(aware - plain - expected)
    assert aware < 0.2 * free and free > 1e-3 * abs(expected)


@pytest.mark.parametrize("name", ["pgd-nosign", "pgd", "uniform", "corner"])
def test_the_linearisation_points(smooth, pictures, name):
    x, y = pictures
    low, high = box(x)
    lmbda = steepness(smooth, x, y)
    torch.manual_seed(6)
    z = fast_bat.linearization_point(smooth, x, y, low, high, EPS, lmbda, name)
    torch.manual_seed(6)
    if name == "corner":
        delta = z - x
        touches = torch.isclose(z, low) | torch.isclose(z, high)
        assert touches.all() and (delta > 0).any() and (delta < 0).any()
        return
    start = (x + EPS * torch.empty_like(x).uniform_(-1, 1)).clamp(0, 1)
    gradient = attack_gradient(smooth, start, y)
    move = {"uniform": 0, "pgd": EPS / 2 * gradient.sign(), "pgd-nosign": gradient / lmbda}[name]
    assert torch.allclose(z, (start + move).clamp(low, high), atol=1e-12)


def test_the_defaults_of_fast_bat_depend_on_eps():
    for eps, inverse in ((4, 5000), (8, 5000), (12, 3500), (16, 2000), (20, 2000)):
        args = settings(fast_bat, "--eps", eps)
        assert 255 / args.lmbda == pytest.approx(inverse)
        assert args.alpha2 / args.lmbda == pytest.approx(0.1)
    args = settings(fast_bat, "--lmbda", 0.5, "--alpha2", 0)
    assert (args.lmbda, args.alpha2) == (0.5, 0)


# ----------------------------------------------------------------------------------------- kd_swa

def test_kd_at_temperature_2(pictures):
    torch.manual_seed(0)
    logits, teacher = torch.randn(2, 5, 10, dtype=torch.float64).mul(3)
    logits.requires_grad_()
    p, t = (z.exp().sqrt() / z.exp().sqrt().sum(1, keepdim=True) for z in (logits, teacher))
    value = kd_swa.kd(logits, teacher, 2.0)
    assert value.item() == pytest.approx(-4 * (t * p.log()).sum(1).mean().item(), rel=1e-12)
    gradient, = torch.autograd.grad(value, logits)
    assert torch.allclose(gradient, 2 * (p - t).detach() / 5)  # T (p - t), a mean over 5


@pytest.mark.parametrize("attack", ["pgd", "fgsm", "trades"])
def test_the_loss_of_kd_swa(smooth, pictures, monkeypatch, attack):
    """Eq. 1 with teachers that see x_adv; TRADES' own loss takes the place of cross-entropy."""
    x, y = pictures
    x_adv = (x + EPS * torch.randn_like(x).sign()).clamp(0, 1)
    monkeypatch.setattr(kd_swa, "attack", lambda *args: x_adv)
    other = copy.deepcopy(smooth)
    with torch.no_grad():
        other.linear.weight += 0.1 * torch.randn_like(other.linear.weight)
    teachers = [(0.5, lambda z, y: other(z)), (0.2, lambda z, y: 2 * other(z))]
    args = settings(kd_swa, "--attack", attack, "--beta", 3, "--label-smoothing", 0.1)
    value = kd_swa.training_loss(smooth, x, y, args, teachers)
    seen = smooth(x if attack == "trades" else x_adv)
    wanted = F.one_hot(y, 10).double() * 0.9 + 0.01
    base = -(wanted * seen.log_softmax(1)).sum(1).mean()
    if attack == "trades":
        s, s_adv = torch.softmax(smooth(x), 1), torch.softmax(smooth(x_adv), 1)
        base = base + 3 * (s * (s / s_adv).log()).sum(1).mean()
    p = (smooth(x_adv) / 2).log_softmax(1)
    expected = 0.3 * base
    for weight, factor in ((0.5, 1), (0.2, 2)):
        t = torch.softmax(factor * other(x_adv) / 2, 1)
        expected = expected - weight * 4 * (t * p).sum(1).mean()
    assert value.item() == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize("options, steps, length", [
    ([], 10, 1 / 4), (["--attack", "fgsm"], 1, 7 / 8), (["--attack", "trades"], 10, 1 / 4),
    (["--norm", "l2"], 10, 15 / 128), (["--attack", "fgsm", "--norm", "l2"], 1, 15 / 128)])
def test_the_attacks_of_kd_swa(smooth, pictures, options, steps, length):
    x, y = pictures
    args = settings(kd_swa, "--eps", 128, *options)
    assert args.steps == steps and args.alpha == pytest.approx(length * 128 / 255)
    torch.manual_seed(0)
    x_adv = kd_swa.attack(smooth, x, y, args)
    torch.manual_seed(0)
    expected = (trades.trades(smooth, x, args.eps, args.alpha, steps) if "trades" in options else
                fast_at.fast_at(smooth, x, y, args.eps, args.alpha, steps, norm=args.norm,
                                bn="eval"))
    assert torch.equal(x_adv, expected)


def test_the_virtual_teacher_is_99_percent_sure(script, monkeypatch):
    args = settings(kd_swa, "--tf-kd")
    pictures = argparse.Namespace(classes=list("abcde"))
    (weight, teacher), = kd_swa.find_teachers(args, pictures, None)
    p = torch.softmax(teacher(None, torch.tensor([2, 0])), 1)
    assert weight == 0.75 and p[0, 2] == pytest.approx(0.99) and p[1, 0] == pytest.approx(0.99)
    assert torch.allclose(p.sum(1), torch.ones(2)) and p[0, 1] == pytest.approx(0.01 / 4)


def networks(n):
    for seed in range(n):
        torch.manual_seed(seed)
        yield models.build_model("resnet10", 10, width=8)


def test_swa_is_the_mean_of_the_weights_and_has_statistics_of_its_own():
    """Eq. 2: after n epochs the mean of n networks; BatchNorm as in one pass over the pictures."""
    seen, averaged = [], models.build_model("resnet10", 10, width=8)
    x = torch.rand(16, 3, 32, 32)
    args = settings(kd_swa)
    for n, model in enumerate(networks(4)):
        kept = copy.deepcopy(model.state_dict())
        kd_swa.average_weights(averaged, model, n, args, [(x, None)])
        assert all(torch.equal(v, kept[k]) for k, v in model.state_dict().items())
        seen.append(kept)
    for name, value in averaged.named_parameters():
        mean = torch.stack([weights[name] for weights in seen]).mean(0)
        assert torch.allclose(value, mean, atol=1e-6)
    first = averaged.conv1((x - averaged.mean) / averaged.std)  # what its first BatchNorm sees
    assert torch.allclose(averaged.bn1.running_mean, first.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(averaged.bn1.running_var, first.var((0, 2, 3)), atol=1e-5)


def test_iswa_goes_on_from_the_average():
    first, second = networks(2)
    averaged = copy.deepcopy(first)
    x = torch.rand(8, 3, 32, 32)
    kd_swa.average_weights(averaged, second, 1, settings(kd_swa, "--iswa"), [(x, None)])
    for name, value in second.state_dict().items():
        assert torch.equal(value, averaged.state_dict()[name])
    assert not torch.equal(second.conv1.weight, first.conv1.weight)


# ------------------------------------------------------------------------------- what all promise

def attacks(model, x, y):
    yield fast_at.fast_at(model, x, y, EPS, 1.25 * EPS)
    yield fast_at.fast_at(model, x, y, EPS, EPS, 2, norm="l2")
    yield trades.trades(model, x, EPS, EPS / 2, 2)
    yield trades.trades(model, x, EPS, EPS, 1, "uniform", norm="l2")
    for name in ("pgd-nosign", "pgd", "uniform", "corner"):
        yield fast_bat.fast_bat(model, x, y, EPS, 255 / 5000, name)[0]


def test_attacks_stay_in_bounds_and_leave_the_model_as_it_was(model, batch):
    x, y = batch
    x[0], x[1] = 0, 1
    model.train()
    before = copy.deepcopy(model.state_dict())
    for i, x_adv in enumerate(attacks(model, x, y)):
        delta = (x_adv - x).flatten(1)
        radius = delta.norm(dim=1).max() if i in (1, 3) else delta.abs().max()
        assert EPS / 2 < radius <= EPS + 1e-6
        assert x_adv.min() >= 0 and x_adv.max() <= 1 and not x_adv.requires_grad
    fast_at.misalignment(model, x, y, EPS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training and all(p.grad is None for p in model.parameters())
    assert not x.requires_grad and math.isclose(x[1].mean(), 1)


def test_attacks_refuse_pictures_that_are_not_in_0_1(model, batch):
    x, y = batch
    for attack in (lambda: fast_at.fast_at(model, 2 * x, y, EPS, EPS),
                   lambda: trades.trades(model, 2 * x, EPS, EPS),
                   lambda: fast_bat.fast_bat(model, 2 * x, y, EPS, 0.05)):
        with pytest.raises(ValueError, match="normalise inside"):
            attack()
