"""Checkpoints: state, data position and settings, written by Orbax in the background.

    DIRECTORY/checkpoints/STEP/state   every array, by its path in the state
    DIRECTORY/checkpoints/STEP/meta    {"position", "recent", "settings", "arrays"}

A step's folder gets its final name only once it is whole, and older checkpoints are
removed after that, so neither a kill nor a full disk costs a checkpoint. Arrays are
saved under plain names ("model.blocks.w_up"), not as Python objects: any mesh can
restore them, and any program can read them.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

from cm3leon_jax.parallel.distributed import peer_lost

ITEMS = ("state", "meta")
_PIECE = 32 << 20  # bytes; what is compressed is held twice
_DAMAGE = ("DATA_LOSS", "NOT_FOUND", "OUT_OF_RANGE", "FAILED_PRECONDITION")


def leaf_names(tree: Any) -> list[str]:
    """A unique dotted name of every leaf of a state, in the order of its leaves."""
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
    names = [jax.tree_util.keystr(p, simple=True, separator=".") for p in paths]
    return [name.removesuffix(".value") for name in names]  # of an NNX variable


def _folder(directory: str | Path) -> Path:
    # Orbax wants an absolute path.
    return Path(directory).absolute() / "checkpoints"


class Restored(NamedTuple):
    """A state after `step` updates, which have consumed `position` batches; `recent`
    are the losses of the last ones."""

    state: Any
    position: int
    step: int
    recent: list[float]


class Checkpoints:
    """The checkpoints of one run; a context manager, which waits for the last write.

    `settings` (JSON-able) is what a checkpoint must agree with to be resumed: the
    sections of the config that make the state and its meaning, not the mesh. `keep`
    is how many are kept. `held` bounds the copies of arrays in host memory while they
    are written, in GB (None: all at once), and has arrays written in pieces.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        settings: Mapping[str, Any],
        keep: int,
        held: int | None = None,
    ) -> None:
        self.folder = _folder(directory)
        self.settings = json.loads(json.dumps(dict(settings), default=list))
        self.piece = None if held is None else _PIECE
        self.manager = ocp.CheckpointManager(
            self.folder,
            item_names=ITEMS,
            item_handlers={} if held is None else _bounded(held),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                cleanup_tmp_directories=True,  # what a killed run left half-written
            ),
        )

    def save(
        self, step: int, state: Any, position: int, recent: Iterable[float] = ()
    ) -> None:
        """Starts writing; returns once the arrays are copied and may be donated.

        `position` is the number of batches consumed, `recent` the losses of the last
        steps. Raises OSError where this or the previous write failed, the checkpoints
        before it are whole; the error itself where another process is lost.
        """
        arrays = dict(zip(leaf_names(state), jax.tree.leaves(state), strict=True))
        kinds = {name: _kind(array) for name, array in arrays.items()}
        meta = {"position": position, "recent": list(recent)}
        meta |= {"settings": self.settings, "arrays": kinds}
        each = dict.fromkeys(arrays, ocp.SaveArgs(chunk_byte_size=self.piece))
        try:
            self.manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(
                        arrays, each, ocdbt_target_data_file_size=self.piece
                    ),
                    meta=ocp.args.JsonSave(meta),
                ),
                force=True,  # when to save is the loop's business
            )
        except Exception as error:
            raise self._write_error(error) from error

    def wait(self) -> None:
        """Blocks until the last write is on disk; OSError where it failed."""
        try:
            self.manager.wait_until_finished()
        except Exception as error:
            raise self._write_error(error) from error

    def _write_error(self, error: Exception) -> OSError:
        if peer_lost(error):
            raise error
        whole = sorted(ocp.path.step.checkpoint_steps(self.folder))
        rest = f"step {whole[-1]} is whole" if whole else "there is none before it"
        return OSError(
            f"a checkpoint could not be written to {self.folder} ({_brief(error)}); "
            f"{rest}: make room there and run the same command again"
        )

    def position(self) -> int:
        """The number of batches that the newest checkpoint has consumed, 0 without."""
        self.wait()
        step = self.manager.latest_step()
        return 0 if step is None else _read_meta(self.folder / str(step))["position"]

    def restore_latest(self, abstract_state: Any) -> Restored | None:
        """The newest state; None where there is no checkpoint.

        `abstract_state` has a `jax.ShapeDtypeStruct` with a sharding for every leaf;
        the checkpoint may have been written on another mesh. Raises ValueError where
        it was made with other settings or cannot be read.
        """
        step = self.manager.latest_step()
        if step is None:
            return None
        place = self.folder / str(step)
        meta = _read_meta(place)
        _check_settings(place, meta["settings"], self.settings)
        state = _restore(place, meta, abstract_state, prefix="")
        recent = meta["recent"] if "recent" in meta else []  # of a first release
        return Restored(state, meta["position"], step, recent)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: Any, error: Any, _: Any) -> None:
        failed = isinstance(error, jax.errors.JaxRuntimeError)
        if peer_lost(error) or failed and jax.process_count() > 1:
            return  # another process may be gone: whatever is waited for never comes
        try:
            self.wait()
        except OSError:
            if kind is None:  # else the first error is the one to see
                raise
        finally:
            self.manager.close()


