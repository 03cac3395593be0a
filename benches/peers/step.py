"""DBPNet and CPCR in plain PyTorch, written for comparison: defaults throughout.

Reads weights, a batch and frozen draws from a safetensors file, prints its losses on them with
dropout off, then the time and peak memory of training steps with everything on, as JSON.
Each objective is timed in a process of its own, so that its peak memory is its own.
"""
import argparse, json, math, resource, statistics, struct, subprocess, sys, time

import torch
import torch.nn as nn
import torch.nn.functional as F


def read(path):
    raw = open(path, "rb").read()
    (length,) = struct.unpack("<Q", raw[:8])
    kinds = {"F32": torch.float32, "I64": torch.int64, "U8": torch.uint8}
    out = {}
    for name, entry in json.loads(raw[8 : 8 + length]).items():
        if name == "__metadata__":
            continue
        begin, end = (8 + length + o for o in entry["data_offsets"])
        data = torch.frombuffer(bytearray(raw[begin:end]), dtype=kinds[entry["dtype"]])
        out[name] = data.reshape(entry["shape"])
    return out


class ConvBlock(nn.Module):
    def __init__(self, a, b, p):
        super().__init__()
        self.conv_conv = nn.Sequential(
            nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.LeakyReLU(), nn.Dropout(p),
            nn.Conv2d(b, b, 3, padding=1), nn.BatchNorm2d(b), nn.LeakyReLU())

    def forward(self, x):
        return self.conv_conv(x)


class Down(nn.Module):
    def __init__(self, a, b, p):
        super().__init__()
        self.maxpool_conv = nn.Sequential(nn.MaxPool2d(2), ConvBlock(a, b, p))

    def forward(self, x):
        return self.maxpool_conv(x)


class Up(nn.Module):
    def __init__(self, deep, skip, bilinear):
        super().__init__()
        self.bilinear = bilinear
        if bilinear:
            self.conv1x1 = nn.Conv2d(deep, skip, 1)
        else:
            self.up = nn.ConvTranspose2d(deep, skip, 2, stride=2)
        self.conv = ConvBlock(2 * skip, skip, 0.0)

    def forward(self, deep, skip):
        if self.bilinear:
            deep = F.interpolate(self.conv1x1(deep), scale_factor=2, mode="bilinear", align_corners=True)
        else:
            deep = self.up(deep)
        return self.conv(torch.cat([skip, deep], 1))


class Encoder(nn.Module):
    def __init__(self, inputs, w):
        super().__init__()
        p = [0.05, 0.1, 0.2, 0.3, 0.5]
        self.in_conv = ConvBlock(inputs, w[0], p[0])
        for i in range(1, 5):
            setattr(self, f"down{i}", Down(w[i - 1], w[i], p[i]))

    def forward(self, x):
        out = [self.in_conv(x)]
        for i in range(1, 5):
            out.append(getattr(self, f"down{i}")(out[-1]))
        return out


class Decoder(nn.Module):
    def __init__(self, w, classes, bilinear):
        super().__init__()
        for i in range(1, 5):
            setattr(self, f"up{i}", Up(w[5 - i], w[4 - i], bilinear))
        self.out_conv = nn.Conv2d(w[0], classes, 3, padding=1)
        for i in range(1, 5):
            setattr(self, f"out_conv_dp{i}", nn.Conv2d(w[i], classes, 3, padding=1))

    def forward(self, x, frozen):
        size = x[0].shape[2:]
        a = self.up1(x[4], x[3])
        b = self.up2(a, x[2])
        c = self.up3(b, x[1])
        d = self.up4(c, x[0])
        m = 0.8 if frozen is not None else torch.empty(1).uniform_(0.7, 0.9).item()
        mean = b.mean(1, keepdim=True)
        top = mean.flatten(1).max(1)[0].view(-1, 1, 1, 1)
        dropped = b * (mean < m * top).float()
        n = frozen if frozen is not None else torch.empty(c.shape[1:]).uniform_(-0.3, 0.3)
        noisy = c * n.unsqueeze(0) + c
        a = a if frozen is not None else F.dropout(a, 0.5)
        heads = [self.out_conv_dp1(noisy), self.out_conv_dp2(dropped), self.out_conv_dp3(a)]
        return [self.out_conv(d)] + [F.interpolate(h, size) for h in heads]


