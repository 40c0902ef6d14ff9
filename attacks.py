"""What evaluate.py does to a network besides PGD, each function as its paper describes it:

    autoattack_lite       Auto-PGD on two losses: AutoAttack without FAB, Square      linf, l2
    square                random squares, without gradients                           linf, l2
    cw_l2                 Carlini & Wagner: a small perturbation that fools           l2
    rays                  the distance to the boundary, from predicted labels alone   linf
    largest_eigenvalue    the curvature of the loss

The model is any PyTorch classifier of images in [0, 1], x is float N x C x H x W, y are labels. The
attacks return x_adv, and leave the model as it was.
"""

import math

import torch
import torch.nn.functional as F

from common import attacking, project, random_start, step


def margin(logits, y, reduction="none"):
    """The margin of Carlini & Wagner, N: the highest wrong logit minus the true one."""
    true = F.one_hot(y, logits.shape[1]).bool()
    difference = logits.masked_fill(true, -math.inf).amax(1) - logits[true]
    return difference.sum() if reduction == "sum" else difference


def apgd_attack(model, x, y, eps, steps=100, *, norm="linf", target=None, generator=None):
    """Auto-PGD (Croce & Hein 2020, Algorithm 1): gradient ascent with momentum and a step size that
    adapts to each image, on cross-entropy or, given target classes, on the targeted DLR loss
    -(z_y - z_target) / (z_1 - (z_3 + z_4) / 2), with the logits sorted as z_1 >= z_2 >= ... Returns
    x_adv: the first point that fooled the model, else the best."""
    def look(point):
        """The loss at `point`, its gradient, and whether the model is fooled there."""
        point = point.detach().requires_grad_()
        logits = model(point)
        loss = F.cross_entropy(logits, y if target is None else target, reduction="none")
        if target is not None:
            loss = -loss  # what remains if there are too few classes for DLR
            if logits.shape[1] > 3:
                z_y, z_target = (logits.gather(1, label[:, None])[:, 0] for label in (y, target))
                z_1, _, z_3, z_4 = logits.topk(4).values.T
                loss = (z_target - z_y) / (z_1 - (z_3 + z_4) / 2).clamp(min=1e-12)
        gradient, = torch.autograd.grad(loss.sum(), point)
        return loss.detach().view(column), gradient, (logits.argmax(1) != y).view(column)

    where, column = torch.where, (-1, 1, 1, 1)  # a number for each image
    checkpoints, part, gap, last_check = set(), 0.22, 0.22, 0
    while part <= 1:  # when to reconsider the step size
        checkpoints.add(math.ceil(part * steps - 1e-9))
        gap = max(gap - 0.03, 0.06)
        part += gap
    with attacking(model, x):
        point = previous = best = x_adv = random_start(x, eps, norm, generator)
        loss, gradient, fooled = look(point)
        best_loss, best_gradient, checked_loss = loss, gradient, loss
        size, halved, rises = torch.full_like(loss, 2 * eps), loss == loss, torch.zeros_like(loss)
        for k in range(steps):
            if fooled.all():
                break
            if k in checkpoints:
                too_few_rises = rises < 0.75 * (k - last_check)
                no_progress = ~halved & (best_loss <= checked_loss)
                halved = too_few_rises | no_progress  # and back to the best point
                size, point = where(halved, size / 2, size), where(halved, best, point)
                gradient = where(halved, best_gradient, gradient)
                loss, checked_loss = where(halved, best_loss, loss), best_loss
                rises, last_check = torch.zeros_like(rises), k
            z = step(point, gradient, x, eps, size, norm)
            if k:
                z = project(point.lerp(z, 0.75) + 0.25 * (point - previous), x, eps, norm)
            previous, point, loss_before = point, z, loss
            loss, gradient, fooled_now = look(point)
            x_adv, fooled = where(fooled_now & ~fooled, point, x_adv), fooled | fooled_now
            rises, better = rises + (loss > loss_before), loss > best_loss
            best, best_loss = where(better, point, best), where(better, loss, best_loss)
            best_gradient = where(better, gradient, best_gradient)
    return where(fooled, x_adv, best)


