"""Each method's attack, loss and defaults, recomputed here from its equations in float64."""

import argparse
import functools

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, method_loss
from test_attacks import ViT
from torch.optim.optimizer import register_optimizer_step_pre_hook

import backward_smoothing
import common
import fast_at
import fast_bat
import kd_swa
import trades

EPS = 8 / 255


@pytest.fixture
def smooth(request):
    """A smooth network in float64 and in eval mode: finite differences converge."""
    torch.manual_seed(0)
    vit = getattr(request, "param", None) == "vit"
    model = ViT() if vit else common.Classifier("resnet10", 5, 16, "softplus")
    model.double()(torch.rand(16, 3, 8, 8).double())
    return model.eval()


@pytest.fixture
def images():
    torch.manual_seed(1)
    return torch.rand(4, 3, 8, 8, dtype=torch.float64), torch.tensor([3, 1, 4, 1])


def settings(module, *options):
    return module.parse_args(["--dataset", "shapes", "--attack-bn", "eval", *map(str, options)])


def seeded(function, *args, **kwargs):
    torch.manual_seed(3)
    return function(*args, **kwargs)


def loss_of(module, model, images, *options, **more):
    """The script's own loss."""
    more = dict(run=argparse.Namespace(steps=100), data=None) | more
    return seeded(method_loss, module, model, *images, settings(module, *options), **more)


def direction(model):
    """A random one among the weights, always the same."""
    generator = torch.Generator().manual_seed(4)
    return [torch.empty_like(p).normal_(generator=generator) for p in model.parameters()]


def gradient_of(loss, model):
    """The derivative along `direction`, from autograd."""
    gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    return sum((g * d).sum() for g, d in zip(gradients, direction(model))).item()


def difference_quotient(function, model, h=1e-6):
    """The same by central differences; `function` is evaluated at moved parameters."""
    values = []
    for move in (h, -2 * h, h):
        with torch.no_grad():
            for p, d in zip(model.parameters(), direction(model)):
                p += move * d
        values.append(function().item())
    return (values[0] - values[1]) / (2 * h)


def uniform(x, eps=EPS):
    return (x + eps * torch.empty_like(x).uniform_(-1, 1)).clamp(0, 1)


def moved(x_adv, gradient, x, alpha, norm="linf"):
    """One projected step along the gradient or its sign."""
    if norm == "linf":
        delta = (x_adv + alpha * gradient.sign() - x).clamp(-EPS, EPS)
    else:
        delta = x_adv + alpha * F.normalize(gradient, dim=(1, 2, 3)) - x
        delta = delta * (EPS / delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)).clamp(max=1)
    return (x + delta).clamp(0, 1)


def attack_gradient(model, point, y=None, s=None):
    """That of cross-entropy with y, or of KL(s || s(f(point))), summed over the images."""
    point = point.detach().clone().requires_grad_()
    p = torch.softmax(model(point), 1)
    loss = -p[range(len(y)), y].log().sum() if s is None else (s * (s / p).log()).sum()
    return torch.autograd.grad(loss, point)[0]


