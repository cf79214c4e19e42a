"""What every test shares: eight simulated CPU devices and repeatable examples."""

import os

import hypothesis
import jax

# Before any backend starts. The environment variables reach child processes, which
# must not find an accelerator either.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

# No deadline: the time of an example on a shared machine says nothing. No database
# and no fresh randomness: two runs of the suite try the same examples.
hypothesis.settings.register_profile(
    "repository", deadline=None, derandomize=True, database=None
)
hypothesis.settings.load_profile("repository")
