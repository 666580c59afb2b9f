"""Restormer against the published one."""
from autohdr.models.zoo import create_model
from tests.zoo import difference_to_published, published_shapes


def test_names_and_shapes_are_the_published_ones():
    assert {k: list(v.shape) for k, v in create_model("restormer").state_dict().items()} == published_shapes("restormer")


def test_output_is_the_published_one():
    assert difference_to_published(create_model("restormer"), "restormer") < 1e-4