def test_attacks_are_projected_gradient_ascent(smooth, images, monkeypatch):
    """On cross-entropy or on KL(s(f(x)) || s(f(x_adv))), from their start, by all their steps."""
    (x, y), m, sizes = images, smooth, (EPS, EPS / 2)
    noise = torch.rand_like(x) * 2 - 1
    monkeypatch.setattr(torch, "randn_like", lambda x: 3 * noise)
    monkeypatch.setattr(common, "random_start", lambda x, eps, *_: (x + eps * noise).clamp(0, 1))
    starts = dict(zero=x, uniform=(x + EPS * noise).clamp(0, 1), normal=x + 0.003 * noise)
    args = functools.partial(settings, kd_swa, "--eps", 8, "--alpha", 4, "--attack")
    for objective, start, norm, steps, x_adv in (
            ("ce", "uniform", "linf", 1, fast_at.fast_at(m, x, y, *sizes, bn="eval")),
            ("ce", "zero", "linf", 3, fast_at.fast_at(m, x, y, *sizes, 3, "zero", bn="eval")),
            ("ce", "zero", "l2", 2, fast_at.fast_at(m, x, y, *sizes, 2, "zero", "l2", "eval")),
            ("ce", "zero", "l2", 3, common.pgd_attack(m, x, y, *sizes, 3, start="zero", norm="l2")),
            ("ce", "uniform", "linf", 10, kd_swa.attack(m, x, y, args("pgd"))),
            ("ce", "uniform", "linf", 1, kd_swa.attack(m, x, y, args("fgsm"))),
            ("kl", "normal", "linf", 10, kd_swa.attack(m, x, y, args("trades"))),
            ("kl", "normal", "l2", 10, kd_swa.attack(m, x, y, args("trades", "--norm", "l2"))),
            ("kl", "normal", "linf", 10, trades.trades(m, x, *sizes)),
            ("kl", "normal", "l2", 3, trades.trades(m, x, *sizes, 3, norm="l2")),
            ("kl", "uniform", "linf", 2, trades.trades(m, x, *sizes, 2, "uniform"))):
        s = torch.softmax(m(x), 1).detach() if objective == "kl" else None
        expected = starts[start]
        for _ in range(steps):
            expected = moved(expected, attack_gradient(m, expected, y, s), x, EPS / 2, norm)
        assert torch.allclose(x_adv, expected, atol=1e-8), (objective, start, norm, steps)
        assert (x_adv - x).flatten(1).norm(dim=1).max() > EPS / 2
    assert fast_at.fast_at(m, x, y, *sizes, 0) is x  # standard training


# ----------------------------------------------------------------------------------------- fast_at
def test_n_fgsm_is_its_formula(smooth, images):
    """One step from noise of 2 eps, which may end outside of the eps-ball."""
    x, y = images
    x[0], x[1] = 0, 1
    x_adv = seeded(fast_at.fast_at, smooth, x, y, EPS, 0.5 * EPS, init="noise", bn="eval")
    noisy = seeded(uniform, x, 2 * EPS)
    expected = (noisy + 0.5 * EPS * attack_gradient(smooth, noisy, y).sign()).clamp(0, 1)
    assert torch.allclose(x_adv, expected, atol=1e-12)
    assert 2 * EPS < (x_adv - x).abs().max() <= 2.5 * EPS + 1e-12


@pytest.mark.parametrize("smooth", ["resnet", "vit"], indirect=True)
def test_gradalign_and_its_gradient(smooth, images):
    """1 - cos of the input gradients at x and x + eta; only the second is differentiated."""
    model, (x, y) = smooth, images
    def misalignment(a):
        point = seeded(uniform, x).requires_grad_()
        b, = torch.autograd.grad(F.cross_entropy(model(point), y), point)
        a, b = a().flatten(1), b.flatten(1)
        return (1 - (a * b).sum(1) / a.norm(dim=1) / b.norm(dim=1)).mean()
    value = seeded(fast_at.misalignment, model, x, y, EPS, bn="eval")
    first = attack_gradient(model, x, y)
    assert value.item() == pytest.approx(misalignment(lambda: first).item(), rel=1e-9)
    derivative = gradient_of(value, model)
    expected = difference_quotient(lambda: misalignment(lambda: first), model)
    assert derivative == pytest.approx(expected, rel=1e-4)
    both = difference_quotient(lambda: misalignment(lambda: attack_gradient(model, x, y)), model)
    assert abs(both - expected) > 1e-2 * abs(expected)  # the first gradient would have changed it
    losses = [loss_of(fast_at, model, images, "--grad-align", w).item() for w in (0, 0.5, 1)]
    assert losses[0] < losses[1] and sum(losses) == pytest.approx(3 * losses[1], rel=1e-12)


