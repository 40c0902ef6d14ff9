"""Fast AT (Wong et al., ICLR 2020), and what is compared with it: PGD-AT, GradAlign, Fast AT+.

Objective, the one of adversarial training (Madry et al. 2018), with f the logits:

    min_theta  max over the eps-ball of CE(f(x + delta), y)

PGD-AT climbs in many steps. Fast AT takes one, from a random point, and saves the others:

    delta <- U(-eps, eps)
    delta <- P(delta + alpha sign grad_delta CE(f(x + delta), y)), alpha = 1.25 eps
    theta <- theta - lr grad_theta CE(f(x + delta), y)

A single step may fail: the network learns to bend the loss so that the step misses its maximum, and
robustness falls to 0 within an epoch (catastrophic overfitting). Two remedies:

    GradAlign: add lambda (1 - cos(g(x), g(x + eta))), g = grad_x CE, eta ~ U(-eps, eps)
    Fast AT+: where held-out PGD accuracy collapses, train by PGD-10 until it is back

    python fast_at.py --eps 8                          Fast AT
    python fast_at.py --eps 8 --init zero              plain FGSM
    python fast_at.py --eps 8 --steps 2                PGD-2-AT; --steps 10: PGD-AT
    python fast_at.py --eps 8 --grad-align 0.2         GradAlign; 2.0 at eps 16
    python fast_at.py --eps 8 --recover                Fast AT+
    python fast_at.py --steps 0                        standard training

The other scripts say how they differ from this one.
"""

import argparse

import torch
import torch.nn.functional as F

import common
from bookkeeping import Run
from data import batches, load_data


def parse_args(argv=None):
    parser = common.TrainingParser(__file__, __doc__, epochs=100, attack_bn="train")
    add = parser.add_argument_group("options of Fast AT").add_argument
    add("--steps", type=common.number(int, 0), default=1, help="of the attack; 0: no attack")
    add("--alpha", type=common.pixels, metavar="PIXELS",
        help="length of a step; None: 1.25 eps for one step, eps/2 for two, eps/4 for more")
    add("--init", choices=["uniform", "zero"], default="uniform", help="where the attack starts")
    add("--grad-align", type=common.number(float, 0), default=0.0, metavar="LAMBDA",
        help="weight of GradAlign (Andriushchenko & Flammarion 2020)")
    add("--recover", action="store_true", help="Fast AT+ (Li et al. 2020)")
    args = parser.parse_args(argv)
    args.alpha = args.alpha or {1: 1.25, 2: 0.5}.get(args.steps, 0.25) * args.eps
    if args.grad_align and args.compile:
        common.say("GradAlign differentiates twice, which torch.compile cannot: running eager")
        args.compile = False
    return args


def fast_at(model, x, y, eps, alpha, steps=1, init="uniform", norm="linf", bn="train"):
    """Ascent on cross-entropy: x N x 3 x H x W in [0, 1] -> x_adv within eps of it, in [0, 1].

    eps and alpha in units of [0, 1]; without steps, x itself. Parameters, their gradients and
    BatchNorm statistics stay as they are. ValueError for bad x.
    """
    x_adv = common.random_start(x, eps, norm) if steps and init == "uniform" else x
    with common.attacking(model, x, bn):
        for _ in range(steps):
            x_adv = x_adv.detach().requires_grad_()
            gradient, = torch.autograd.grad(common.cross_entropy(model(x_adv), y), x_adv)
            x_adv = common.step(x_adv, gradient, x, eps, alpha, norm)
    return x_adv


def misalignment(model, x, y, eps, norm="linf", bn="train"):
    """GradAlign's 1 - cos(g(x), g(x + eta)), in [0, 2], the mean over the batch; a scalar tensor.

    Only the second gradient is differentiated further: it is bent towards the first.
    """
    with common.attacking(model, x, bn):
        clean, noisy = x.clone().requires_grad_(), common.random_start(x, eps, norm)
        target, = torch.autograd.grad(common.cross_entropy(model(clean), y), clean)
        noisy.requires_grad_()
        rise = common.cross_entropy(model(noisy), y)
        gradient, = torch.autograd.grad(rise, noisy, create_graph=True)
    return 1 - F.cosine_similarity(target.flatten(1), gradient.flatten(1), eps=1e-12).mean()


def has_collapsed(model, data, run):
    """Is PGD-10 accuracy on a batch of held-out pictures 10 points below that of the best epoch, or
    half of it where that is little?"""
    x, y = (part[:128] for part in data.val)
    best = max((row["val_pgd"] for row in run.rows), default=0)
    return common.accuracy(model, x, y, run.pgd(10))[1] < max(best - 10, best / 2)


def training_loss(model, x, y, args):
    """Cross-entropy under attack, the mean over the batch; a scalar tensor."""
    x_adv = fast_at(model, x, y, args.eps, args.alpha, args.steps, args.init, args.norm,
                    args.attack_bn)
    loss = F.cross_entropy(model(x_adv), y)
    if args.grad_align:
        bend = misalignment(model, x, y, args.eps, args.norm, args.attack_bn)
        loss = loss + args.grad_align * bend
    return loss


def train(args):
    data = load_data(args)
    model = common.prepare_model(args, data)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9,
                                weight_decay=args.weight_decay, fused=True)
    scaler = torch.amp.GradScaler(args.device.split(":")[0], enabled=args.precision == "fp16")
    run = Run(args, data, model, optimizer, scaler)
    # --- method ---
    strong = argparse.Namespace(**vars(args) | dict(steps=10, alpha=args.eps / 4))
    # --- end of method ---
    for epoch in range(run.epoch, args.epochs):
        run.start_epoch()
        total = torch.zeros((), device=args.device)
        for step, (x, y) in enumerate(batches(data, args, epoch)):
            lr = common.learning_rate(args, (epoch + step / run.steps) / args.epochs)
            optimizer.param_groups[0]["lr"] = lr
            # --- method ---
            if step % (run.steps // 10 + 1) == 0:  # about ten times an epoch
                recover = args.recover and has_collapsed(model, data, run)
            loss = training_loss(model, x, y, strong if recover else args)
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
