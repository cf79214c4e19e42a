"""A whole system that trains in seconds: enough to run everything, not to be good."""

from configs import shapes


def tiny_config():
    c = shapes.get_config("quick").unlock()
    c.name = "shapes:tiny"
    c.data.update({"train": 64, "validation": 16, "test": 16})
    training = c.image_tokenizer.training
    training.optimizer.update({"steps": 6, "warmup": 2})
    training.update({"batch_size": 16, "unquantised_steps": 2, "restart_until": 5})
    c.image_tokenizer.validation_pictures = 8
    c.image_tokenizer.model.update({"channels": 16, "codebook": 32})
    c.decoder.update({"layers": 1, "width": 32, "heads": 2, "mlp": 64})
    c.pretrain.update({"batch_size": 16, "log_every": 1, "checkpoint_every": 2})
    c.pretrain.update({"validate_every": 4, "validation_batches": 1})
    c.pretrain.optimizer.update({"steps": 4, "warmup": 1})
    c.sampling.infill.guidance = 2.0
    return c.to_dict()
