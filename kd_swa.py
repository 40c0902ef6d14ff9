"""KD-SWA: learned smoothing against robust overfitting (Chen et al., ICLR 2021).

Objective (eq. 1): adversarial training, with two teachers of the same architecture, trained before
on the same pictures: one robust, one standard. They smooth the labels, each in its own way:

    min_theta  (1 - l1 - l2) CE(f(x + delta), y) + l1 KD(f(x + delta), f_robust(x + delta))
                                                 + l2 KD(f(x + delta), f_standard(x + delta))
    KD(p, t) = -T^2 sum_j s(t / T)_j log s(p / T)_j, T = 2

And the weights are smoothed (eq. 2): from the first decay of the learning rate, once an epoch,

    theta_SWA <- (n theta_SWA + theta) / (n + 1), n: how many it holds already

The averaged network gets BatchNorm statistics of its own, from one pass over the training pictures.
Its checkpoints are swa_best.pt and swa_last.pt.

    python kd_swa.py --eps 8                                Table 1: CIFAR-10, ResNet-18
    python kd_swa.py --eps 8 --kd none --no-swa             its baseline, PGD-AT
    python kd_swa.py --eps 8 --attack trades                Table 2; --norm l2 --eps 128: L2
    python kd_swa.py --eps 8 --iswa                         Table A10

Without --std-teacher and --adv-teacher both are trained first, by fast_at.py, and stay in the run
folder. Compared with fast_at.py: a PGD attack, labels smoothed by teachers, and averaged weights.
"""

import torch
import torch.nn.functional as F

import common
import fast_at
from bookkeeping import Run, check_classes, load_model
from data import batches, load_data
from trades import trades


def parse_args(argv=None):
    parser = common.TrainingParser(__file__, __doc__, epochs=200, milestones=[0.25, 0.75],
                                   attack_bn="train")
    share = common.number(float, 0, 1)
    add = parser.add_argument_group("options of KD-SWA").add_argument
    add("--attack", choices=["pgd", "fgsm", "trades"], default="pgd", help="the base method")
    add("--steps", type=common.number(int, 1), help="of the attack; None: 10, for fgsm 1")
    add("--alpha", type=common.pixels, metavar="PIXELS",
        help="length of a step; None: eps/4, for fgsm 7/8 eps, for l2 15/128 eps")
    add("--beta", type=common.number(float, 0), default=6.0, help="weight of KL in trades")
    add("--kd", choices=["both", "std", "adv", "none"], default="both", help="which teachers")
    add("--lambda1", type=share, default=0.5, help="weight of the robust teacher")
    add("--lambda2", type=share, default=0.25, help="weight of the standard teacher")
    add("--temperature", type=common.number(float, 1e-3), default=2.0, help="T")
    add("--adv-teacher", metavar="CKPT", help="robust teacher; None: train it first, by Fast AT")
    add("--std-teacher", metavar="CKPT", help="standard teacher; None: train it first")
    add("--teacher-epochs", type=common.number(int, 1), default=30,
        help="of the teachers that are trained first, with a cyclic learning rate")
    add("--no-swa", action="store_true", help="no averaged weights")
    add("--iswa", action="store_true", help="training goes on from the average (Table A10)")
    add("--label-smoothing", type=share, default=0.0, help="in cross-entropy (Table 6)")
    add("--tf-kd", action="store_true", help="a virtual teacher, 99 %% sure of the label, in place "
        "of both teachers, with their joint weight (Table 6)")
    args = parser.parse_args(argv)
    args.steps = args.steps or (1 if args.attack == "fgsm" else 10)
    part = 15 / 128 if args.norm == "l2" else 7 / 8 if args.attack == "fgsm" else 1 / 4
    args.alpha = args.alpha or part * args.eps
    if args.lambda1 + args.lambda2 > 1:
        parser.error("arguments --lambda1 and --lambda2: their sum is above 1")
    if args.iswa and args.no_swa:
        parser.error("argument --iswa: it continues from the average that --no-swa leaves out")
    return args


def attack(model, x, y, args):
    """The base method's x_adv: N x 3 x H x W, within eps of x and in [0, 1]. Parameters, their
    gradients and BatchNorm statistics stay as they are. ValueError for bad x."""
    if args.attack == "trades":
        return trades(model, x, args.eps, args.alpha, args.steps, "normal", args.norm,
                      args.attack_bn)
    return fast_at.fast_at(model, x, y, args.eps, args.alpha, args.steps, "uniform", args.norm,
                           args.attack_bn)


def kd(logits, target, temperature):
    """KD of eq. 1, the mean over the batch: logits and the teacher's, N x C; a scalar tensor."""
    soft = F.softmax(target / temperature, dim=1)
    return temperature ** 2 * F.cross_entropy(logits / temperature, soft)


