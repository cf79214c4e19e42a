"""The shapes world after tuning: all tasks of the checkpoint, on unseen scenes.

Scored by the oracle, as `shapes.py` is, of which this is the larger sibling: the same
tasks and more. Keys ending in `_unseen_wording` are of instructions in words that
training has never used. Of every task at least as many things are counted as the
protocol has documents (places that change, objects, questions), so the tasks of the
table draw examples of their own from the world; those of pretraining read documents.
"""

from cm3leon_jax.evaluation import (
    filling,
    shapes,
    task_edits,
    task_pictures,
    task_texts,
)
from cm3leon_jax.evaluation.protocol import Evaluator

TASKS: dict[str, Evaluator] = {
    **shapes.TASKS,
    "infill_sizes": filling.infill_sizes,
    "infill_untold": filling.infill_untold,
    **task_texts.TASKS,
    **task_edits.TASKS,
    **task_pictures.TASKS,
}
