"""Which program each stage runs, for `parallel/plan.py`: `launch/plan.py` asks.

Shapes only: no documents, no checkpoints and none of the hardware have to be there.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cm3leon_jax.decoder_run import decoder_functions
from cm3leon_jax.models import cache as caches
from cm3leon_jax.models import decoder, dual_encoder, unrolled, vqgan
from cm3leon_jax.models.cache import CacheType
from cm3leon_jax.parallel.mesh import MeshConfig, make_mesh
from cm3leon_jax.parallel.plan import Program, report
from cm3leon_jax.parallel.rules import Rules, batch_sharding, shard_fn, shardings
from cm3leon_jax.parallel.topologies import Topology
from cm3leon_jax.retrieval import search
from cm3leon_jax.run_config import RunConfig
from cm3leon_jax.system import System
from cm3leon_jax.training.flops import pair_flops, train_flops_per_token
from cm3leon_jax.training.parts import EVERYTHING, Parts

_PICTURES = 64  # that a device encodes together
_QUERIES = 256
_STREAMS = 2  # with and without the prompt: guidance
_PAIRS = 340_000_000  # the paper's corpus, in its bank


def plan(
    system: System, stage: str, topology: Topology, rows: int | None = None
) -> dict[str, Any]:
    """The report on a stage of a system on a topology.

    `rows`: for training, of a microbatch on each device (its batch stays the config's,
    accumulated); for other stages what a device works on together. Raises ValueError
    for an unknown stage, a section that the system does not have, and for a mesh or
    batch that does not divide.
    """
    mesh = make_mesh(system.mesh, topology.devices)
    if mesh.shape["data"] % topology.slices:  # devices of GPUs do not say their slice
        raise ValueError(
            f"mesh.data={mesh.shape['data']} on {topology.slices} slices: choose a "
            f"multiple of {topology.slices}"
        )
    if stage not in STAGES:
        raise ValueError(f"stage={stage!r}: choose from {', '.join(STAGES)}")
    program = STAGES[stage](system, mesh, rows)
    made = {"config": system.name, "stage": stage, "mesh": dict(mesh.shape)}
    program = dataclasses.replace(program, settings=made | dict(program.settings))
    found = report(program, topology)
    wanted = _wanted(system, stage)
    if found["fits"] and wanted:
        hours = wanted / found[f"{program.unit}_per_second"] / 3600
        found[program.unit] = wanted
        found["device_hours_at_least"] = hours * len(topology.devices)
    return found


def _wanted(system: System, stage: str) -> int:
    """How much of its unit a whole stage does; 0 where nobody can know."""
    if stage in ("pretrain", "sft"):
        settings: RunConfig = getattr(system, stage)
        row = settings.packing.row_length
        return settings.optimizer.steps * settings.batch_size * row
    return _PAIRS if stage in ("tokenize", "embed") else 0


def _training(stage: str, system: System, mesh: Mesh, rows: int | None) -> Program:
    settings: RunConfig | None = getattr(system, stage)
    if settings is None:
        raise ValueError(f"{system.name!r} has no section {stage} in its config")
    parts, ema, tasks = EVERYTHING, 0.0, ()
    if system.sft is not None and stage == "sft":
        parts, ema = Parts(system.sft.parts, system.layout), system.sft.ema
        tasks = system.sft.names
    placed = math.prod(mesh.shape[axis] for axis in system.rules.compute.batch)
    batch, length = settings.batch_size, settings.packing.row_length
    if batch % placed:
        raise ValueError(
            f"{stage}.batch_size={batch} does not divide among the {placed} devices of "
            f"the mesh axes {', '.join(system.rules.compute.batch)}: change one of them"
        )
    if rows is not None:
        microbatches, rest = divmod(batch, placed * rows)
        if rest or not microbatches:
            raise ValueError(
                f"rows_per_device={rows} on {placed} devices does not divide {stage}."
                f"batch_size={batch}"
            )
        settings = dataclasses.replace(settings, microbatches=microbatches)
    retrieval = system.retrieval
    functions = decoder_functions(
        system,
        settings,
        mesh,
        tasks=tuple(tasks),
        retrieved_weight=1.0 if retrieval is None else retrieval.weight,
        parts=parts,
        ema=ema,
    )
    abstract = jax.eval_shape(functions.init, jax.random.key(0))
    placement = shardings(abstract, mesh, system.rules)
    state = jax.tree.map(_placed, abstract, placement)
    spread = batch_sharding(mesh, system.rules)
    kinds: dict[str, Any] = dict.fromkeys(("tokens", "segments", "positions"), "int32")
    kinds["moved"] = "bool"
    if retrieval is not None and stage == "pretrain":
        kinds["retrieved"] = "bool"
    if tasks:
        kinds["task"] = "int32"
    arrays = {
        name: jax.ShapeDtypeStruct((batch, length + 1), kind, sharding=spread)
        for name, kind in kinds.items()
    }
    tokens = batch * length
    everywhere = NamedSharding(mesh, PartitionSpec())
    return Program(
        function=functions.step,
        arguments=(state, arrays),
        donate=(0,),
        out_shardings=(placement, everywhere),
        groups={"parameters": state.model, "optimizer": state.opt, "batch": arrays},
        unit="tokens",
        per_run=tokens,
        model_flops=tokens
        * train_flops_per_token(system.decoder_config, length, parts),
        settings={
            "batch": batch,
            "rows_per_device": batch // placed // settings.microbatches,
            "microbatches": settings.microbatches,
            "remat": system.decoder_config.remat,
        },
    )


def _placed(leaf: Any, where: NamedSharding) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)


def _stored(tree: Any, mesh: Mesh, rules: Rules) -> Any:
    return jax.tree.map(_placed, tree, shardings(tree, mesh, rules))


def decode_step(
    system: System, mesh: Mesh, rows: int | None, cache: CacheType = "bfloat16"
) -> Program:
    """One step of a full context, the first three quarters of it a prompt."""
    config, rules = system.decoder_config, system.rules
    shard, rows = shard_fn(mesh, rules), rows or 32
    prefix = config.length * 3 // 4

    def placed(shape: Any, names: tuple[str | None, ...]) -> Any:
        return _placed(shape, NamedSharding(mesh, rules.compute.spec(names)))

    def stored(tree: Any) -> Any:
        """Keys and values: [U, H, L(, K)] of a prefix, [B, G, H, T(, K)] of steps."""

        def leaf(path: Any, x: Any) -> Any:
            name = jax.tree_util.keystr(path)
            if ".k" not in name and ".v" not in name or "visible" in name:
                return placed(x, (None,) * x.ndim)
            extra = 1 if x.shape[1] == _STREAMS else 0
            names = ("batch", *(None,) * extra, "heads", None, None)
            return placed(x, names[: x.ndim])

        return jax.tree_util.tree_map_with_path(leaf, tree)

    model = jax.eval_shape(
        lambda model: unrolled._unroll(model, "bfloat16", None, lambda x, names: x),
        decoder.abstract(config),
    )
    model = _stored(model, mesh, Rules(store=rules.compute))

    def begin(model: Any) -> Any:
        K = config.width // config.heads
        zeros = jnp.zeros((rows, config.key_heads, prefix, K), jnp.bfloat16)
        vectors = (caches._store(zeros, cache),) * config.layers
        read = caches.Prefix(k=vectors, v=vectors, length_U=jnp.zeros(rows, int))
        past = (read,) * _STREAMS
        left = config.length - prefix
        return past, caches.begin(model, past, rows, left, cache=cache)

    past, now = jax.eval_shape(begin, model)
    token_BG = jax.ShapeDtypeStruct((rows, _STREAMS), jnp.int32)

    def step(model: Any, token_BG: jax.Array, past: Any, now: Any) -> Any:
        return caches.step(model, token_BG, past, now, shard=shard)

    past, now = stored(past), stored(now)
    per_token = train_flops_per_token(config, 2 * config.length) / 3  # all is read
    return Program(
        function=step,
        arguments=(model, placed(token_BG, ("batch", None)), past, now),
        donate=(3,),
        groups={"parameters": model, "cache": (past, now)},
        unit="tokens",
        per_run=rows,
        model_flops=rows * _STREAMS * per_token,
        settings={"rows": rows, "streams": _STREAMS, "cache": cache},
    )


def _spread(mesh: Mesh, shape: tuple[int, ...], kind: Any) -> Any:
    """An array whose rows lie over all devices."""
    where = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    return jax.ShapeDtypeStruct(shape, kind, sharding=where)


def _everywhere(tree: Any, mesh: Mesh) -> Any:
    where = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda leaf: _placed(leaf, where), tree)


def _tokenize(system: System, mesh: Mesh, rows: int | None) -> Program:
    config = system.image_tokenizer.model
    model, count = vqgan.abstract(config), (rows or _PICTURES) * mesh.size
    side = config.image_size

    def encode(model: Any, images_BYXC: jax.Array) -> jax.Array:
        return model.encode(vqgan.to_float(images_BYXC))

    model = _everywhere(model, mesh)
    images = _spread(mesh, (count, side, side, 3), jnp.uint8)
    return Program(
        function=encode,
        arguments=(model, images),
        groups={"parameters": (model.encoder, model.codebook), "batch": images},
        unit="pictures",
        per_run=count,
        model_flops=None,  # no formula: there is what the compiler counts
        settings={"rows_per_device": count // mesh.size},
    )


def _embed(system: System, mesh: Mesh, rows: int | None) -> Program:
    if system.retrieval is None:
        raise ValueError(f"{system.name!r} has no section retrieval in its config")
    config = system.retrieval.encoder.model or dual_encoder.VIT_B_32
    model, count = dual_encoder.abstract(config), (rows or _PICTURES) * mesh.size
    side = config.image_size

    def embed(model: Any, images: jax.Array, ids: jax.Array, length: jax.Array) -> Any:
        return model.image(dual_encoder.to_float(images)), model.text(ids, length)

    model = _everywhere(model, mesh)
    batch = (
        _spread(mesh, (count, side, side, 3), jnp.uint8),
        _spread(mesh, (count, config.text_length), jnp.int32),
        _spread(mesh, (count,), jnp.int32),
    )
    return Program(
        function=embed,
        arguments=(model, *batch),
        groups={"parameters": model, "batch": batch},
        unit="pairs",
        per_run=count,
        model_flops=count * pair_flops(config),
        settings={"rows_per_device": count // mesh.size},
    )


def _search(system: System, mesh: Mesh, rows: int | None) -> Program:
    """One block of the bank, all of it where it fits; `rows` of it on a device."""
    if system.retrieval is None:
        raise ValueError(f"{system.name!r} has no section retrieval in its config")
    encoder = system.retrieval.encoder.model or dual_encoder.VIT_B_32
    count = (rows or -(-_PAIRS // mesh.size // 1024) * 1024) * mesh.size
    bank = (
        _spread(mesh, (count, encoder.embed), system.retrieval.storage),
        _spread(mesh, (count,), jnp.float32),
        _spread(mesh, (count,), jnp.bool_),
    )
    queries = jax.ShapeDtypeStruct((_QUERIES, encoder.embed), jnp.float32)
    tpu = mesh.devices.flat[0].platform == "tpu"

    def best(*arrays: jax.Array) -> Any:
        k = sum(system.retrieval.per_query) if system.retrieval else 0
        return search._best(*arrays, k=k, mesh=mesh, recall=0.99 if tpu else None)

    return Program(
        function=best,
        arguments=(_everywhere(queries, mesh), *bank),
        groups={"bank": bank},
        unit="queries",
        per_run=_QUERIES,
        model_flops=2.0 * _QUERIES * count * encoder.embed,
        settings={"bank_rows": count},
    )


STAGES: dict[str, Callable[[System, Mesh, int | None], Program]] = {
    "pretrain": functools.partial(_training, "pretrain"),
    "sft": functools.partial(_training, "sft"),
    "decode": decode_step,
    "tokenize": _tokenize,
    "embed": _embed,
    "search": _search,
}


def candidates(system: System, stage: str, topology: Topology) -> Iterator[System]:
    """Meshes, rematerialisation and accumulation worth trying: little communication
    first, then little made again, then many rows at once, and so ever less memory."""
    settings: RunConfig | None = getattr(system, stage, None)
    if not isinstance(settings, RunConfig):
        raise ValueError(f"--search is for pretrain and sft, not for stage={stage!r}")
    devices, slices = len(topology.devices), topology.slices
    config = system.decoder_config
    D, F, token = config.width, config.mlp, config.layers * settings.packing.row_length
    kept = {"none": 10 * D + 3 * F, "dots": 6 * D + F, "full": D}  # of a token, about
    state = 12 * decoder.parameter_count(config) / devices
    for tensor, remat in itertools.product((1, 2, 4, 8), ("none", "dots", "full")):
        placed = devices // tensor
        if devices % tensor or config.key_heads % tensor or placed % slices:
            continue
        if settings.batch_size % placed:
            continue
        mesh = MeshConfig(data=slices, fsdp=placed // slices, tensor=tensor)
        each = settings.batch_size // placed
        for rows in (n for n in (16, 8, 4, 2, 1) if each % n == 0):
            kept_bytes = 2 * rows * token * kept[remat] / tensor
            if state + kept_bytes > topology.chip.memory:
                continue  # no need to ask the compiler
            run = dataclasses.replace(settings, microbatches=each // rows)
            yield dataclasses.replace(
                system,
                mesh=mesh,
                decoder={**system.decoder, "remat": remat},
                **{stage: run},
            )