def test_gradalign_leaves_out_images_without_gradient(smooth, images):
    """As the authors' code does, but not those whose gradient is small, as the network is sure."""
    x, y = images[0].float(), images[1]
    x[:, 0, 0, 0] = torch.tensor([0, 0.5, 0.5, 0.5])

    class Sure(torch.nn.Module):  # on an image that starts with 0, softmax is exactly 0 and 1
        def forward(self, x):
            return smooth(x) + (60 + (x[:, :1, 0, 0] < 0.1) * 1e4) * F.one_hot(y, 5)
    a, b = (attack_gradient(Sure(), z.double(), y)[1:].flatten(1) for z in (x, seeded(uniform, x)))
    cosine = (a * b).sum(1) / a.norm(dim=1) / b.norm(dim=1)
    smooth.float()
    value = seeded(fast_at.misalignment, Sure(), x, y, EPS, bn="eval")
    assert value.item() == pytest.approx(1 - cosine.mean().item(), rel=1e-3)
    assert gradient_of(value, smooth) ** 2 < 1e9  # and is no NaN


def test_fast_at_plus_notices_a_collapse(smooth, monkeypatch):
    """By 10 points below the best epoch or, if that is little, half of it."""
    data = common.Data(None, (torch.zeros(300, 3, 8, 8), torch.zeros(300)), None, [])
    run, seen = argparse.Namespace(args=settings(fast_at)), []
    for now, epochs, expected in ((41, [], False), (41, [50, 30], False), (41, [30, 52, 20], True),
                                  (5, [12, 11], True), (5, [9], False)):
        run.rows = [dict(val_pgd=epoch) for epoch in epochs]
        monkeypatch.setattr(common, "accuracy", lambda m, x, y, *options: (
            seen.append((len(x), len(y), *options)), now))
        assert fast_at.has_collapsed(smooth, data, run) == expected
    assert seen == [(128, 128, EPS, 10, "linf")] * 5


def test_fast_at_plus_trains_by_pgd_10_until_it_has_recovered(smooth, images, monkeypatch):
    """It looks about ten times per epoch, here at every eleventh of the 100 steps."""
    for i, before, found, recovers in ((0, False, True, True), (10, True, False, True),
                                       (11, True, False, False), (12, False, True, False)):
        monkeypatch.setattr(fast_at, "has_collapsed", lambda *_: found)
        loss = loss_of(fast_at, smooth, images, "--recover", "--init", "zero", i=i, recover=before)
        options = (EPS / 4, 10) if recovers else (1.25 * EPS, 1, "zero")
        x_adv = seeded(fast_at.fast_at, smooth, *images, EPS, *options, bn="eval")
        assert torch.equal(loss, F.cross_entropy(smooth(x_adv), images[1]))


# --------------------------------------------------------------------- trades, backward_smoothing
@pytest.mark.parametrize("module", [trades, backward_smoothing, kd_swa])
def test_the_loss_of_trades_and_its_gradient(smooth, images, monkeypatch, module):
    """CE(f(x), y) + beta KL(s(f(x)) || s(f(x_adv))), both of its networks differentiated."""
    (x, y), options = images, ["--attack", "trades"] * (module is kd_swa)
    x_adv = (x + EPS * torch.randn_like(x).sign()).clamp(0, 1)
    monkeypatch.setattr(module, options[0][2:] if options else module.__name__, lambda *_: x_adv)
    value = loss_of(module, smooth, images, "--beta", 4, *options, teachers=[])
    derivative = gradient_of(value, smooth)
    def spelled_out():
        s, s_adv = torch.softmax(smooth(x), 1), torch.softmax(smooth(x_adv), 1)
        return (-s[range(len(y)), y].log() + 4 * (s * (s / s_adv).log()).sum(1)).mean()
    assert value.item() == pytest.approx(spelled_out().item(), rel=1e-9)
    assert derivative == pytest.approx(difference_quotient(spelled_out, smooth), rel=1e-5)
    monkeypatch.undo()  # with its own attack; no NaN where probabilities are rounded to 0
    with torch.no_grad():
        smooth.linear.weight *= 1e6
    assert (torch.softmax(smooth(x), 1) == 0).any()
    loss = loss_of(module, smooth, images, *options, teachers=[])
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in smooth.parameters())


