"""Reduced sizes of every architecture, and the rule that fills a model with the weights of its reference output."""
import json
import zlib
from pathlib import Path

import numpy as np
import torch

from autohdr.losses.pixel import l1
from autohdr.models.zoo import create_model

REFERENCE = Path(__file__).parent / "reference"
# reduced sizes of each architecture, so that every test takes a moment
SMALL = {
    "hdrnet": dict(width=8),
    "look": dict(hidden=16),
    "color_refiner": dict(base="hdrnet", base_config=dict(width=8, small=64), width=8, depth=1),
    "restormer": dict(dim=8, blocks=(1, 1, 1, 1), refinement=1),
    "restormer_study": dict(dim=8, blocks=(1, 1, 1, 1), refinement=1),
    "controlnet_restormer": dict(base_config=dict(dim=8, blocks=(1, 1, 1, 1), refinement=1, norm_bias=False)),
    "nafnet": dict(width=8, encoder=(1, 1), middle=1, decoder=(1, 1)),
    "nafnet_64": dict(width=8, encoder=(1, 1), middle=1, decoder=(1, 1)),
    "nafnet_study": dict(width=8, encoder=(1, 1), middle=1, decoder=(1, 1)),
    "mamba_diffusion": dict(dim=4, blocks=(0, 0, 1), middle=1, d_state=4),
    "darkir": dict(width=8, encoder=(1,), middle=(1, 1), decoder=(1,)),
    "darkir_l": dict(width=8, encoder=(1,), middle=(1, 1), decoder=(1,)),
    "retinexformer": dict(n_feat=8, num_blocks=(1, 1, 1)),
}


def small(name, **config):
    """A reduced model in evaluation mode, away from the identity that it starts as."""
    torch.manual_seed(0)
    model = create_model(name, **{**SMALL[name], **config}).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.02)
    return model


def fill(state):
    """Deterministic weights by name, as they were put into the published implementation for its reference output."""
    for name in sorted(state):
        shape = tuple(state[name].shape)
        u = np.random.default_rng(zlib.crc32(name.encode())).uniform(-1, 1, shape).astype(np.float32)
        fan_in = int(np.prod(shape[1:]))
        if len(shape) >= 2 and fan_in > 1:
            u = u * 0.1 if name.endswith(("beta", "gamma")) else u * np.sqrt(3 / fan_in) * 0.5
        else:
            u = 1 + 0.1 * u if name.endswith(("weight", "temperature")) else 0.1 * u
        state[name].copy_(torch.from_numpy(u.astype(np.float32)))


def published_shapes(reference):
    """Names and shapes of a published model's tensors."""
    return json.loads((REFERENCE / f"{reference}.json").read_text())["state_dict"]


def difference_to_published(model, reference):
    """Largest difference to the published implementation's output, both filled by the rule."""
    with torch.no_grad():
        fill(model.state_dict())
        x = torch.from_numpy(np.random.default_rng(7).uniform(0, 1, (1, 3, 64, 96)).astype(np.float32))
        return np.abs(model.eval()(x).numpy() - np.load(REFERENCE / f"{reference}.npz")["output"]).max()


def kept_per_pixel(model, side=256):
    """What `autohdr.models.zoo.memory_per_pixel` says, for a model that is not of the zoo, on the meta device: bytes kept by a training step on the L1."""
    storage = lambda t: t.untyped_storage()._cdata  # a transposed weight is the same storage
    own, kept = {storage(t) for t in (*model.parameters(), *model.buffers())}, {}

    def pack(t):
        if storage(t) not in own:
            kept[storage(t)] = (t.untyped_storage().nbytes(), t)
        return t

    x = torch.rand(1, 3, side, side, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        l1(model(x), x)
    return sum(size for size, _ in kept.values()) / side**2
