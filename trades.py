"""TRADES (Zhang et al., ICML 2019) and Fast TRADES, its form with one or two attack steps.

Objective (eq. 1.2 of the Backward Smoothing paper), with f the logits and s the softmax:

    min_theta  CE(f(x), y) + beta max over the eps-ball of KL(s(f(x)) || s(f(x + delta)))

The first term asks for accuracy, the second that the attack changes no output. The attack needs no
label: it climbs KL, whose gradient is 0 at delta = 0, so it starts beside it:

    delta <- 0.001 N(0, 1)                  TRADES, 10 steps of eps/4
    delta <- U(-eps, eps)                   Fast TRADES (4.2), 1 or 2 steps of 0.75 eps
    repeat: delta <- P(delta + alpha sign grad_delta KL(s(f(x)) || s(f(x + delta))))
    theta <- theta - lr grad_theta [CE(f(x), y) + beta KL(s(f(x)) || s(f(x + delta)))]

    python trades.py --eps 8                                TRADES
    python trades.py --eps 8 --steps 1 --init uniform       Fast TRADES; --steps 2: 2-step

Compared with fast_at.py: the attack climbs KL instead of cross-entropy, with BatchNorm in eval
mode, and the loss keeps the clean pictures.
"""

import torch
import torch.nn.functional as F

import common
from bookkeeping import Run
from data import batches, load_data


def parse_args(argv=None):
    parser = common.TrainingParser(__file__, __doc__, epochs=100, attack_bn="eval")
    add = parser.add_argument_group("options of TRADES").add_argument
    add("--steps", type=common.number(int, 1), default=10, help="of the attack")
    add("--alpha", type=common.pixels, metavar="PIXELS",
        help="length of a step; None: 0.75 eps for one or two steps, eps/4 for more")
    add("--init", choices=["normal", "uniform"], default="normal", help="where the attack starts")
    add("--beta", type=common.number(float, 0), default=6.0, help="weight of KL")
    args = parser.parse_args(argv)
    args.alpha = args.alpha or (0.75 if args.steps <= 2 else 0.25) * args.eps
    return args


def kl(logits, target):
    """KL(target || s(logits)), summed over the batch; target and logits N x C, target sums to 1."""
    return F.kl_div(F.log_softmax(logits, dim=1), target, reduction="sum")


def trades(model, x, eps, alpha, steps=10, init="normal", norm="linf", bn="eval"):
    """Ascent on KL: x N x 3 x H x W in [0, 1] -> x_adv within eps of it, in [0, 1].

    eps and alpha in units of [0, 1]. Parameters, their gradients and BatchNorm statistics stay as
    they are. ValueError for bad x.
    """
    with common.attacking(model, x, bn):
        with torch.no_grad():
            target = F.softmax(model(x), dim=1)
        x_adv = x + 0.001 * torch.randn_like(x)
        if init == "uniform":
            x_adv = common.random_start(x, eps, norm)
        for _ in range(steps):
            x_adv.requires_grad_()
            gradient, = torch.autograd.grad(kl(model(x_adv), target), x_adv)
            x_adv = common.step(x_adv, gradient, x, eps, alpha, norm)
    return x_adv


def training_loss(model, x, y, args):
    """CE + beta KL, both means over the batch; a scalar tensor."""
    x_adv = trades(model, x, args.eps, args.alpha, args.steps, args.init, args.norm,
                   args.attack_bn)
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