@pytest.mark.parametrize("options", [{}, {"gamma": 4.0}, {"alone": True}, {"random_points": 5},
                                     {"alpha": EPS / 2}, {"y": torch.tensor([3, 1, 4, 1])}])
def test_backward_smoothing_is_algorithm_1(smooth, images, options):
    """(4.4) and (4.5) on probabilities, one draw of psi at a time."""
    (x, _), options = images, {"alpha": EPS} | options
    x_adv = seeded(backward_smoothing.backward_smoothing, smooth, x, EPS, **options)
    f = smooth(x).detach()
    psi = seeded(torch.empty(options.get("random_points", 1), *f.shape).uniform_, -1, 1)
    down = sum(attack_gradient(smooth, x, s=torch.softmax(f + options.get("gamma", 1) * draw, 1))
               for draw in psi)
    expected = moved(x, -down, x, options["alpha"])
    if "alone" not in options:
        s = None if "y" in options else torch.softmax(f, 1)
        up = attack_gradient(smooth, expected, options.get("y"), s)
        expected = moved(expected, up, x, options["alpha"])
    assert torch.allclose(x_adv, expected, atol=1e-12)
    assert (x_adv - x).abs().max() > EPS / 3  # it does move


def test_every_option_of_backward_smoothing_changes_the_loss(smooth, images):
    losses = [loss_of(backward_smoothing, smooth, images, *options.split()).item() for options in (
        "--objective ce", "", "--gamma 5", "--beta 2", "--alpha 2", "--random-points 9", "--alone",
        "--norm l2", "--eps 3", "--attack-bn train")]
    assert len(set(losses)) == len(losses)
    x, y = images
    x_adv = seeded(backward_smoothing.backward_smoothing, smooth, x, EPS, EPS, y=y)
    assert losses[0] == F.cross_entropy(smooth(x_adv), y).item()


# ---------------------------------------------------------------------------------------- fast_bat
def problem(model, x, y):
    """The bounds, and a lmbda at which about half of the coordinates of delta* end inside."""
    lmbda = attack_gradient(model, x, y).abs().median().item() / EPS
    return (x - EPS).clamp(min=0), (x + EPS).clamp(max=1), lmbda


@pytest.mark.parametrize("smooth", ["resnet", "vit"], indirect=True)
def test_the_update_of_fast_bat_is_the_gradient_of_the_objective(smooth, images, monkeypatch):
    """d/d theta of CE(theta, P(z + grad CE(theta, z)/lmbda)) by differences, z held."""
    model, (x, y) = smooth, images
    low, high, lmbda = problem(model, x, y)
    z = uniform(x, EPS / 2)
    monkeypatch.setattr(fast_bat, "linearization_point", lambda *_: z.clone())
    def objective():
        x_adv = (z + attack_gradient(model, z, y) / lmbda).clamp(low, high)
        return F.cross_entropy(model(x_adv), y)
    x_adv, inside, _ = fast_bat.fast_bat(model, x, y, EPS, lmbda, bn="eval")
    assert 0.2 < inside.double().mean() < 0.8  # both kinds of coordinates
    assert torch.equal(inside, (x_adv > low) & (x_adv < high))
    losses = [loss_of(fast_bat, model, images, "--lmbda", lmbda, "--alpha2", a) for a in (0, 1)]
    assert losses[1].item() == pytest.approx(objective().item(), rel=1e-9)  # cross-entropy alone
    plain, whole = (gradient_of(loss, model) for loss in losses)
    assert whole == pytest.approx(difference_quotient(objective, model), rel=1e-5)
    expected = difference_quotient(  # x_adv moves, minus x_adv held: the small term by itself
        lambda: objective() - F.cross_entropy(model(x_adv), y), model)
    assert whole - plain == pytest.approx(expected, rel=1e-3) and abs(expected) > 1e-5
    *_, gradient = fast_bat.fast_bat(model, x, y, EPS, lmbda, bn="eval")
    implicit = gradient_of(gradient.sum(), model)
    model.train()(x)  # as in training: changes BatchNorm's statistics, but not those of the graph
    assert gradient_of(gradient.sum(), model) == implicit


