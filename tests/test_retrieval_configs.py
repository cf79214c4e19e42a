"""The configs that retrieve: the paper's, and icons with frozen networks."""

import pytest

from cm3leon_jax import stages
from cm3leon_jax.system import System
from configs import cm3leon_7b, cm3leon_350m, cm3leon_760m, icons


@pytest.mark.parametrize("config", [cm3leon_350m, cm3leon_760m, cm3leon_7b])
def test_the_papers_systems_retrieve_as_the_paper_says(config):
    system = System.make(config.get_config().to_dict())
    found = system.retrieval
    assert (found.encoder.kind, found.storage) == ("clip", "int8")
    assert (found.per_query, found.documents, found.skip_above) == ((2, 2), 3, 0.9)
    assert (found.query_dropout, found.weight, found.noise) == (0.2, 1.0, 0.0)
    assert {"train_dual_encoder", "build_bank"} <= set(stages.stages_of(system))
    # Three documents and the query would be more than a row: those are cut.
    pictures = 4 * system.image_tokenizer.model.grid**2
    assert pictures == system.pretrain.packing.row_length


def test_icons_differ_in_retrieval_alone():
    quick, system = (
        System.make(icons.get_config(name).to_dict()) for name in ("quick", "retrieval")
    )
    assert quick.retrieval is None and system.retrieval.skip_above is None
    assert system.retrieval.encoder.kind == "frozen"
    same = ("source", "layout", "image_tokenizer", "pretrain", "decoder_config")
    for name in same:
        assert getattr(quick, name) == getattr(system, name)
    before = quick.stage_inputs
    assert {k for k in before if before[k] != system.stage_inputs[k]} == {"pretrain"}
