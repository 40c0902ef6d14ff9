"""TRADES (Zhang et al., ICML 2019) and Fast TRADES, its form with one or two attack steps.

One term of the loss asks for accuracy, the other for the same output on adversarial images; f are
the logits, s is the softmax, and P projects onto the eps-ball and [0, 1]:

    min_theta  CE(f(x), y) + beta max over the eps-ball of KL(s(f(x)) || s(f(x + delta)))

The attack needs no labels: it ascends KL, whose gradient is 0 at delta = 0, so it starts nearby:

    delta <- 0.001 N(0, 1)                  TRADES, 10 steps of eps/4
    delta <- U(-eps, eps)                   Fast TRADES, 1 or 2 steps of 0.75 eps
    repeat: delta <- P(delta + alpha sign grad_delta KL(s(f(x)) || s(f(x + delta))))
    theta <- theta - lr grad_theta [CE(f(x), y) + beta KL(s(f(x)) || s(f(x + delta)))]

    python trades.py --eps 8                                TRADES
    python trades.py --eps 8 --steps 1 --init uniform       Fast TRADES; --steps 2: 2-step

Compared with fast_at.py: the attack ascends KL instead of cross-entropy, with BatchNorm in eval
mode, and the loss includes the clean images.
"""

import torch
import torch.nn.functional as F

import common


def parse_args(argv=None):
    parser = common.training_parser(__file__, __doc__, epochs=100, attack_bn="eval")
    add = parser.add_argument_group("options of TRADES").add_argument
    add("--steps", type=common.number(int, 1), default=10, help="attack steps")
    add("--alpha", type=common.over_255, help="step size, in units of 1/255; None: 0.75 eps for "
        "one or two steps, eps/4 for more")
    add("--init", choices=["normal", "uniform"], default="normal", help="where the attack starts")
    add("--beta", type=common.number(float, 0), default=6.0, help="weight of KL")
    args = common.parse(parser, argv)
    if args.alpha is None:
        args.alpha = (0.75 if args.steps <= 2 else 0.25) * args.eps
    return args


def kl(logits, target):
    """KL(target || s(logits)), summed over the batch: logits N x C, target N x C probabilities."""
    return F.kl_div(F.log_softmax(logits, dim=1), target, reduction="sum")


def trades(model, x, eps, alpha, steps=10, init="normal", norm="linf", bn="eval"):
    """`steps` steps of gradient ascent on KL, of size alpha. Returns x_adv in [0, 1], within eps of
    x. In the attack the clean output is a constant; in the loss it is not."""
    with common.attacking(model, x, bn):  # leaves BatchNorm's running statistics alone
        with torch.no_grad():
            target = F.softmax(model(x), dim=1)
        x_adv = x.detach() + 0.001 * torch.randn_like(x)
        if init == "uniform":
            x_adv = common.random_start(x, eps, norm)
        for _ in range(steps):
            x_adv.requires_grad_()
            loss = kl(model(x_adv), target)  # summed, as the gradient of a mean underflows in fp16
            gradient, = torch.autograd.grad(loss, x_adv)
            x_adv = common.step(x_adv, gradient, x, eps, alpha, norm)
    return x_adv


def trades_loss(model, x, x_adv, y, beta):
    """CE(f(x), y) + beta KL(s(f(x)) || s(f(x_adv))), averaged over the batch. The gradient flows
    through both outputs; log_target keeps it finite where a probability is rounded to 0."""
    logits, logits_adv = model(x), model(x_adv)
    divergence = F.kl_div(F.log_softmax(logits_adv, dim=1), F.log_softmax(logits, dim=1),
                          log_target=True, reduction="batchmean")
    return F.cross_entropy(logits, y) + beta * divergence


def train(args):
    data = common.load_data(args)
    model = common.prepare_model(args, data)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9,
                                weight_decay=args.weight_decay, fused=True)   # one kernel for all
    # fp16 rounds tiny gradients to 0, so the loss is scaled up; in fp32 and bf16 it is not.
    scaler = torch.amp.GradScaler(args.device, enabled=args.precision == "fp16")
    run = common.Run(args, data, model, optimizer, scaler)
    for epoch in range(run.epoch, args.epochs):
        run.start_epoch()
        total = torch.zeros((), device=args.device)
        for i, (x, y) in enumerate(common.batches(data, args, epoch)):
            lr = common.learning_rate(args, epoch + i / run.steps)
            optimizer.param_groups[0]["lr"] = lr
            # --- method ---
            x_adv = trades(model, x, args.eps, args.alpha, args.steps, args.init, args.norm,
                           args.attack_bn)
            loss = trades_loss(model, x, x_adv, y, args.beta)
            # --- end of method ---
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            common.average(p.grad for p in model.parameters())  # mean over torchrun's processes
            scaler.step(optimizer)
            scaler.update()
            total += loss.detach()  # not loss.item(), which would wait for the GPU
        run.end_epoch(lr, total / run.steps)
    run.finish()


if __name__ == "__main__":
    train(parse_args())
