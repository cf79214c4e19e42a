"""A script of `launch/` as a module, without running it."""

import contextlib
import importlib.util
import sys
from pathlib import Path

from absl import flags

LAUNCH = Path(__file__).parent.parent / "launch"


@contextlib.contextmanager
def loaded(name):
    """Afterwards its flags are gone, and the modules beside it that it has imported."""
    known, modules = set(flags.FLAGS), set(sys.modules)
    sys.path.insert(0, str(LAUNCH))
    spec = importlib.util.spec_from_file_location(
        f"{name}_script", LAUNCH / f"{name}.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(LAUNCH))
    for flag in set(flags.FLAGS) - known:
        delattr(flags.FLAGS, flag)
    for other in set(sys.modules) - modules:
        if (LAUNCH / f"{other}.py").exists():
            del sys.modules[other]
