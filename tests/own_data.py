"""Tables, folders and pictures as strangers bring them, small enough for tests."""

import base64
import io
import json

import numpy as np
from PIL import Image as Pillow


def picture(seed, width=40, height=30):
    """Noise with the spectrum of a photograph; different for every seed."""
    rng = np.random.default_rng(seed)
    down, across = np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None]
    pitch = np.maximum(np.hypot(down * height / width, across), 1 / width)
    planes, shared = [], rng.standard_normal((height, width))
    for _ in range(3):
        noise = 0.7 * shared + 0.5 * rng.standard_normal((height, width))
        plane = np.fft.ifft2(np.fft.fft2(noise) / pitch**1.1).real
        planes.append(plane / plane.std() * 55 + rng.integers(80, 170))
    return Pillow.fromarray(np.stack(planes, -1).clip(0, 255).astype(np.uint8))


def encoded(image, kind="PNG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def folder(path, count, start=0):
    path.mkdir(parents=True, exist_ok=True)
    for i in range(start, start + count):
        (path / f"{i:03d}.png").write_bytes(encoded(picture(i)))
        (path / f"{i:03d}.txt").write_text(f"picture number {i}")
    return path


def jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), errors="surrogateescape")
    return path


def base64_of(data):
    return base64.b64encode(data).decode()
