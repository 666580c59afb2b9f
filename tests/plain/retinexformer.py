"""RetinexFormer (Cai et al., ICCV 2023) as commonly written, short: the oracle of the tests and what the bench compares with."""
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn


class Estimator(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv1, self.depth_conv, self.conv2 = nn.Conv2d(4, c, 1), nn.Conv2d(c, c, 5, padding=2, groups=4), nn.Conv2d(c, 3, 1)

    def forward(self, photo):
        features = self.depth_conv(self.conv1(torch.cat([photo, photo.mean(1, keepdim=True)], 1)))
        return features, self.conv2(features)


class Attention(nn.Module):
    def __init__(self, c, heads):
        super().__init__()
        self.heads, self.rescale = heads, nn.Parameter(torch.ones(heads, 1, 1))
        self.to_q, self.to_k, self.to_v = (nn.Linear(c, c, bias=False) for _ in range(3))
        self.proj = nn.Linear(c, c)
        self.pos_emb = nn.Sequential(nn.Conv2d(c, c, 3, padding=1, groups=c, bias=False), nn.GELU(), nn.Conv2d(c, c, 3, padding=1, groups=c, bias=False))

    def forward(self, x, light):
        n, h, w, c = x.shape
        split = lambda t: rearrange(t, "n h w (head d) -> n head d (h w)", head=self.heads)
        q, k, v = split(self.to_q(x)), split(self.to_k(x)), self.to_v(x)
        attention = (F.normalize(k, dim=-1) @ F.normalize(q, dim=-1).transpose(-2, -1) * self.rescale).softmax(-1)
        out = rearrange(attention @ split(v * light), "n head d (h w) -> n h w (head d)", h=h)
        return self.proj(out) + self.pos_emb(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class FeedForward(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm, self.fn = nn.LayerNorm(c), nn.Module()
        self.fn.net = nn.Sequential(nn.Conv2d(c, 4 * c, 1, bias=False), nn.GELU(), nn.Conv2d(4 * c, 4 * c, 3, padding=1, groups=4 * c, bias=False),
                                    nn.GELU(), nn.Conv2d(4 * c, c, 1, bias=False))

    def forward(self, x):
        return self.fn.net(self.norm(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Blocks(nn.Module):
    def __init__(self, c, heads, n):
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleList([Attention(c, heads), FeedForward(c)]) for _ in range(n)])

    def forward(self, x, light):
        x, light = x.permute(0, 2, 3, 1), light.permute(0, 2, 3, 1)
        for attention, feed_forward in self.blocks:
            x = x + attention(x, light)
            x = x + feed_forward(x)
        return x.permute(0, 3, 1, 2)


class Denoiser(nn.Module):
    def __init__(self, c, blocks):
        super().__init__()
        half = lambda m: nn.Conv2d(m * c, 2 * m * c, 4, stride=2, padding=1, bias=False)
        self.embedding, self.mapping = nn.Conv2d(3, c, 3, padding=1, bias=False), nn.Conv2d(c, 3, 3, padding=1, bias=False)
        self.encoder_layers = nn.ModuleList([nn.ModuleList([Blocks(m * c, m, n), half(m), half(m)]) for m, n in zip((1, 2), blocks)])
        self.bottleneck = Blocks(4 * c, 4, blocks[2])
        self.decoder_layers = nn.ModuleList([nn.ModuleList([nn.ConvTranspose2d(2 * m * c, m * c, 2, stride=2), nn.Conv2d(2 * m * c, m * c, 1, bias=False),
                                                            Blocks(m * c, m, n)]) for m, n in zip((2, 1), blocks[1::-1])])

    def forward(self, photo, light):
        x, skips = self.embedding(photo), []
        for blocks, down, down_light in self.encoder_layers:
            x = blocks(x, light)
            skips.append((x, light))
            x, light = down(x), down_light(light)
        x = self.bottleneck(x, light)
        for up, fuse, blocks in self.decoder_layers:
            skip, light = skips.pop()
            x = blocks(fuse(torch.cat([up(x), skip], 1)), light)
        return self.mapping(x) + photo


class Stage(nn.Module):
    def __init__(self, c, blocks):
        super().__init__()
        self.estimator, self.denoiser = Estimator(c), Denoiser(c, blocks)

    def forward(self, photo):
        features, light = self.estimator(photo)
        return self.denoiser(photo * light + photo, features)


class RetinexFormer(nn.Module):
    def __init__(self, n_feat=40, stage=1, num_blocks=(1, 2, 2)):
        super().__init__()
        self.body = nn.Sequential(*[Stage(n_feat, num_blocks) for _ in range(stage)])

    def forward(self, photo):
        return self.body(photo)
