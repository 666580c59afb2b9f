"""Restormer against the published one, against the plain way to write it, in one tile and in several, with recomputation, and in half precision."""
import pytest
import torch

from autohdr.models.restormer import Restormer, infer_config, own_part, tiles
from autohdr.models.zoo import create_model, memory_per_pixel
from tests.plain.restormer import Restormer as Plain
from tests.zoo import difference_to_published, published_shapes

SMALL = dict(dim=16, blocks=(2, 1, 1, 1), refinement=1)
VARIANTS = [{}, {"norm_bias": False}, {"reduce_level1": True}, {"norm_bias": False, "reduce_level1": True, "expansion": 2.0, "heads": (1, 1, 2, 4)}]
ONE, MANY = (40, 64), (112, 168) # sides in multiples of 8: one tile at each level; six at the first
every_variant = pytest.mark.parametrize("config", VARIANTS, ids=str)


def ours_and_plain(config):
    torch.manual_seed(0)
    ours, plain = Restormer(**SMALL, **config), Plain(**SMALL, **config)
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    plain.load_state_dict(ours.state_dict())
    return ours, plain


def gradients(model, x, **autocast):
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", enabled=bool(autocast), **autocast):
        out = model(x)
    out.float().square().mean().backward()
    found = {"input": x.grad, **{name: p.grad for name, p in model.named_parameters()}}
    model.zero_grad()
    return out.detach(), found


def kept(model, x):
    """Bytes per pixel that autograd keeps for the backward pass, parameters not counted."""
    own, found = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in own:
            found[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    return sum(t.untyped_storage().nbytes() for t in found.values()) / x[:, 0].numel()


def test_names_and_shapes_are_the_published_ones():
    assert {k: list(v.shape) for k, v in create_model("restormer").state_dict().items()} == published_shapes("restormer")


def test_output_is_the_published_one():
    assert difference_to_published(create_model("restormer"), "restormer") < 1e-4
    assert difference_to_published(Plain(), "restormer") < 1e-4, "the oracle is right"


@every_variant
@pytest.mark.parametrize("size", [ONE, MANY], ids=str)
def test_output_is_that_of_the_plain_version(config, size):
    (ours, plain), x = ours_and_plain(config), torch.rand(2, 3, *size)
    with torch.no_grad():
        expected = plain(x)
        assert (ours(x) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (ours(x) - expected).abs().max() < 1e-5 * expected.abs().max(), "with gradients on"


@every_variant
@pytest.mark.parametrize("size", [ONE, MANY], ids=str)
def test_gradients_are_those_of_the_plain_version(config, size):
    (ours, plain), x = ours_and_plain(config), torch.rand(2, 3, *size)
    (_, found), (_, expected) = (gradients(m, x) for m in (ours, plain))
    worst = {k: float((found[k] - g).abs().max() / g.abs().max()) for k, g in expected.items()}
    assert max(worst.values()) < 1e-4, max(worst, key=worst.get)


@pytest.mark.parametrize("size", [ONE, MANY], ids=str)
def test_checkpointing_gives_the_same_gradients_to_the_bit(size):
    (model, _), x = ours_and_plain({}), torch.rand(1, 3, *size)
    _, expected = gradients(model, x)
    model.checkpointing = True
    _, found = gradients(model, x)
    assert all(torch.equal(found[k], g) for k, g in expected.items())


def test_gradients_reach_a_model_with_frozen_parts():
    (model, _), x = ours_and_plain({}), torch.rand(1, 3, *MANY)
    _, expected = gradients(model, x)
    frozen = {f"{stage}.{name}" for stage in ("encoder_level1", "latent") for name, p in getattr(model, stage).named_parameters() if p.requires_grad_(False) is p}
    _, found = gradients(model, x)
    assert {k for k, g in found.items() if g is None} == frozen
    assert all(torch.equal(g, expected[k]) for k, g in found.items() if g is not None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_finite_and_close(dtype):
    """The squared lengths of queries and keys are beyond float16."""
    (model, _), x = ours_and_plain({}), torch.rand(1, 3, *MANY)
    with torch.no_grad():
        block = model.encoder_level1[0]
        block.attn.qkv.weight *= 20
        lengths = block.attn(block.norm1.body(model.patch_embed(x).permute(0, 2, 3, 1)))[2]
        assert lengths.max() > torch.finfo(torch.float16).max
        full = model(x)
        with torch.autocast("cpu", dtype):
            mixed = model(x)
        pure = model.to(dtype)(x.to(dtype)) if dtype == torch.bfloat16 else mixed
    for half in (mixed, pure):
        assert half.isfinite().all() and (half.float() - full).abs().mean() < 0.02 * full.std()


def test_gradients_under_autocast_are_close():
    (model, _), x = ours_and_plain({}), torch.rand(1, 3, *MANY)
    (_, expected), (_, found) = gradients(model, x), gradients(model, x, dtype=torch.bfloat16)
    total = lambda grads: sum(float(g.square().sum()) for g in grads) ** 0.5
    assert total(found[k] - g for k, g in expected.items()) < 0.05 * total(expected.values())


def test_tiles_cover_a_map_once_with_a_pixel_around():
    for h, w in [(1, 1), (48, 500), (95, 96), (161, 128)]:
        count = torch.zeros(1, h, w, 1)
        for around, tile, border in tiles(h, w):
            count[tile] += 1
            own = own_part(count[around], border)
            assert own.data_ptr() == count[tile].data_ptr() and own.shape == count[tile].shape
            assert all(a.start == max(t.start - 1, 0) and a.stop == min(t.stop + 1, n) for a, t, n in zip(around[1:], tile[1:], (h, w)))
        assert (count == 1).all()


def test_a_compiler_sees_whole_maps():
    (model, plain), x = ours_and_plain({}), torch.rand(1, 3, *MANY)
    with torch.no_grad():
        exported = torch.export.export(model.eval(), (x,)).module()
        torch.testing.assert_close(exported(x), plain(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [ONE, MANY], ids=str)
def test_less_is_kept_for_the_backward_pass(size):
    (ours, plain), x = ours_and_plain({}), torch.rand(1, 3, *size)
    all_of_it, as_written = kept(ours, x), kept(plain, x)
    ours.checkpointing = True
    checkpointed = kept(ours, x)
    assert checkpointed < all_of_it / 10 and all_of_it < 0.9 * as_written, (checkpointed, all_of_it, as_written)


def test_memory_of_the_published_model():
    assert memory_per_pixel("restormer") < 160_000 and memory_per_pixel("restormer", checkpointing=True) < 8_000


@every_variant
def test_configuration_is_read_off_the_tensors(config):
    with torch.device("meta"):
        found = infer_config(Restormer(**SMALL, **config).state_dict())
        assert found == {**SMALL, **config}
        widths = {k: v.shape for k, v in Restormer(**found).state_dict().items()}
    assert widths == {k: v.shape for k, v in Plain(**SMALL, **config).state_dict().items()}


def test_configuration_of_other_tensors_is_none():
    other = create_model("hdrnet", width=8).state_dict()
    dual_pixel = Restormer(**SMALL).state_dict() | {"patch_embed.proj.weight": torch.zeros(16, 6, 3, 3)}
    half = {k: v for k, v in Restormer(**SMALL).state_dict().items() if "latent" not in k}
    for state in (other, dual_pixel, half, {}, {"patch_embed.proj.weight": 1}, {0: None}):
        assert infer_config(state) is None
