"""Every config in `configs/` builds, has the paper's sizes, and clashes loudly."""

import jax
import pytest
from ml_collections import ConfigDict

from cm3leon_jax.models.decoder import abstract, parameter_count
from cm3leon_jax.system import System
from configs import cm3leon_7b, cm3leon_350m, cm3leon_760m, folder, icons, shapes

CONFIGS = {
    "shapes:quick": shapes.get_config("quick"),
    "shapes:study": shapes.get_config("study"),
    "icons:quick": icons.get_config("quick"),
    "icons:tasks": icons.get_config("tasks"),
    "folder": folder.get_config("my_pictures"),
    "cm3leon_350m": cm3leon_350m.get_config(),
    "cm3leon_760m": cm3leon_760m.get_config(),
    "cm3leon_7b": cm3leon_7b.get_config(),
}


def changed(name, value, config="shapes:quick"):
    copy = CONFIGS[config].copy_and_resolve_references().unlock()
    copy = ConfigDict(System.complete(copy.to_dict()), type_safe=False)
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
    # Paper 2.5: pixels, features and an adversary.
    training = system.image_tokenizer.training
    assert (training.l1, training.perceptual, training.adversarial) == (1.0, 1.0, 0.8)
    assert system.image_tokenizer.features == "efficientnet_lite0"
    tokens = system.pretrain.batch_size * system.pretrain.packing.row_length
    assert tokens == 8 * 2**20  # paper Table 3: 8M


@pytest.mark.parametrize("config", [cm3leon_350m, cm3leon_760m, cm3leon_7b])
def test_fine_tuning_has_the_papers_settings(config, tmp_path):
    """Paper Table 4: 2M tokens an update, 30B in all."""
    given = config.get_config("sft").to_dict()
    given["sft"]["path"] = str(tmp_path)
    for name in given["sft"]["tasks"]:
        (tmp_path / f"{name}.jsonl").touch()
    sft = System.make(given).sft
    tokens = sft.batch_size * sft.packing.row_length
    assert sft.packing.row_length == 4096 and tokens == 2 * 2**20
    assert (sft.optimizer.peak, sft.optimizer.warmup) == (5e-5, 150)
    assert abs(sft.optimizer.steps * tokens / 30e9 - 1) < 1e-4
    plain = config.get_config().to_dict()
    assert "sft" not in plain and System.make(plain).sft is None
    with pytest.raises(ValueError, match=":tuned: choose sft, or none"):
        config.get_config("tuned")


@pytest.mark.parametrize(
    "name, value, message",
    [
        (
            "data.source",
            "imagenet",
            "data.source='imagenet': choose from shapes, entities, icons",
        ),
        ("data.settings.image_size", 64, "data.settings.image_size=64"),
        ("image_tokenizer.model.image_size", 64, "must be the same"),
        ("pretrain.packing.row_length", 500, "exceeds decoder.length"),
        ("pretrain.packing.row_length", 10, "cannot hold a picture"),
        ("vocabulary.sentinels", 4, "vocabulary.sentinels=4"),
        ("decoder.heads", 3, "decoder.heads=3 does not divide"),
        ("sampling.caption.temperature", -1.0, "sampler.temperature"),
        ("mesh", {"fsdp": 0}, "mesh.fsdp=0"),
        ("sampling.caption.top_p", 2.0, "in sampling.caption: sampler.top_p=2.0"),
        ("sampling.caption.guidance", (2.0, 2.0), "caption.guidance=.* need 3 streams"),
        ("sampling.segment", {"guidance": 2.0}, "sampling.segment.guidance=2.0"),
        ("pretrain.batch_size", 0, "^pretrain.batch_size=0 must be at least 1"),
        ("pretrain.log_every", 0, "^pretrain.log_every=0"),
        ("pretrain.workers", -1, "^pretrain.workers=-1"),
        ("pretrain.validation_batches", 0, "^pretrain.validation_batches=0"),
        ("pretrain.microbatches", 7, "pretrain.microbatches=7 does not divide"),
        ("pretrain.loss_blocks", 7, "pretrain.loss_blocks=7 does not divide"),
        ("pretrain.optimizer.peak", 0.0, "in pretrain.optimizer: optimizer.peak=0.0"),
        (
            "pretrain.optimizer.peak",
            "1",
            "pretrain.optimizer.peak='1' must be a number",
        ),
        ("image_tokenizer.regions_per_image", 0, "regions_per_image=0"),
        ("image_tokenizer.training.batch_size", 0, "training.batch_size=0"),
        ("seed", -1, "seed=-1"),
        ("seed", 0.5, "^seed=0.5 must be a whole number"),
    ],
)
def test_clashes_are_errors_that_name_the_setting(name, value, message):
    with pytest.raises(ValueError, match=message):
        System.make(changed(name, value))


def test_texts_may_be_guided_by_the_picture():
    """Against a stream that sees a grey one, by guidance or by contrast."""
    system = System.make(changed("sampling.answer", {"guidance": 2.0}))
    assert system.sampling.answer.streams == 2
    contrast = {"contrastive": {"alpha": 0.1}}
    system = System.make(changed("sampling.caption", contrast))
    assert system.sampling.caption.contrastive.k == 1


@pytest.mark.parametrize("name", CONFIGS)
def test_every_default_is_written_out(name):
    given = CONFIGS[name].to_dict()
    whole = System.complete(given)
    for path in (
        *("decoder.qk_norm", "pretrain.workers", "pretrain.optimizer.clip"),
        *("rules.store.embed", "mesh.tensor", "sampling.caption.top_k"),
        *("data.settings.image_size", "image_tokenizer.training.discriminator.layers"),
    ):
        node = whole
        for key in path.split("."):
            node = node[key]
    one, other = System.make(given), System.make(whole)
    assert one.stage_inputs == other.stage_inputs and one.source == other.source


def test_bookkeeping_does_not_change_what_a_stage_depends_on():
    one = System.make(changed("seed", 0)).stage_inputs
    for name, value in (
        ("pretrain.log_every", 7),
        ("pretrain.keep", 9),
        ("pretrain.microbatches", 2),
        ("decoder.remat", "full"),
        ("image_tokenizer.training.log_every", 3),
        ("sampling.text_to_image.top_p", 0.5),
        ("sampling.rerank", {"similarity": 1.0}),
    ):
        assert System.make(changed(name, value)).stage_inputs == one
    for name, value, stages in (
        ("pretrain.optimizer.steps", 777, 2),
        ("decoder.norm_eps", 1e-3, 2),
        ("image_tokenizer.training.l1", 9.0, 5),
        ("seed", 1, 6),
        ("data.train", 9, 7),
    ):
        other = System.make(changed(name, value)).stage_inputs
        assert sum(one[key] != other[key] for key in one) == stages


def test_an_unknown_variant_is_an_error():
    for module in (shapes, icons):
        with pytest.raises(ValueError, match="choose from"):
            module.get_config("huge")


def test_another_pretraining_seed_keeps_the_stages_before():
    system = System.make(CONFIGS["shapes:quick"].to_dict())
    again = System.make(changed("pretrain.seed", 1))
    same = System.make(changed("pretrain.seed", system.seed))
    assert same.stage_inputs == system.stage_inputs
    differing = {
        folder
        for folder, inputs in system.stage_inputs.items()
        if inputs != again.stage_inputs[folder]
    }
    assert differing == {"pretrain", "sft"} and again.pretrain_seed == 1
    with pytest.raises(ValueError, match="pretrain.seed=-1"):
        System.make(changed("pretrain.seed", -1))
