"""DarkIR (Feijoo et al., CVPR 2025) as commonly written, short: the oracle of the tests and what the bench compares with."""
import torch
from torch import nn

from tests.plain.nafnet import Norm


class Branch(nn.Module):
    def __init__(self, c, dilation):
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(c, c, 3, padding=dilation, dilation=dilation, groups=c))

    def forward(self, x):
        return self.branch(x)


class Frequency(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.process1 = nn.Sequential(nn.Conv2d(c, 2 * c, 1), nn.LeakyReLU(0.1), nn.Conv2d(2 * c, c, 1))

    def forward(self, x):
        spectrum = torch.fft.rfft2(x)
        amplitude, phase = self.process1(spectrum.abs()), spectrum.angle()
        return torch.fft.irfft2(torch.complex(amplitude * phase.cos(), amplitude * phase.sin()), s=x.shape[-2:])


def gate(x):
    a, b = x.chunk(2, dim=1)
    return a * b


class Block(nn.Module):
    def __init__(self, c, dilations, extra):
        super().__init__()
        self.gamma, self.beta = (nn.Parameter(torch.zeros(1, c, 1, 1)) for _ in range(2))
        self.conv1, self.extra_conv, self.conv3 = nn.Conv2d(c, 2 * c, 1), nn.Conv2d(extra, extra, 3, padding=1, groups=c), nn.Conv2d(c, c, 1)
        self.branches = nn.ModuleList([Branch(2 * c, d) for d in dilations])
        self.sca = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(c, c, 1))
        self.norm1, self.norm2 = Norm(c), Norm(c)

    def attend(self, x):
        z = gate(sum(branch(x) for branch in self.branches))
        return self.conv3(self.sca(z) * z) * self.beta


class EBlock(Block):
    def __init__(self, c):
        super().__init__(c, (1,), extra=c)
        self.freq = Frequency(c)

    def forward(self, x):
        x = x + self.attend(self.conv1(self.extra_conv(self.norm1(x))))
        return x + x * self.freq(self.norm2(x)) * self.gamma


class DBlock(Block):
    def __init__(self, c):
        super().__init__(c, (1, 4, 9), extra=2 * c)
        self.conv4, self.conv5 = nn.Conv2d(c, 2 * c, 1), nn.Conv2d(c, c, 1)

    def forward(self, x):
        x = x + self.attend(self.extra_conv(self.conv1(self.norm1(x))))
        return x + self.conv5(gate(self.conv4(self.norm2(x)))) * self.gamma


class Blocks(nn.Module):
    def __init__(self, block, c, n):
        super().__init__()
        self.modules_list = nn.Sequential(*[block(c) for _ in range(n)])

    def forward(self, x):
        return self.modules_list(x)


class DarkIR(nn.Module):
    def __init__(self, width=32, encoder=(1, 2, 3), middle=(2, 2), decoder=(3, 1, 1)):
        super().__init__()
        c = [width * 2**i for i in range(4)]
        self.intro, self.ending = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 3, 3, padding=1)
        self.encoders = nn.ModuleList([Blocks(EBlock, c[i], encoder[i]) for i in range(3)])
        self.downs = nn.ModuleList([nn.Conv2d(c[i], c[i + 1], 2, 2) for i in range(3)])
        self.middle_blks_enc, self.middle_blks_dec = Blocks(EBlock, c[3], middle[0]), Blocks(DBlock, c[3], middle[1])
        self.ups = nn.ModuleList([nn.Sequential(nn.Conv2d(c[3 - i], 2 * c[3 - i], 1, bias=False), nn.PixelShuffle(2)) for i in range(3)])
        self.decoders = nn.ModuleList([Blocks(DBlock, c[2 - i], decoder[i]) for i in range(3)])
        self.side_out = nn.Conv2d(c[3], 3, 3, padding=1)

    def forward(self, photo):
        x, skips = self.intro(photo), []
        for encoder, down in zip(self.encoders, self.downs):
            skips.append(encoder(x))
            x = down(skips[-1])
        x = self.middle_blks_enc(x)
        x = self.middle_blks_dec(x) + x
        for up, decoder in zip(self.ups, self.decoders):
            x = decoder(up(x) + skips.pop())
        return self.ending(x) + photo
