"""NAFNet as it is commonly written, in NCHW memory (Chen et al., Simple Baselines for Image Restoration, ECCV 2022); sides are multiples of 16."""
import torch
from torch import nn


class Normalise(torch.autograd.Function):
    """LayerNorm over channels with its gradient written out, so that no more than needed is kept."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        centred = x - x.mean(1, keepdim=True)
        variance = centred.pow(2).mean(1, keepdim=True)
        y = centred / (variance + eps).sqrt()
        ctx.eps = eps
        ctx.save_for_backward(y, variance, weight)
        return weight.view(1, -1, 1, 1) * y + bias.view(1, -1, 1, 1)

    @staticmethod
    def backward(ctx, grad):
        y, variance, weight = ctx.saved_tensors
        g = grad * weight.view(1, -1, 1, 1)
        of_x = (g - y * (g * y).mean(1, keepdim=True) - g.mean(1, keepdim=True)) / (variance + ctx.eps).sqrt()
        return of_x, (grad * y).sum((0, 2, 3)), grad.sum((0, 2, 3)), None


class Norm(nn.Module):
    def __init__(self, c, eps=1e-6):
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.ones(c)), nn.Parameter(torch.zeros(c)), eps

    def forward(self, x):
        return Normalise.apply(x, self.weight, self.bias, self.eps)


def gate(x):
    a, b = x.chunk(2, dim=1)
    return a * b


class Block(nn.Module):
    """`expansion` 4 with `attention_last` is the study's."""

    def __init__(self, c, expansion=2, attention_last=False):
        super().__init__()
        wide = c * expansion
        d = c if attention_last else wide // 2
        self.attention_last = attention_last
        self.conv1 = nn.Conv2d(c, wide, 1)
        self.conv2 = nn.Conv2d(wide, wide, 3, padding=1, groups=wide)
        self.conv3 = nn.Conv2d(wide // 2, c, 1)
        self.sca = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(d, d, 1))
        self.conv4 = nn.Conv2d(c, wide, 1)
        self.conv5 = nn.Conv2d(wide // 2, c, 1)
        self.norm1, self.norm2 = Norm(c), Norm(c)
        self.beta, self.gamma = nn.Parameter(torch.zeros(1, c, 1, 1)), nn.Parameter(torch.zeros(1, c, 1, 1))

    def forward(self, x):
        y = gate(self.conv2(self.conv1(self.norm1(x))))
        if self.attention_last:
            y = self.conv3(y)
            y = y * self.sca(y)
        else:
            y = self.conv3(y * self.sca(y))
        x = x + y * self.beta
        return x + self.conv5(gate(self.conv4(self.norm2(x)))) * self.gamma


class NAFNet(nn.Module):
    def __init__(self, width=32, encoder=(2, 2, 4, 8), middle=12, decoder=(2, 2, 2, 2), **block):
        super().__init__()
        blocks = lambda n, c: nn.Sequential(*[Block(c, **block) for _ in range(n)])
        self.intro, self.ending = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 3, 3, padding=1)
        self.encoders, self.downs, self.ups, self.decoders = (nn.ModuleList() for _ in range(4))
        c = width
        for n in encoder:
            self.encoders.append(blocks(n, c))
            self.downs.append(nn.Conv2d(c, 2 * c, 2, 2))
            c *= 2
        self.middle_blks = blocks(middle, c)
        for n in decoder:
            self.ups.append(nn.Sequential(nn.Conv2d(c, 2 * c, 1, bias=False), nn.PixelShuffle(2)))
            c //= 2
            self.decoders.append(blocks(n, c))

    def forward(self, photo):
        x, skips = self.intro(photo), []
        for encoder, down in zip(self.encoders, self.downs):
            x = encoder(x)
            skips.append(x)
            x = down(x)
        x = self.middle_blks(x)
        for decoder, up, skip in zip(self.decoders, self.ups, skips[::-1]):
            x = decoder(up(x) + skip)
        return self.ending(x) + photo
