"""Infilling is scored by cells and boxes; what nobody scores is drawn to be shown."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image as Pillow

from cm3leon_jax.data import shapes as world
from cm3leon_jax.evaluation import filling, pairs, shapes
from cm3leon_jax.tokenizers import regions

WORLD = world.ShapesConfig(image_size=32, layout=2)


@pytest.mark.parametrize("layout, size, grid", [(2, 32, 8), (3, 64, 16), (3, 48, 6)])
def test_boxes_cut_through_cells_and_hide_a_known_share(layout, size, grid):
    config = world.ShapesConfig(image_size=size, layout=layout)
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(200):
        mask = filling.offgrid_box(rng, config, (grid, grid))
        hidden = regions.cells(mask, (grid, grid))
        rows, columns = (np.flatnonzero(hidden.any(axis)) for axis in (1, 0))
        assert hidden.sum() == len(rows) * len(columns)  # one box
        assert 0.2 <= hidden.mean() <= 0.6
        edges = [rows[0], rows[-1] + 1, columns[0], columns[-1] + 1]
        assert any(edge * layout % grid for edge in edges if 0 < edge < grid)
        seen.add(tuple(edges))
    assert len(seen) > 20


def test_a_grid_as_coarse_as_the_layout_has_no_such_box():
    with pytest.raises(ValueError, match="code cells"):
        filling.offgrid_box(np.random.default_rng(0), WORLD, (2, 2))


class Perfect:
    """A model that knows the answer: infilling gives the truth back."""

    system = SimpleNamespace(
        source=WORLD, name="perfect", decoder_config=SimpleNamespace(length=128)
    )
    codec = SimpleNamespace(
        image=SimpleNamespace(grid=(8, 8)),
        image_tokens=64,
        pieces=lambda text, _: [0] * (20 if " and " not in text else 60),
    )

    def __init__(self):
        self.drawn = []

    def reconstruct(self, images):
        return images

    def infill(self, images, masks, prompts, *, seed):
        return images

    def text_to_image(self, prompts, *, seed):
        self.drawn.append(len(prompts))
        return [Pillow.new("RGB", (32, 32))] * len(prompts)


def test_infilling_counts_cell_and_box():
    documents = [world.document(WORLD, "test", seed) for seed in range(30)]
    found = filling.infill(Perfect(), documents, 0).scores
    assert all(score["value"] == 1 for score in found.values())
    assert found["objects"]["n"] == 30  # one object a scene
    # Long captions leave no room for a box's rows.
    fitting = [d for d in documents if " and " not in d.segments[0].text]
    assert 0 < found["objects_offgrid"]["clusters"] <= len(fitting) < 30


def test_unseen_pairs_are_asked_for_and_counted_alone():
    documents = [world.document(WORLD, "test", seed) for seed in range(8)]
    outcome = shapes.unseen_pairs(Perfect(), documents, 0)
    unseen = outcome.scores[shapes.UNSEEN_PAIRS]
    assert 8 <= unseen["n"] <= outcome.scores["objects"]["n"]
    assert unseen["value"] == 0  # black pictures
    ceiling = outcome.scores["reconstruction"]
    assert (ceiling["value"], ceiling["n"]) == (1, unseen["n"])
    for sample in outcome.samples:
        named = [f"{colour} {shape}" for colour, shape in world.HELD_OUT]
        assert any(pair in sample.text for pair in named)


def test_pictures_that_nobody_scores_are_drawn_to_be_shown_only():
    documents = [world.document(WORLD, "test", seed) for seed in range(40)]
    model = Perfect()
    assert len(pairs.text_to_image(model, documents, 0).samples) == pairs.SHOWN
    assert model.drawn == [pairs.SHOWN]
