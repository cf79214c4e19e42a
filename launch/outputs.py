"""Class maps and documents, as `launch/sample.py` leaves them."""

from pathlib import Path


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