def test_the_hessian_aware_update_is_that_of_the_problem_that_is_not_linearised(smooth, images):
    """delta* = argmin over C of -CE + lmbda/2 |delta - z|^2, solved to the end. The first-order
    inverse of lmbda + H must come far closer to the differences than 1/lmbda does."""
    x, y = images
    low, high, lmbda = problem(smooth, x, y)
    def solution():
        point = x
        for _ in range(40):
            point = (x + attack_gradient(smooth, point, y) / lmbda).clamp(low, high)
        return point
    x_adv = solution()
    inside, after = (x_adv > low) & (x_adv < high), attack_gradient(smooth, x_adv, y)
    assert 0.2 < inside.double().mean() < 0.8
    assert torch.allclose(x_adv, (x + after / lmbda).clamp(low, high), atol=1e-12)  # it is solved
    point = x_adv.clone().requires_grad_()
    rise = F.cross_entropy(smooth(point), y, reduction="sum")
    gradient, = torch.autograd.grad(rise, point, create_graph=True)
    losses = [fast_bat.bilevel_loss(smooth, x_adv, y, inside, gradient, lmbda, *options, "eval")
              for options in ((0, False), (1, False), (1, True))]
    plain, free, aware = (gradient_of(loss, smooth) for loss in losses)
    expected = difference_quotient(  # x_adv moves, minus x_adv held
        lambda: F.cross_entropy(smooth(solution()), y) - F.cross_entropy(smooth(x_adv), y), smooth)
    free, aware = abs(free - plain - expected), abs(aware - plain - expected)
    assert aware < 0.2 * free and free > 1e-3 * abs(expected)
    assert gradient_of(loss_of(fast_bat, smooth, images), smooth) != gradient_of(
        loss_of(fast_bat, smooth, images, "--hessian-aware"), smooth)


@pytest.mark.parametrize("name", ["pgd-nosign", "pgd", "uniform", "corner"])
def test_the_linearisation_points(smooth, images, name):
    x, y = images
    low, high, lmbda = problem(smooth, x, y)
    z = seeded(fast_bat.linearization_point, smooth, x, y, low, high, EPS, lmbda, name)
    start = seeded(uniform, x)
    gradient = attack_gradient(smooth, start, y)
    move = {"pgd": EPS / 2 * gradient.sign(), "pgd-nosign": gradient / lmbda}.get(name, 0)
    if name == "corner":
        start = torch.where(z > x, high, low)
        assert (z > x).any() and (z < x).any()
    assert torch.allclose(z, (start + move).clamp(low, high), atol=1e-12)


# ------------------------------------------------------------------------------------------ kd_swa
@pytest.mark.parametrize("attack", ["pgd", "trades"])
def test_the_loss_of_kd_swa(smooth, images, monkeypatch, attack):
    """Eq. 1 with teachers that see x_adv; TRADES' own loss takes the place of cross-entropy."""
    x, y = images
    x_adv = (x + EPS * torch.randn_like(x).sign()).clamp(0, 1)
    monkeypatch.setattr(kd_swa, "attack", lambda *_: x_adv)
    teachers = [(0.5, 2, lambda z, y: -smooth(z)), (0.2, 5, lambda z, y: 3 * smooth(z))]
    value = loss_of(kd_swa, smooth, images, "--attack", attack, "--beta", 3, "--label-smoothing",
                    0.1, teachers=teachers)
    wanted = F.one_hot(y, 5).double() * 0.9 + 0.02
    s, s_adv = torch.softmax(smooth(x), 1), torch.softmax(smooth(x_adv), 1)
    expected = 0.3 * -(wanted * (s if attack == "trades" else s_adv).log()).sum(1).mean()
    if attack == "trades":
        expected = expected + 0.3 * 3 * (s * (s / s_adv).log()).sum(1).mean()
    for weight, temperature, teacher in teachers:
        t, p = (torch.softmax(z / temperature, 1) for z in (teacher(x_adv, y), smooth(x_adv)))
        expected = expected - weight * temperature**2 * (t.detach() * p.log()).sum(1).mean()
    assert value.item() == pytest.approx(expected.item(), rel=1e-9)
    assert gradient_of(value, smooth) == pytest.approx(gradient_of(expected, smooth), rel=1e-9)


