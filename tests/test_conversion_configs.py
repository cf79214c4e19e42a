"""The configs of Chameleon and Anole."""

import pytest
import tiny_chameleon as tiny

from cm3leon_jax.system import System
from configs import chameleon_7b, chameleon_34b


@pytest.mark.parametrize("module", [chameleon_7b, chameleon_34b])
def test_configs_are_the_published_sizes(module):
    system = System.make(module.get_config().to_dict())
    assert (system.layout.brk, system.layout.turn) == (8197, 8710)
    decoder, images = system.decoder_config, system.image_tokenizer.model
    assert (images.image_size, images.grid, images.codebook) == (512, 32, 8192)
    large = module is chameleon_34b
    assert (decoder.post_norm, decoder.key_heads) == (large, 8 if large else 32)
    assert system.pretrain.batch_size * 4096 == (3 * 2**22 if large else 2**23)
    with pytest.raises(ValueError, match="choose from"):
        module.get_config("other")


def test_origin_is_a_known_family():
    with pytest.raises(ValueError, match="origin='gpt': choose chameleon"):
        System.make(tiny.config() | {"origin": "gpt"})
