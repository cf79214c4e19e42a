"""Class maps and documents, as `launch/sample.py` leaves them, and what pictures are
known by."""

from pathlib import Path
from typing import Any


def key(model: Any, how: dict[str, Any]) -> str:
    """Names all that pictures depend on beside their own prompts: weights, precision,
    the config's samplers, the memory, and `how` the model was asked."""
    import jax

    from cm3leon_jax.evaluation.kept import digest

    engine, memory = model.engine, model.memory
    found = [how, model.system.sampling, engine.precision]
    for part in (engine.decoder, engine.amateur, vars(model.codec.image)):
        # They may be large, and on many devices: a sum each, as training may go on.
        weights = (x for x in jax.tree.leaves(part) if isinstance(x, jax.Array))
        found.append([float(abs(x).sum(dtype="float32")) for x in weights])
    if memory is not None:
        found.append(memory.embedder.name)
        if how.get("retrieve"):
            rows = range(0, len(memory.bank.ids), len(memory.bank.ids) // 1024 + 1)
            found += [memory.skip_above, memory.ids, memory.bank[[*rows]]]
    return digest(found)


def palettes(maps: list, classes: int) -> list:
    """Labels as palette pictures, in the colours that --kind segmentation reads."""
    import numpy as np
    from PIL import Image

    from cm3leon_jax.data.controls import class_colours

    pictures = []
    for labels in maps:
        picture = Image.fromarray(labels.astype(np.uint8), "P")
        picture.putpalette(class_colours(classes).tobytes())
        pictures.append(picture)
    return pictures


def save_documents(documents: list, folder: Path) -> dict:
    """Texts as they are, pictures in the folder."""
    from PIL import Image

    from cm3leon_jax.data.documents import Text

    made = []
    for i, document in enumerate(documents):
        segments = []
        for n, segment in enumerate(document.segments):
            if isinstance(segment, Text):
                segments.append({"text": segment.text})
                continue
            path = folder / f"{i:04d}-{n}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(segment.array).save(path)
            segments.append({"picture": str(path)})
        made.append(segments)
    return {"documents": made}
