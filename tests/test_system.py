"""Every config in `configs/` builds, has the paper's sizes, and clashes loudly."""

import jax
import pytest

from cm3leon_jax.models.decoder import abstract, parameter_count
from cm3leon_jax.system import System
from configs import cm3leon_7b, cm3leon_350m, cm3leon_760m, icons, shapes

CONFIGS = {
    "shapes:quick": shapes.get_config("quick"),
    "icons:quick": icons.get_config("quick"),
    "cm3leon_350m": cm3leon_350m.get_config(),
    "cm3leon_760m": cm3leon_760m.get_config(),
    "cm3leon_7b": cm3leon_7b.get_config(),
}


def changed(name, value, config="shapes:quick"):
    copy = CONFIGS[config].copy_and_resolve_references().unlock()
    copy.update_from_flattened_dict({name: value})
    return copy.to_dict()


@pytest.mark.parametrize("name", CONFIGS)
def test_config_builds_and_decoder_evaluates_shapes(name):
    system = System.make(CONFIGS[name].to_dict())
    assert system.name == name
    leaves = jax.tree.leaves(abstract(system.decoder_config))
    assert sum(x.size for x in leaves) == parameter_count(system.decoder_config)


@pytest.mark.parametrize(
    "name, blocks, width",
    [
        ("cm3leon_350m", 301_989_888, 1024),
        ("cm3leon_760m", 679_477_248, 1536),
        ("cm3leon_7b", 6_442_450_944, 4096),
    ],
)
def test_the_papers_sizes_are_exact(name, blocks, width):
    system = System.make(CONFIGS[name].to_dict())
    assert system.layout.size == 65_536
    assert len(system.layout.text) == 56_320 and len(system.layout.image) == 8192
    total = blocks + 2 * 65_536 * width + 4096 * width
    assert parameter_count(system.decoder_config) == total
    model = system.image_tokenizer.model
    assert (model.image_size, model.grid, model.factor) == (256, 32, 8)
    tokens = system.pretrain.batch_size * system.pretrain.packing.row_length
    assert tokens == 8 * 2**20  # paper Table 3: 8M


@pytest.mark.parametrize(
    "name, value, message",
    [
        (
            "data.source",
            "imagenet",
            "data.source='imagenet': choose from shapes, icons",
        ),
        ("data.settings.image_size", 64, "data.settings.image_size=64"),
        ("image_tokenizer.model.image_size", 64, "must be the same"),
        ("pretrain.packing.row_length", 500, "exceeds decoder.length"),
        ("pretrain.packing.row_length", 60, "cannot hold a picture"),
        ("vocabulary.sentinels", 8, "vocabulary.sentinels=8"),
        ("decoder.heads", 3, "decoder.heads=3 does not divide"),
        ("sampling.caption.temperature", -1.0, "sampler.temperature"),
        ("mesh", {"fsdp": 0}, "mesh.fsdp=0"),
    ],
)
def test_clashes_are_errors_that_name_the_setting(name, value, message):
    with pytest.raises(ValueError, match=message):
        System.make(changed(name, value))


def test_an_unknown_variant_is_an_error():
    for module in (shapes, icons):
        with pytest.raises(ValueError, match="choose from"):
            module.get_config("huge")
