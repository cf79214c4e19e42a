"""Made-up data in the layouts of the public sets: 24 examples each."""

import json
from pathlib import Path

import numpy as np
from PIL import Image as Pillow

COUNT, SIDE = 24, 8


def put(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def picture(path: Path, number: int) -> None:
    """Of a colour that tells its number, twice as wide as high."""
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.full((SIDE, 2 * SIDE, 3), [10 * number, 10, 200], np.uint8)
    Pillow.fromarray(array).save(path, quality=100)


def pictures(folder: Path, form: str) -> list[str]:
    names = [form.format(i) for i in range(COUNT)]
    for i, name in enumerate(names):
        picture(folder / name, i)
    return names


def coco_prompts(folder: Path) -> None:
    names = pictures(folder, "val2014/COCO_val2014_{:012d}.jpg")
    images = [{"id": i, "file_name": Path(n).name} for i, n in enumerate(names)]
    said = [
        {"id": 10 * k + i, "image_id": i, "caption": f"picture {i}, said {k} times "}
        for k in (2, 1)
        for i in range(COUNT)
    ]
    made = {"images": images, "annotations": said}
    put(folder / "annotations/captions_val2014.json", made)


def coco_files(folder: Path) -> list[tuple[Path, list[tuple[int, str]]]]:
    """Of `coco_prompts`: every picture's file, and its captions by their numbers."""
    made = json.loads((folder / "annotations/captions_val2014.json").read_text())
    said = [(x["image_id"], x["id"], x["caption"]) for x in made["annotations"]]
    return [
        (
            folder / "val2014" / image["file_name"],
            sorted((n, text) for of, n, text in said if of == image["id"]),
        )
        for image in made["images"]
    ]


def coco_karpathy(folder: Path) -> None:
    names = pictures(folder, "val2014/{}.jpg")
    images = [
        {
            "split": "test" if i else "train",
            **{"cocoid": i, "filepath": "val2014", "filename": Path(name).name},
            "sentences": [{"raw": f"a picture {i}"}, {"raw": f"the picture {i}."}],
        }
        for i, name in enumerate(names)
    ]
    put(folder / "dataset_coco.json", {"images": images})


def _asked() -> list[dict]:
    return [
        {"question_id": 100 + i, "image_id": i, "question": f"Which is {i}?"}
        for i in range(COUNT)
    ]


def _said(i: int) -> list[dict]:
    return [{"answer": f"number {i}"}] * 9 + [{"answer": "none"}]


def vqa2(folder: Path, prefix: str = "v2_") -> None:
    pictures(folder, "val2014/COCO_val2014_{:012d}.jpg")
    questions = f"{prefix}OpenEnded_mscoco_val2014_questions.json"
    put(folder / questions, {"questions": _asked()})
    answers = [{"question_id": 100 + i, "answers": _said(i)} for i in range(COUNT)]
    made = {"annotations": answers[::-1]}
    put(folder / f"{prefix}mscoco_val2014_annotations.json", made)


def vqa2_test_dev(folder: Path) -> None:
    pictures(folder, "test2015/COCO_test2015_{:012d}.jpg")
    name = "v2_OpenEnded_mscoco_test-dev2015_questions.json"
    put(folder / name, {"questions": _asked()})


def okvqa(folder: Path) -> None:
    vqa2(folder, "")


def vizwiz(folder: Path) -> None:
    names = pictures(folder, "val/VizWiz_val_{:08d}.jpg")
    made = [
        {"image": Path(name).name, "question": f"Which is {i}?", "answers": _said(i)}
        for i, name in enumerate(names)
    ]
    put(folder / "Annotations/val.json", made)


def image_paragraph(folder: Path) -> None:
    pictures(folder, "VG_100K/{}.jpg")
    (folder / "VG_100K_2").mkdir()
    (folder / "VG_100K/3.jpg").rename(folder / "VG_100K_2/3.jpg")
    made = [{"image_id": i, "paragraph": f"It is {i}. So. "} for i in range(COUNT)]
    put(folder / "paragraphs_v1.json", made)
    put(folder / "test_split.json", list(range(1, COUNT)))


def visdial(folder: Path) -> None:
    pictures(folder, "VisualDialog_val2018/VisualDialog_val2018_{:012d}.jpg")
    turns = [
        {"question": k, "answer": k, "answer_options": [3, 2, 1, 0]} for k in (0, 1)
    ]
    dialogues = [
        {"image_id": i, "caption": f"number {i}", "dialog": turns} for i in range(COUNT)
    ]
    data = {
        "dialogs": dialogues,
        "questions": ["is it red", "is it round"],
        "answers": ["yes", "no", "maybe", "never"],
    }
    put(folder / "visdial_1.0_val.json", {"data": data})
    judged = [
        {"image_id": i, "round_id": 2, "gt_relevance": [0.0, 0.5, 1.0, 0.0]}
        for i in range(COUNT)
    ]
    put(folder / "visdial_1.0_val_dense_annotations.json", judged)


def coco_segmentation(folder: Path) -> None:
    names = pictures(folder, "val2017/{:012d}.jpg")
    for name in names:
        labels = np.full((SIDE, 2 * SIDE), 7, np.uint8)  # a class of nobody's
        labels[:, SIDE // 2 : SIDE] = 0  # the left half of the centred square
        path = folder / f"stuffthingmaps/val2017/{Path(name).stem}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Pillow.fromarray(labels).save(path)
    (folder / "labels.txt").write_text("0: unlabeled\n1: star\n2: tree\n")


def generic(folder: Path) -> None:
    """`pictures`, and in our own layout all that a picture can have."""
    names = pictures(folder, "images/{}.png")
    lines = [
        {"id": str(i), "picture": name, "references": [f"number {i}"], "question": "?"}
        for i, name in enumerate(names)
    ]
    (folder / "examples.jsonl").write_text("\n".join(map(json.dumps, lines)))


MAKERS = {
    "coco_prompts": coco_prompts,
    "coco_karpathy": coco_karpathy,
    "vqa2": vqa2,
    "vqa2_test_dev": vqa2_test_dev,
    "okvqa": okvqa,
    "vizwiz": vizwiz,
    "image_paragraph": image_paragraph,
    "visdial": visdial,
    "coco_segmentation": coco_segmentation,
    "pictures": lambda folder: pictures(folder, "images/a/{}.jpg"),
}