def training_loss(model, x, y, args, teachers):
    """Eq. 1, with TRADES' loss in place of cross-entropy for that attack; a scalar tensor.

    teachers: pairs of a weight and f(x_adv, y) -> logits N x C.
    """
    x_adv = attack(model, x, y, args)
    if args.attack == "trades":
        logits, logits_adv = model(x), model(x_adv)
        divergence = F.kl_div(F.log_softmax(logits_adv, 1), F.log_softmax(logits, 1),
                              log_target=True, reduction="batchmean")
    else:
        logits = logits_adv = model(x_adv)
        divergence = 0
    loss = F.cross_entropy(logits, y, label_smoothing=args.label_smoothing)
    loss = (1 - sum(weight for weight, _ in teachers)) * (loss + args.beta * divergence)
    for weight, teacher in teachers:
        with torch.no_grad():
            target = teacher(x_adv, y)
        loss = loss + weight * kd(logits_adv, target, args.temperature)
    return loss


def find_teachers(args, data, run):
    """The teachers that args ask for, as training_loss takes them; trained first where no
    checkpoint is given. UserError for one that does not fit."""
    if args.tf_kd:
        n = len(data.classes)
        sure = torch.full((n, n), 0.01 / (n - 1), device=args.device).fill_diagonal_(0.99).log()
        return [(args.lambda1 + args.lambda2, lambda x_adv, y: sure[y])]
    found = []
    for kind, weight, path in (("adv", args.lambda1, args.adv_teacher),
                               ("std", args.lambda2, args.std_teacher)):
        if args.kd in ("both", kind):
            path = path or train_teacher(args, kind, run.folder / f"{kind}-teacher")
            teacher, settings = load_model(path, args.device, args.arch, args.width,
                                           args.activation, data)
            check_classes(path, settings, data)
            teacher.eval().requires_grad_(False).compute_in(run.model.dtype)
            found.append((weight, lambda x_adv, y, teacher=teacher: teacher(x_adv)))
    return found


def train_teacher(args, kind, folder):
    """Trains a teacher in `folder`, or goes on with it there; returns its checkpoint."""
    checkpoint = folder / ("best.pt" if kind == "adv" else "last.pt")  # a standard one has no best
    if not (folder / "result.json").exists():
        common.say(f"\nfirst the {kind} teacher, in {folder}")
        options = fast_at.parse_args(["--steps", "1" if kind == "adv" else "0"])
        for name in ("dataset data_dir arch width activation eps norm batch_size weight_decay "
                     "val_size train_size label_noise seed device precision compile image_size "
                     "stream on_bad_file").split():
            setattr(options, name, getattr(args, name))
        options.alpha, options.epochs = 1.25 * args.eps, args.teacher_epochs
        options.lr_schedule, options.out = "cyclic", str(folder)
        options.resume = (folder / "args.json").exists()
        fast_at.train(options)
        common.say("")
    return checkpoint


def average_weights(averaged, model, n, args, pictures):
    """Eq. 2: averages `model` into `averaged`, which holds n networks already, and recomputes its
    BatchNorm statistics on batches (x, y) of training pictures. With --iswa, model becomes it."""
    with torch.no_grad():
        for mean, weight in zip(averaged.parameters(), model.parameters()):
            mean.lerp_(weight, 1 / (n + 1))
    torch.optim.swa_utils.update_bn(pictures, averaged)
    if args.iswa:
        model.load_state_dict(averaged.state_dict())


def train(args):
    data = load_data(args)
    model = common.prepare_model(args, data)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9,
                                weight_decay=args.weight_decay, fused=True)
    scaler = torch.amp.GradScaler(args.device.split(":")[0], enabled=args.precision == "fp16")
    run = Run(args, data, model, optimizer, scaler)
    # --- method ---
    teachers = find_teachers(args, data, run)
    decay = args.milestones[0] if args.lr_schedule == "piecewise" else 0.5
    # --- end of method ---
    for epoch in range(run.epoch, args.epochs):
        run.start_epoch()
        total = torch.zeros((), device=args.device)
        for step, (x, y) in enumerate(batches(data, args, epoch)):
            lr = common.learning_rate(args, (epoch + step / run.steps) / args.epochs)
            optimizer.param_groups[0]["lr"] = lr
            # --- method ---
            loss = training_loss(model, x, y, args, teachers)
            # --- end of method ---
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            common.average(p.grad for p in model.parameters())
            scaler.step(optimizer)
            scaler.update()
            total += loss.detach()
            run.progress(epoch * run.steps + step + 1)
        # --- method ---
        if not args.no_swa and epoch >= decay * args.epochs:
            n = sum("swa_val_pgd" in row for row in run.rows)
            average_weights(run.beside("swa_"), model, n, args, batches(data, args, epoch))
        # --- end of method ---
        run.end_epoch(lr, total / run.steps)
    run.finish()


if __name__ == "__main__":
    common.main(parse_args, train)