def autoattack_lite(model, x, y, eps, *, norm="linf", steps=100, generator=None):
    """The white-box half of AutoAttack (Croce & Hein 2020) without FAB: Auto-PGD on cross-entropy,
    then on the DLR loss targeted at each of the 9 likeliest wrong classes."""
    with attacking(model, x), torch.no_grad():
        likely = model(x).scatter(1, y[:, None], -math.inf).argsort(1, descending=True)
    x_adv, left = x.detach().clone(), torch.arange(len(x), device=x.device)
    for target in (None, *likely[:, :-1].T[:9]):
        with attacking(model, x), torch.no_grad():
            left = left[model(x_adv[left]).argmax(1) == y[left]]
        if len(left):
            x_adv[left] = apgd_attack(model, x[left], y[left], eps, steps, norm=norm, generator=
                                      generator, target=None if target is None else target[left])
    return x_adv


def eta(size):
    """The square that Square adds in L2: one half rises to its centre, the other falls; norm 1."""
    ring = (1 / torch.arange(1, size // 2 + 2) ** 2).flip(0).cumsum(0).flip(0)
    halves, columns = [], torch.arange(size)[None]
    for rows in (size // 2, size - size // 2):
        away = (torch.arange(rows)[:, None] - rows // 2).abs().maximum((columns - size // 2).abs())
        halves.append(ring[away] / ring[away].norm())
    return torch.cat([halves[0], -halves[1]]) / 2 ** 0.5


def square(model, x, y, eps, *, norm="linf", queries=5000, generator=None):
    """Square attack (Andriushchenko et al. 2020): adds random squares, and keeps those that help.
    Returns x_adv. The batch shares the places of the squares; each image draws its own signs."""
    def uniform(*size):
        return torch.rand(size, device=x.device, generator=generator)

    def sign(*size):
        return torch.where(uniform(len(x), x.shape[1], *size) < 0.5, -1.0, 1.0)

    def window(size):
        row, column = (int(uniform(1) * (whole - size + 1)) for whole in x.shape[2:])
        return ..., slice(row, row + size), slice(column, column + size)

    x = x.detach()
    x_adv, index, side = x.clone(), torch.arange(len(x), device=x.device), min(x.shape[2:])
    with attacking(model, x), torch.no_grad():
        if norm == "linf":
            delta = eps * sign(1, x.shape[3])  # stripes
        else:
            delta, tile = torch.zeros_like(x), max(side // 5, 3)
            tiles = [whole // tile for whole in x.shape[2:]]
            signs = sign(*tiles).repeat_interleave(tile, 2).repeat_interleave(tile, 3)
            delta[..., :signs.shape[2], :signs.shape[3]] = eta(tile).to(x).repeat(tiles) * signs
            delta = eps * F.normalize(delta, dim=(1, 2, 3))
        point = (x + delta).clamp(0, 1)
        best = margin(model(point), y)
        for query in range(1, queries):
            x_adv[index] = point
            index, x, y, point, best = (t[best <= 0] for t in (index, x, y, point, best))
            if not len(index):  # all are fooled
                break
            # A square covers 0.8 of the image, and half as much after certain parts of the way.
            halvings = sum(query / queries > part / 10_000
                           for part in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000))
            size = round((0.8 * 0.5 ** halvings * x.shape[2] * x.shape[3]) ** 0.5)
            delta = point - x
            if norm == "linf":
                delta[window(min(max(size, 1), side - 1))] = eps * sign(1, 1)
            else:  # moves one square's perturbation into another, with what clipping has spared
                size = min(max(size, 3) | 1, side - 1)
                here, there = window(size), window(size)
                old, energy = delta[here].clone(), delta.square().sum((2, 3), keepdim=True)
                spare = (eps ** 2 - energy.sum(1, keepdim=True)).clamp(min=0) / x.shape[1]
                delta[here] = delta[there] = 0
                moved = energy - delta.square().sum((2, 3), keepdim=True)
                pattern = eta(size).to(x.device)
                new = (pattern if uniform(1) < 0.5 else pattern.T) * sign(1, 1)
                new = F.normalize(new + F.normalize(old, dim=(2, 3)), dim=(2, 3))
                delta[here] = new * (spare + moved).clamp(min=0).sqrt()
                delta = eps * F.normalize(delta, dim=(1, 2, 3))
            new = (x + delta).clamp(0, 1)
            value = margin(model(new), y)
            point = torch.where((value > best).view(-1, 1, 1, 1), new, point)
            best = value.maximum(best)
        x_adv[index] = point
    return x_adv


def cw_l2(model, x, y, *, constant=0.1, steps=100, lr=0.01):
    """Carlini & Wagner's L2 attack with KD-SWA's settings, which leave out the search for the
    constant: minimises |x_adv - x|^2 + constant max(z_y - z_other, 0), however far that leads.
    Returns the closest x_adv that fooled the model, or x."""
    x = x.detach()
    w = torch.atanh((2 * x - 1) * 0.999999).requires_grad_()  # x_adv = (tanh(w) + 1) / 2
    optimizer = torch.optim.Adam([w], lr)
    x_adv, nearest = x.clone(), torch.full_like(x[:, :1, :1, :1], math.inf)
    with attacking(model, x):
        for _ in range(steps):
            point = (w.tanh() + 1) / 2
            ahead, distance = margin(model(point), y), (point - x).square().sum((1, 2, 3), True)
            closer = (ahead > 0).view_as(distance) & (distance < nearest)
            nearest = torch.where(closer, distance.detach(), nearest)
            x_adv = torch.where(closer, point.detach(), x_adv)
            loss = distance.sum() + constant * (-ahead).clamp(min=0).sum()
            w.grad, = torch.autograd.grad(loss, w)
            optimizer.step()
    return x_adv


def rays(model, x, y, *, queries=5000):
    """RayS (Chen & Gu 2020), which only sees predicted labels: searches for the sign vector along
    which the decision boundary is closest, by flipping ever smaller blocks of signs. Returns points
    just behind the boundary, however far away, and x itself where none was found."""
    def is_fooled(index, signs, radius):
        point = x[index] + radius.view(-1, 1, 1, 1) * signs.view(-1, *x.shape[1:])
        logits = model(point.clamp(0, 1))
        return (logits.argmax(1) != y[index]) & logits.isfinite().all(1)

    x, n, size = x.detach(), len(x), x[0].numel()
    signs, radius = x.new_ones(n, size), x.new_full((n,), math.inf)
    used, level, block = torch.zeros(n, device=x.device), 0, 0
    with attacking(model, x), torch.no_grad():
        while len(index := (used < queries).nonzero()[:, 0]):
            width = max(1, math.ceil(size / 2 ** level))
            trial = signs.clone()
            trial[:, block * width:(block + 1) * width] *= -1
            used[index] += 1
            index = search = index[is_fooled(index, trial[index], radius[index])]
            low, high = torch.zeros_like(radius), radius.clamp(max=1)
            while len(search):  # bisects each image to 1e-3 in L2, as the authors' code does
                middle = (low[search] + high[search]) / 2
                behind = is_fooled(search, trial[search], middle)
                used[search] += 1
                high[search[behind]], low[search[~behind]] = middle[behind], middle[~behind]
                search = search[high[search] - low[search] > 1e-3 / size ** 0.5]
            index = index[high[index] < radius[index]]
            radius[index], signs[index] = high[index], trial[index]
            block += 1
            if block * width >= size:
                level, block = level + 1, 0
    radius = radius.view(-1, 1, 1, 1)
    return torch.where(radius < math.inf, x + radius * signs.view_as(x), x).clamp(0, 1)


def largest_eigenvalue(model, x, y, iterations=20):
    """The eigenvalue of the largest magnitude, N, of the Hessian of cross-entropy with respect to
    each image, by power iteration. It can be negative."""
    x = x.detach().requires_grad_()
    loss = F.cross_entropy(model(x), y, reduction="sum")
    gradient, = torch.autograd.grad(loss, x, create_graph=True)
    v = torch.randn_like(x)
    for _ in range(iterations):
        v = F.normalize(v, dim=(1, 2, 3), eps=1e-30)
        product, = torch.autograd.grad(gradient, x, v, retain_graph=True)
        value, v = (v * product).flatten(1).sum(1), product
    return value.detach()
