"""Backward Smoothing: efficient robust training (anonymous, under review at ICLR 2021).

Objective, the one of TRADES (eq. 1.2), with f the logits and s the softmax:

    min_theta  CE(f(x), y) + beta KL(s(f(x)) || s(f(x_adv)))

What is new is where the single attack step starts (Algorithm 1). Random noise in the *input* is
limited to the eps-ball and smooths too little; so draw noise in the *output* and go backward to an
input that would produce it:

    psi   ~ U(-1, 1)^C
    xi    = argmin over the ball of KL(s(f(x) + gamma psi) || s(f(x + xi)))     (4.4), one step down
    delta = argmax over the ball of KL(s(f(x)) || s(f(x + xi + delta)))         (4.5), one step up
    theta <- theta - lr grad_theta [CE(f(x), y) + beta KL(s(f(x)) || s(f(x + xi + delta)))]

    python backward_smoothing.py --eps 8                        Table 2: CIFAR-10, ResNet-18
    python backward_smoothing.py --eps 8 --dataset shapes       a minute on a laptop

Compared with fast_at.py: the attack starts at a backward-smoothed point instead of a random one,
climbs KL instead of cross-entropy, and the loss keeps the clean pictures.
"""

import torch
import torch.nn.functional as F

import common
from bookkeeping import Run
from data import batches, load_data


def parse_args(argv=None):
    parser = common.TrainingParser(__file__, __doc__, epochs=100, attack_bn="eval")
    add = parser.add_argument_group("options of Backward Smoothing").add_argument
    add("--gamma", type=common.number(float, 0), default=1.0, help="size of the output noise")
    add("--beta", type=common.number(float, 0), default=10.0, help="weight of KL")
    add("--alpha", type=common.pixels, metavar="PIXELS", help="length of both steps; None is eps")
    add("--random-points", type=common.number(int, 1), default=1, metavar="K",
        help="draws of psi to average over (Table 12)")
    add("--alone", action="store_true", help="leave out the ascent (Table 10)")
    add("--objective", choices=["kl", "ce"], default="kl",
        help="ce: cross-entropy in the ascent, and as the whole loss (section 5.4)")
    args = parser.parse_args(argv)
    args.alpha = args.alpha or args.eps
    return args


def kl(logits, target):
    """KL(target || s(logits)), summed over the batch; target and logits N x C, target sums to 1."""
    return F.kl_div(F.log_softmax(logits, dim=1), target, reduction="sum")


def backward_smoothing(model, x, eps, alpha, gamma=1.0, random_points=1, alone=False, y=None,
                       norm="linf", bn="eval"):
    """Algorithm 1, lines 5 and 6: x N x 3 x H x W in [0, 1] -> x_adv within eps of it, in [0, 1].

    eps and alpha in units of [0, 1]; with labels y the ascent climbs cross-entropy, else KL.
    Parameters, their gradients and BatchNorm statistics stay as they are. ValueError for bad x.
    """
    with common.attacking(model, x, bn):
        # (4.4) At xi = 0 the gradient is linear in the target, so K draws of psi cost one pass.
        start = x.clone().requires_grad_()
        logits = model(start)
        clean = logits.detach()
        psi = torch.empty(random_points, *clean.shape, device=x.device).uniform_(-1, 1)
        target = F.softmax(clean + gamma * psi, dim=-1).mean(0)
        gradient, = torch.autograd.grad(kl(logits, target), start)
        x_adv = common.step(x, gradient, x, eps, -alpha, norm)
        if alone:
            return x_adv

        # (4.5) One step up from there.
        x_adv.requires_grad_()
        logits = model(x_adv)
        rise = kl(logits, F.softmax(clean, 1)) if y is None else common.cross_entropy(logits, y)
        gradient, = torch.autograd.grad(rise, x_adv)
        return common.step(x_adv, gradient, x, eps, alpha, norm)


def training_loss(model, x, y, args):
    """Algorithm 1, line 7: CE + beta KL, both means over the batch; a scalar tensor."""
    x_adv = backward_smoothing(model, x, args.eps, args.alpha, args.gamma, args.random_points,
                               args.alone, y if args.objective == "ce" else None, args.norm,
                               args.attack_bn)
    if args.objective == "ce":
        return F.cross_entropy(model(x_adv), y)
    logits, logits_adv = model(x), model(x_adv)
    divergence = F.kl_div(F.log_softmax(logits_adv, 1), F.log_softmax(logits, 1), log_target=True,
                          reduction="batchmean")
    return F.cross_entropy(logits, y) + args.beta * divergence


def train(args):
    data = load_data(args)
    model = common.prepare_model(args, data)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9,
                                weight_decay=args.weight_decay, fused=True)
    scaler = torch.amp.GradScaler(args.device.split(":")[0], enabled=args.precision == "fp16")
    run = Run(args, data, model, optimizer, scaler)
    for epoch in range(run.epoch, args.epochs):
        run.start_epoch()
        total = torch.zeros((), device=args.device)
        for step, (x, y) in enumerate(batches(data, args, epoch)):
            lr = common.learning_rate(args, (epoch + step / run.steps) / args.epochs)
            optimizer.param_groups[0]["lr"] = lr
            # --- method ---
            loss = training_loss(model, x, y, args)
            # --- end of method ---
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            common.average(p.grad for p in model.parameters())
            scaler.step(optimizer)
            scaler.update()
            total += loss.detach()
            run.progress(epoch * run.steps + step + 1)
        run.end_epoch(lr, total / run.steps)
    run.finish()


if __name__ == "__main__":
    common.main(parse_args, train)
