"""A whole system that trains in seconds: enough to run everything, not to be good."""

from configs import shapes


def tiny_config():
    """Without tasks: `tiny_tasks.py` has some of its own."""
    c = tiny_quick()
    del c["sft"], c["vocabulary"]["classes"]
    return c


def tiny_quick():
    """The quick system with its tasks."""
    c = shapes.get_config("quick").unlock()
    c.name = "shapes:tiny"
    c.protocol = "configs/eval/shapes.py:quick"
    c.data.update({"train": 64, "validation": 16, "test": 16})
    training = c.image_tokenizer.training
    training.optimizer.update({"steps": 6, "warmup": 2})
    training.update({"batch_size": 16, "unquantised_steps": 2, "restart_until": 5})
    c.image_tokenizer.validation_pictures = 8
    c.image_tokenizer.model.update({"channels": 16, "codebook": 32})
    c.decoder.update({"layers": 1, "width": 32, "heads": 2, "mlp": 64})
    for run in (c.pretrain, c.sft):
        run.update({"batch_size": 16, "log_every": 1, "checkpoint_every": 2})
        run.update({"validate_every": 4, "validation_batches": 1})
        run.optimizer.update({"steps": 4, "warmup": 1})
    c.sft.examples.update({"train": 16, "validation": 8, "test": 8})
    c.sampling.infill.guidance = 2.0
    return c.to_dict()