@pytest.mark.parametrize("n", [5, 1])
def test_the_virtual_teacher_is_99_percent_sure_and_softened_by_40(n):
    """Yuan et al. 2020; where there is but one class, it is sure."""
    data = argparse.Namespace(classes=list("abcde")[:n])
    (weight, temperature, teacher), = kd_swa.find_teachers(settings(kd_swa, "--tf-kd"), data, 0, 0)
    p = torch.softmax(teacher(None, torch.tensor([0, n - 1])), 1)
    expected = torch.tensor([0.99] + [0.0025] * 4 if n == 5 else [1.0])
    assert (weight, temperature) == (0.75, 40)
    assert torch.allclose(p, torch.stack([expected, expected.flip(0)]))


def test_missing_teachers_are_trained_first(smooth, images, monkeypatch, tmp_path):
    """The robust one by Fast AT, the standard one without attack."""
    (x, y), runs = images, []
    monkeypatch.setattr(kd_swa, "train", runs.append)
    args = settings(kd_swa, "--attack", "trades", "--teacher-epochs", 7, "--iswa", "--lr", 0.03)
    for kind in ("adv", "std"):
        assert kd_swa.train_teacher(args, kind, tmp_path / kind) == tmp_path / kind / "best.pt"
    x_adv = seeded(kd_swa.attack, smooth, x, y, runs[0])
    assert torch.equal(x_adv, seeded(fast_at.fast_at, smooth, x, y, EPS, 1.25 * EPS))
    assert kd_swa.attack(smooth, x, y, runs[1]) is x
    assert {(r.epochs, r.lr, r.no_swa, r.iswa) for r in runs} == {(7, 0.03, True, False)}


def test_swa_averages_weights_from_the_first_decay_and_recomputes_statistics(script, monkeypatch):
    """Eq. 2, on the checkpoints of every epoch; --iswa continues from the average."""
    monkeypatch.setattr(common, "augment", lambda x, flip: x.float() / 255)
    options = [*TINY, "--epochs", 4, "--lr-schedule", "piecewise", "--milestones", 0.5, 0.25,
               "--kd", "none", "--steps", 1, "--keep-epochs", "--train-size", 32]
    assert script(kd_swa, *options, "--out", "plain")[0] == 0
    assert script(kd_swa, *options, "--out", "iswa", "--iswa")[0] == 0
    epochs, averages, iswa, iswa_averages = (
        [common.load_model(f"{path}-{i}.pt")[0] for i in (2, 3, 4)] for path in (
            "plain/epoch", "plain/swa_epoch", "iswa/epoch", "iswa/swa_epoch"))
    for n, averaged in enumerate(averages, 1):
        for name, value in averaged.named_parameters():
            mean = sum(model.get_parameter(name) for model in epochs[:n]) / n
            assert torch.allclose(value, mean, atol=1e-6)
    args = settings(kd_swa, *options)
    batches = [x for x, _ in common.batches(common.load_data(args), args, epoch=3)]
    seen = [averaged.conv1((x - averaged.mean) / averaged.std) for x in batches]
    for statistic, values in ((averaged.bn1.running_mean, [z.mean((0, 2, 3)) for z in seen]),
                              (averaged.bn1.running_var, [z.var((0, 2, 3)) for z in seen])):
        assert torch.allclose(statistic, sum(values) / len(values), atol=1e-5)
    for model, averaged in zip(iswa, iswa_averages):
        assert all(map(torch.equal, model.state_dict().values(), averaged.state_dict().values()))
    assert not torch.equal(iswa[2].conv1.weight, averages[2].conv1.weight)


