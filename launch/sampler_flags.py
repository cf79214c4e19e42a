"""Flags that say how tokens are drawn, and how the best of several is found."""

import dataclasses
from typing import Any

from absl import flags

OVERRIDES = {
    "temperature": flags.DEFINE_float("temperature", None, ">= 0; 0 is greedy."),
    "top_p": flags.DEFINE_float("top_p", None, "In (0, 1]."),
    "top_k": flags.DEFINE_integer("top_k", None, ">= 0; 0 is all."),
    "guidance": flags.DEFINE_list(
        "guidance", None, ">= 0; 1 is none; for edits TEXT,PICTURE."
    ),
}
CONTRAST = {
    "alpha": flags.DEFINE_float(
        "alpha", None, "In (0, 1]: contrastive decoding, which uses no guidance."
    ),
    "k": flags.DEFINE_integer("k", None, ">= 1; 1 is the original form, more is CD-K."),
    "amateur_temperature": flags.DEFINE_float("amateur_temperature", None, "> 0."),
}
MIX = flags.DEFINE_bool("mix", False, "Contrast for half of the candidates only.")
RERANK = flags.DEFINE_list(
    "rerank", None, "What is best: weights, gain=1,similarity=10,likelihood=0.1."
)
NAMES = (*OVERRIDES, *CONTRAST, "mix")


def sampler(default: Any, *, guided: bool = True) -> Any:
    """The task's own sampler (None) unless a flag changes it; two of them for --mix.

    `guided` is False where nothing can be guided and the default may want it.
    """
    from cm3leon_jax.sampling.sampler import ContrastiveTopK

    given = {k: f.value for k, f in OVERRIDES.items() if f.value is not None}
    contrast = {k: f.value for k, f in CONTRAST.items() if f.value is not None}
    if (contrast or MIX.value) and "alpha" not in contrast:
        raise ValueError("contrastive decoding (--k, --mix, …) needs --alpha")
    if not given and not contrast:
        return None
    if "guidance" in given:
        try:
            scales = tuple(float(scale) for scale in given["guidance"])
        except ValueError:
            raise ValueError(f"--guidance {given['guidance']}: give numbers") from None
        given["guidance"] = scales[0] if len(scales) == 1 else scales
    elif not guided or (contrast and not MIX.value):
        given["guidance"] = 1.0
    made = dataclasses.replace(default, **given)
    if not contrast:
        return made
    how = {"contrastive": ContrastiveTopK(**contrast)}
    if not MIX.value:
        return dataclasses.replace(made, **how)
    return made, dataclasses.replace(made, guidance=1.0, **how)


def rerank() -> Any:
    """The weights that were given."""
    from cm3leon_jax import config
    from cm3leon_jax.sampling.rerank import Rerank

    try:
        pairs = (each.split("=") for each in RERANK.value)
        weights = {name: float(weight) for name, weight in pairs}
    except ValueError:
        given = ",".join(RERANK.value)
        raise ValueError(f"--rerank {given}: give NAME=WEIGHT,…") from None
    return config.make(Rerank, weights, "rerank")
