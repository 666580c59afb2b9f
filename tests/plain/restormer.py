"""Restormer as commonly written: Zamir et al., CVPR 2022, in N x C x H x W throughout, with nothing saved."""
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn


class NormBody(nn.Module):
    def __init__(self, dim, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x):
        var = x.var(-1, keepdim=True, unbiased=False)
        if self.bias is None:
            return x / torch.sqrt(var + 1e-5) * self.weight
        return (x - x.mean(-1, keepdim=True)) / torch.sqrt(var + 1e-5) * self.weight + self.bias


class Norm(nn.Module):
    def __init__(self, dim, bias):
        super().__init__()
        self.body = NormBody(dim, bias)

    def forward(self, x):
        h, w = x.shape[-2:]
        return rearrange(self.body(rearrange(x, "b c h w -> b (h w) c")), "b (h w) c -> b c h w", h=h, w=w)


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv = nn.Conv2d(dim, dim * 3, 1, bias=False)
        self.qkv_dwconv = nn.Conv2d(dim * 3, dim * 3, 3, padding=1, groups=dim * 3, bias=False)
        self.project_out = nn.Conv2d(dim, dim, 1, bias=False)

    def forward(self, x):
        h, w = x.shape[-2:]
        q, k, v = self.qkv_dwconv(self.qkv(x)).chunk(3, dim=1)
        q, k, v = (rearrange(t, "b (head c) h w -> b head c (h w)", head=self.heads) for t in (q, k, v))
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        attention = ((q @ k.transpose(-2, -1)) * self.temperature).softmax(dim=-1)
        return self.project_out(rearrange(attention @ v, "b head c (h w) -> b (head c) h w", h=h, w=w))


class FeedForward(nn.Module):
    def __init__(self, dim, expansion):
        super().__init__()
        hidden = int(dim * expansion)
        self.project_in = nn.Conv2d(dim, hidden * 2, 1, bias=False)
        self.dwconv = nn.Conv2d(hidden * 2, hidden * 2, 3, padding=1, groups=hidden * 2, bias=False)
        self.project_out = nn.Conv2d(hidden, dim, 1, bias=False)

    def forward(self, x):
        a, b = self.dwconv(self.project_in(x)).chunk(2, dim=1)
        return self.project_out(F.gelu(a) * b)


class Block(nn.Module):
    def __init__(self, dim, heads, expansion, bias):
        super().__init__()
        self.norm1, self.attn = Norm(dim, bias), Attention(dim, heads)
        self.norm2, self.ffn = Norm(dim, bias), FeedForward(dim, expansion)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class Body(nn.Module):
    def __init__(self, dim, out, shuffle):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(dim, out, 3, padding=1, bias=False), shuffle)

    def forward(self, x):
        return self.body(x)


class Embed(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, 3, padding=1, bias=False)

    def forward(self, x):
        return self.proj(x)


class Restormer(nn.Module):
    """Sides must be multiples of 8."""

    def __init__(self, dim=48, blocks=(4, 6, 6, 8), refinement=4, heads=(1, 2, 4, 8), expansion=2.66, norm_bias=True, reduce_level1=False):
        super().__init__()
        d = [dim * 2**i for i in range(4)]
        last = d[0] if reduce_level1 else d[1]
        stage = lambda level, n, width: nn.Sequential(*[Block(width, heads[level], expansion, norm_bias) for _ in range(n)])
        down = lambda width: Body(width, width // 2, nn.PixelUnshuffle(2))
        up = lambda width: Body(width, width * 2, nn.PixelShuffle(2))
        self.patch_embed = Embed(dim)
        self.encoder_level1, self.down1_2 = stage(0, blocks[0], d[0]), down(d[0])
        self.encoder_level2, self.down2_3 = stage(1, blocks[1], d[1]), down(d[1])
        self.encoder_level3, self.down3_4 = stage(2, blocks[2], d[2]), down(d[2])
        self.latent = stage(3, blocks[3], d[3])
        self.up4_3, self.reduce_chan_level3 = up(d[3]), nn.Conv2d(d[3], d[2], 1, bias=False)
        self.decoder_level3 = stage(2, blocks[2], d[2])
        self.up3_2, self.reduce_chan_level2 = up(d[2]), nn.Conv2d(d[2], d[1], 1, bias=False)
        self.decoder_level2 = stage(1, blocks[1], d[1])
        self.up2_1 = up(d[1])
        self.reduce_chan_level1 = nn.Conv2d(d[1], d[0], 1, bias=False) if reduce_level1 else nn.Identity()
        self.decoder_level1, self.refinement = stage(0, blocks[0], last), stage(0, refinement, last)
        self.output = nn.Conv2d(last, 3, 3, padding=1, bias=False)

    def forward(self, x):
        e1 = self.encoder_level1(self.patch_embed(x))
        e2 = self.encoder_level2(self.down1_2(e1))
        e3 = self.encoder_level3(self.down2_3(e2))
        y = self.latent(self.down3_4(e3))
        y = self.decoder_level3(self.reduce_chan_level3(torch.cat([self.up4_3(y), e3], 1)))
        y = self.decoder_level2(self.reduce_chan_level2(torch.cat([self.up3_2(y), e2], 1)))
        y = self.decoder_level1(self.reduce_chan_level1(torch.cat([self.up2_1(y), e1], 1)))
        return self.output(self.refinement(y)) + x