# ---------------------------------------------------------------------------------------- defaults
@pytest.mark.parametrize("module, options, expected", [
    (fast_at, "", "alpha=10 steps=1 epochs=100 attack_bn=train arch=resnet18"),
    (fast_at, "--steps 2", "alpha=4"), (fast_at, "--steps 10", "alpha=2"),
    (fast_at, "--init noise", "alpha=8"), (fast_at, "--alpha 0", "alpha=0"),
    (trades, "", "alpha=2 steps=10 init=normal beta=6 attack_bn=eval"),
    (trades, "--steps 1 --beta 0", "alpha=6 beta=0"), (trades, "--steps 2", "alpha=6"),
    (backward_smoothing, "", "alpha=8 gamma=1 beta=10 random_points=1 attack_bn=eval"),
    (backward_smoothing, "--alpha 0 --gamma 0", "alpha=0 gamma=0"),
    (fast_bat, "", "arch=preactresnet18 epochs=20 lr=0.2 lr_schedule=cyclic attack_bn=train"),
    (fast_bat, "", "lmbda=0.051 alpha2=0.0051"),  # 255/5000
    (fast_bat, "--eps 8.01", "lmbda=0.1275 alpha2=0.01275"),  # 255/2000
    (fast_bat, "--lmbda 0.5 --alpha2 0", "lmbda=0.5 alpha2=0"),
    (kd_swa, "", "arch=preactresnet18-v2 epochs=200 milestones=[0.25,0.75] attack_bn=train"),
    (kd_swa, "", "alpha=2 steps=10 lambda1=0.5 lambda2=0.25 temperature=2 teacher_epochs=30"),
    (kd_swa, "--attack fgsm --epochs 20", "alpha=7 steps=1 attack_bn=train teacher_epochs=20"),
    *((kd_swa, f"--dataset shapes {options}", f"attack={attack}") for options, attack in (
        ("", "fgsm"), ("--steps 1", "fgsm"), ("--steps 10", "pgd"), ("--norm l2", "pgd"))),
    (kd_swa, "--attack trades", "alpha=2 steps=10 beta=6 attack_bn=eval"),
    (kd_swa, "--attack trades --attack-bn train --alpha 0", "alpha=0 attack_bn=train"),
    (kd_swa, "--norm l2 --eps 128 --kd adv --lambda1 0.8 --lambda2 0.3", "alpha=15 lambda1=0.8")])
def test_defaults_are_those_of_the_papers(module, options, expected):
    args = vars(module.parse_args(options.split()))
    args["alpha"] = 255 * args.get("alpha", 0)  # Fast-BAT has none
    for name, value in (pair.split("=") for pair in expected.split()):
        number = isinstance(args[name], (int, float))
        assert (f"{args[name]:.9g}" if number else str(args[name]).replace(" ", "")) == value


def test_the_learning_rate():
    args = fast_at.parse_args(["--lr", "0.2", "--milestones", "0.75", "0.5"])
    for args.lr_schedule, parts, rates in (
            ("piecewise", (0, 0.49, 0.5, 0.74, 0.75, 1), (0.2, 0.2, 0.02, 0.02, 0.002, 0.002)),
            ("cyclic", (0, 0.25, 0.5, 1), (0, 0.1, 0.2, 0)),
            ("cosine", (0, 1 / 3, 0.5, 1), (0.2, 0.15, 0.1, 0))):
        found = [common.learning_rate(args, part * args.epochs) for part in parts]
        assert found == pytest.approx(rates)


def test_the_optimizer_gets_the_learning_rate_of_every_step(script):
    seen, options = [], [*TINY, "--lr", "0.2", "--weight-decay", "0.01"]
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, *_: seen.append(dict(optimizer.param_groups[0])))
    assert script(fast_at, *options)[0] == 0
    hook.remove()
    args = fast_at.parse_args(options)
    assert [group["lr"] for group in seen] == [common.learning_rate(args, i / 4) for i in range(8)]
    assert all((group["momentum"], group["weight_decay"]) == (0.9, 0.01) for group in seen)
