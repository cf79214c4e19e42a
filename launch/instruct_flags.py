"""Flags that ask for any task of `data/task_templates.py` by its fields."""

from collections.abc import Callable
from typing import Any

from absl import flags

NAME = flags.DEFINE_string("name", None, "A task of data/task_templates.py.")
FIELD = flags.DEFINE_multi_string(
    "field", [], "FIELD=TEXT, or FIELD=FILE of a picture; may be given repeatedly."
)


def task() -> Any:
    """What the templates say of it."""
    from cm3leon_jax.data import tasks

    return tasks.known(str(NAME.value))


def check() -> None:
    """ValueError for flags that go with other outputs; `--out` is for pictures."""
    given = {x for x in ("out", "rerank", "scores", "max_text") if flags.FLAGS[x].value}
    texts = task().writes_text
    for name in sorted(
        given - ({"max_text"} if texts else {"out", "rerank", "scores"})
    ):
        what = "a text" if texts else "a picture"
        raise ValueError(f"--{name} is not for --name {NAME.value}, which makes {what}")
    if not texts and "out" not in given:
        raise ValueError(f"--name {NAME.value} needs --out FILE.png or --out FOLDER")


def fields(opened: Callable[[str], Any]) -> dict[str, Any]:
    """Those that are given, pictures `opened`."""
    images, found = task().images, {}
    for text in FIELD.value:
        name, equals, value = text.partition("=")
        if not equals or name in found:
            raise ValueError(f"--field {text}: give each field once, FIELD=VALUE")
        found[name] = opened(value) if name in images else value
    return found


def sampler(sampling: Any) -> Any:
    """The config's for tasks of that kind, as `CM3Leon.instruct` takes it."""
    from cm3leon_jax.writer import usual_sampler

    return usual_sampler(sampling, task())