class DBPNet(nn.Module):
    def __init__(self, inputs, w, classes):
        super().__init__()
        self.encoder = Encoder(inputs, w)
        self.decoder1 = Decoder(w, classes, True)
        self.decoder2 = Decoder(w, classes, False)

    def forward(self, x, frozen=(None, None)):
        x = self.encoder(x)
        return self.decoder1(x, frozen[0]), self.decoder2(x, frozen[1])


def dice(logits, target):
    p = logits.softmax(1)
    g = F.one_hot(target, p.shape[1]).permute(0, 3, 1, 2).float()
    over = (0, 2, 3)
    score = (2 * (p * g).sum(over) + 1e-5) / ((p * p).sum(over) + (g * g).sum(over) + 1e-5)
    return (1 - score).mean()


def kd(a, b, t=10.0):
    loss = F.kl_div((a / t).log_softmax(1), (b.detach() / t).softmax(1), reduction="none")
    return t * t * loss.sum(1).mean()


def losses(d1, d2, target, full):
    n = target.shape[0]
    out = {"dice": dice(d1[0][:n], target) + dice(d2[0][:n], target)}
    out["total"] = out["dice"]
    if full:
        out["kd_main"] = kd(d1[0], d2[0]) + kd(d2[0], d1[0])
        q = (d1[0].softmax(1) + d2[0].softmax(1)) / 2
        out["entropy"] = -(q * torch.log(q + 1e-6)).sum(1).mean() / math.log(q.shape[1])
        out["kd_aux"] = sum(kd(a, b) + kd(b, a) for a, b in zip(d1[1:], d2[1:])) / 3
        extra = out["kd_main"] + out["entropy"] + out["kd_aux"]
        out["total"] = out["dice"] + 0.1 * extra
    return out


def network(state):
    weights = {k[2:]: v for k, v in state.items() if k.startswith("w.")}
    first = weights["encoder.in_conv.conv_conv.0.weight"]
    w = [first.shape[0]]
    w += [weights[f"encoder.down{i}.maxpool_conv.1.conv_conv.0.weight"].shape[0] for i in range(1, 5)]
    net = DBPNet(first.shape[1], w, weights["decoder1.out_conv.weight"].shape[0])
    net.load_state_dict(weights, strict=True)
    return net.train()


def check(state):
    net = network(state)
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        d1, d2 = net(state["x"], (state["noise.d1"], state["noise.d2"]))
        return {k: v.item() for k, v in losses(d1, d2, state["label"].long(), True).items()}


def measure(state, full, settle, steps):
    net = network(state)
    sgd = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    x, target = state["x"], state["label"].long()
    seconds = []
    for t in range(settle + steps):
        if t == settle:
            cpu = time.process_time()
        start = time.perf_counter()
        d1, d2 = net(x)
        loss = losses(d1, d2, target, full)["total"]
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        if t >= settle:
            seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    return {
        "who": "pytorch", "objective": "full" if full else "warm-up", "precision": "f32",
        "seconds_per_step": median, "seconds_best": min(seconds),
        "cpu_seconds_per_step": (time.process_time() - cpu) / steps,
        "images_per_second": x.shape[0] / median,
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("state")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--settle", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--part", choices=["check", "warm-up", "full"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.part:
        state = read(args.state)
        if args.part == "check":
            result = check(state)
        else:
            result = measure(state, args.part == "full", args.settle, args.steps)
        print(json.dumps(result))
        return
    parts = {}
    for part in ["check", "warm-up", "full"]:
        command = [sys.executable, *sys.argv, "--part", part]
        parts[part] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    print(json.dumps({"losses": parts["check"], "cases": [parts["warm-up"], parts["full"]]}))


main()