def latest_step(directory: str | Path) -> int:
    """The newest step under `directory`; FileNotFoundError where there is none."""
    folder = _folder(directory)
    steps = ocp.path.step.checkpoint_steps(folder) if folder.is_dir() else ()
    if not steps:
        raise FileNotFoundError(
            f"no checkpoint in {folder}: train there first, or give another directory"
        )
    return max(steps)


def load_model(
    directory: str | Path,
    abstract_model: Any,
    step: int | None = None,
    *,
    field: str = "model",
    settings: Mapping[str, Any] | None = None,
) -> Any:
    """One field of a saved state (default its model), without the optimizer.

    Leaves of `abstract_model` without a sharding go to the first device. `step` None
    is the newest. What `settings` says must be what the checkpoint was made with; the
    checkpoint may say more. Raises FileNotFoundError where there is no such checkpoint
    and ValueError where it holds another model or is damaged.
    """
    step = latest_step(directory) if step is None else step
    folder = _folder(directory)
    if not (folder / str(step)).is_dir():
        raise FileNotFoundError(
            f"no checkpoint of step {step} in {folder}, only of "
            f"{sorted(ocp.path.step.checkpoint_steps(folder))}"
        )
    place = folder / str(step)
    meta = _read_meta(place)
    given = json.loads(json.dumps(dict(settings or {}), default=list))
    saved = {key: x for key, x in meta["settings"].items() if key in given}
    _check_settings(place, saved, given)
    return _restore(place, meta, abstract_model, prefix=f"{field}.")


def _bounded(held: int) -> dict[str, Any]:
    state = ocp.PyTreeCheckpointHandler(save_device_host_concurrent_gb=held)
    return {"state": state, "meta": ocp.JsonCheckpointHandler()}


def _kind(array: Any) -> str:
    """What a leaf is, as `float32[16, 128]`."""
    return f"{array.dtype}{list(array.shape)}"


def _check_settings(place: Path, saved: Any, wanted: Any) -> None:
    different = list(_differences(saved, wanted))
    if different:
        raise ValueError(
            f"checkpoint {place} was made with other settings: "
            f"{'; '.join(different[:5])}. Use those, or another directory"
        )


def _read_meta(place: Path) -> dict[str, Any]:
    handler = ocp.JsonCheckpointHandler()
    return _read(place, "meta", handler, ocp.args.JsonRestore())


def _restore(place: Path, meta: dict[str, Any], abstract: Any, prefix: str) -> Any:
    """The leaves of `abstract` whose saved names start with `prefix`, as its tree."""
    leaves, structure = jax.tree.flatten(abstract)
    here = SingleDeviceSharding(jax.local_devices()[0])
    names = [prefix + name for name in leaf_names(abstract)]
    for name, leaf in zip(names, leaves, strict=True):
        saved = meta["arrays"][name] if name in meta["arrays"] else "absent"
        # Converted checkpoints may have fewer bits than a state; Orbax widens them.
        if _kind(leaf) not in (saved, saved.replace("bfloat16[", "float32[")):
            raise ValueError(
                f"checkpoint {place} is of another model: {name} is {saved} there and "
                f"{_kind(leaf)} here. Use the config that it was made with"
            )
    for name in meta["arrays"]:
        if name.startswith(prefix) and name not in names:
            raise ValueError(
                f"checkpoint {place} is of another model: {name} is there and absent "
                "here. Use the config that it was made with"
            )
    wanted = {
        name: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=leaf.sharding or here
        )
        for name, leaf in zip(names, leaves, strict=True)
    }
    restore = ocp.args.PyTreeRestore(
        item=wanted,
        restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
        partial_restore=True,
    )
    arrays = _read(place, "state", ocp.PyTreeCheckpointHandler(), restore)
    return structure.unflatten([arrays[name] for name in names])


def _read(place: Path, item: str, handler: Any, args: Any) -> Any:
    try:
        with ocp.Checkpointer(handler) as checkpointer:
            return checkpointer.restore(place / item, args=args)
    except Exception as error:
        if not _is_damage(error):
            raise
        raise ValueError(
            f"checkpoint {place} cannot be read, it is damaged ({_brief(error)}). "
            "Delete that folder to go on from the one before it"
        ) from error


def _is_damage(error: BaseException) -> bool:
    """Whether reading failed for a file that is missing, short or garbled.

    Not for want of memory, of permission or of the network: those have words of their
    own, and the checkpoint is whole.
    """
    broken = (json.JSONDecodeError, UnicodeDecodeError, FileNotFoundError)
    cause: BaseException | None = error
    while cause is not None:
        # TensorStore, below Orbax, says what is wrong by the first word of its message.
        if isinstance(cause, broken) or str(cause).startswith(_DAMAGE):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def _brief(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def _differences(old: Any, new: Any, name: str = "") -> Any:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in itertools.chain(old, (key for key in new if key not in old)):
            yield from _differences(
                old[key] if key in old else "absent",
                new[key] if key in new else "absent",
                f"{name}.{key}" if name else key,
            )
    elif old != new:
        yield f"{name} was {old}, is {new}"
