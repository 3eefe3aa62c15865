"""Where arrays stand on a mesh, what is read from a compiled program, and how the largest batch is found."""

import dataclasses
import functools
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console

import jaxpeft
from jaxpeft import cli, data, train, trees
from jaxpeft.models import Decoder, DecoderConfig, model_from_config
from jaxpeft.models.folder import ModelFolderError
from jaxpeft.models.presets import PRESETS, preset
from jaxpeft.train import hlo
from jaxpeft.train.activations import shard_activations
from jaxpeft.train.plan import (
    Plan,
    PlanConfig,
    PlanError,
    batch_for,
    method_for,
    model_for,
    read_pod,
    wanted_bytes,
)
from jaxpeft.train.plan_search import largest
from jaxpeft.train.plan_table import plan_table
from jaxpeft.train.sharding import base_specs, beside, state_specs

CONFIG = DecoderConfig(
    vocab=64,
    family="llama",
    width=16,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=4,
    mlp_width=32,
    activation="silu",
    gated=True,
    norm="rms",
    pre_norm=True,
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
    tied=False,
    scan=True,
    remat=True,
)
IDS = np.random.default_rng(0).integers(0, 64, (8, 6)).astype(np.int32)
BATCH = data.TextBatch(IDS, np.ones_like(IDS), np.zeros(8, np.int32), np.ones(8, np.float32), np.arange(8))


@functools.cache
def base():
    return jax.jit(Decoder(CONFIG).init)(jax.random.key(0), IDS[:1])


@functools.cache
def cube():
    return train.make_mesh(2, 2, 2)


# ------------------------------------------------------------------------------------------------ where arrays stand


def test_weights_are_divided_by_the_rules_of_their_paths():
    specs = trees.by_path(base_specs(cube(), base()), is_leaf=lambda x: isinstance(x, P))
    assert specs["params/layers/attention/query/kernel"] == P(None, "fsdp", "tensor")
    assert specs["params/layers/attention/out/kernel"] == P(None, "tensor", "fsdp")
    assert specs["params/layers/mlp/down/kernel"] == P(None, "tensor", "fsdp")
    assert specs["params/embeddings/word/embedding"] == P("tensor", "fsdp")
    assert specs["params/lm_head/kernel"] == P("fsdp", "tensor")


def test_what_an_axis_does_not_divide_stays_whole():
    mesh = train.make_mesh(1, 1, 8)
    spec = base_specs(mesh, {"query": {"kernel": np.ones((16, 12))}, "up": {"kernel": np.ones((4, 16))}})
    assert spec == {"query": {"kernel": P()}, "up": {"kernel": P(None, "tensor")}}


def test_a_delta_and_its_optimiser_are_placed_with_the_weight():
    adapted = jaxpeft.adapt(Decoder(CONFIG).apply, jaxpeft.lora(rank=2, at="**/{query,out}/kernel"))
    delta = jax.eval_shape(adapted.init, jax.random.key(0), base(), IDS)
    state = jax.eval_shape(lambda d: train.create(d, optax.adam(1e-3)), delta)
    specs = trees.by_path(state_specs(cube(), state, base()), is_leaf=lambda x: isinstance(x, P))
    for kept in ("learned", "optimiser/0/mu", "optimiser/0/nu"):
        assert specs[f"{kept}/params/layers/attention/query/kernel/a"] == P(None, "fsdp", None)
        assert specs[f"{kept}/params/layers/attention/query/kernel/b"] == P(None, None, "tensor")
        assert specs[f"{kept}/params/layers/attention/out/kernel/a"] == P(None, "tensor", None)
        assert specs[f"{kept}/params/layers/attention/out/kernel/b"] == P(None, None, "fsdp")
    assert specs["step"] == P()


@given(
    stack=st.lists(st.integers(2, 4), max_size=1),
    inner=st.lists(st.integers(5, 7), min_size=1, max_size=2),
    outer=st.lists(st.integers(8, 10), min_size=1, max_size=2),
)
def test_factors_have_the_axes_of_the_part_of_the_weight_that_they_span(stack, inner, outer):
    weight = (*stack, *inner, *outer)
    names = tuple(f"axis {i}" for i in range(len(weight)))
    spec, s = P(*names), len(stack)
    assert beside((*stack, *inner, 1), weight, spec) == P(*names[: s + len(inner)], None)
    assert beside((*stack, 1, *outer), weight, spec) == P(*names[:s], None, *names[s + len(inner) :])
    assert beside(weight, weight, spec) == spec
    assert beside((3,), weight, spec) == P()


@pytest.mark.parametrize(
    "method",
    [jaxpeft.lora(rank=2), jaxpeft.full(), jaxpeft.lst(reduction=2, init="random")],
    ids=lambda m: m.name,
)
def test_a_divided_step_gives_the_numbers_of_one_device(method, close, quick):
    def step_of(adapted):
        return jax.jit(train.make_step(adapted, train.language_modelling(), optax.sgd(0.1)))

    adapted = jaxpeft.adapt(Decoder(CONFIG).apply, method)
    delta = jax.jit(adapted.init)(jax.random.key(1), base(), IDS)
    single = train.create(delta, optax.sgd(0.1))
    many = train.place_state(cube(), single, base())
    single, a = step_of(adapted)(single, base(), BATCH)
    step = step_of(adapted._replace(apply=shard_activations(adapted.apply, cube())))
    many, b = step(many, train.place_base(cube(), base()), train.place_batch(cube(), BATCH))
    close(a, jax.device_get(b))
    close(single.learned, jax.device_get(many.learned))


def test_activations_are_divided_where_the_mesh_divides_them():
    def text(what, ids=IDS):
        return jax.jit(shard_activations(Decoder(CONFIG).apply, cube(), what)).lower(base(), ids).as_text()

    hidden, heads = '[{"data", "fsdp"}, {"tensor"}, {}]', '[{"data", "fsdp"}, {}, {"tensor"}, {}]'
    inner = '[{"data", "fsdp"}, {}, {"tensor"}]'
    # In and out of a block; queries, keys, values, the result; up and gate.
    for what in ((), ("hidden",), ("heads",), ("inner",), ("hidden", "heads", "inner")):
        found = [text(what).count(spec) for spec in (hidden, heads, inner)]
        assert found == [2 * ("hidden" in what), 4 * ("heads" in what), 2 * ("inner" in what)]
    assert "[{}, {}, {}]" in text(("hidden",), IDS[:3, :5])
    with pytest.raises(ValueError, match="'logits' is nothing that is divided: expected some of hidden, heads, inner"):
        text(("logits",))


def test_the_blocks_of_a_side_network_are_divided_too():
    adapted = jaxpeft.adapt(Decoder(CONFIG).apply, jaxpeft.lst(reduction=2, init="random"))
    delta = jax.eval_shape(adapted.init, jax.random.key(1), base(), IDS)
    run = jax.jit(shard_activations(adapted.apply, cube(), ["hidden"]))
    # In and out of the backbone's block and of the side network's.
    assert run.lower(base(), delta, IDS).as_text().count('[{"data", "fsdp"}, {"tensor"}, {}]') == 4


# ------------------------------------------------------------------------------------------------ reading a program


def test_collectives_in_a_loop_count_as_often_as_it_turns(mesh):
    def loop(x, w):
        def body(x, w):
            y = jax.lax.with_sharding_constraint(x @ w, NamedSharding(mesh, P()))
            return jnp.tanh(y), None

        return jax.lax.scan(body, x, w)[0]

    def placed(shape, *spec):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))

    for turns in (3, 5):
        program = jax.jit(loop).lower(placed((4, 8)), placed((turns, 8, 8), None, "d", None)).compile()
        found = hlo.collectives(program.as_text())
        moved = sum(c.bytes for c in found.values())
        assert sum(c.count for c in found.values()) >= turns
        assert moved % turns == 0
        assert moved > 0
        if turns == 3:
            once = moved // turns
    assert moved // 5 == once


TEXT = """HloModule step

%body (p: (f32[8,4], s32[])) -> (f32[8,4], s32[]) {
  %p = (f32[8,4]{1,0}, s32[]) parameter(0)
  %gather = bf16[8,4]{1,0:T(8,128)(2,1)} all-gather(%x), channel_id=3, replica_groups=[2,4]<=[8], dimensions={0}
  %start = (f32[8,4]{1,0}, s32[2]{0}) fusion(%x), kind=kCustom, calls=%started
  %middle = f32[8,4]{1,0} fusion(%x), kind=kCustom, calls=%async_collective_fusion.1, backend_config={"estimated_cycles":"100"}
  %i = s32[] get-tuple-element(%p), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %end = f32[8,4]{1,0} fusion(%x), kind=kCustom, calls=%ended
  ROOT %t = (f32[8,4]{1,0}, s32[]) tuple(%y, /*index=1*/%next)
}

%started (x: f32[2,4]) -> f32[8,4] {
  %g1 = f32[8,4]{1,0} all-gather(%x), channel_id=5, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  ROOT %c1 = f32[8,4]{1,0} custom-call(%g1), custom_call_target="AsyncCollectiveStart"
}

%ended (x: f32[2,4]) -> f32[8,4] {
  %g3 = f32[8,4]{1,0} all-gather(%x), channel_id=5, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  ROOT %c3 = f32[8,4]{1,0} custom-call(%g3), custom_call_target="AsyncCollectiveDone"
}

%async_collective_fusion.1 (x: f32[2,4]) -> f32[8,4] {
  %g2 = f32[8,4]{1,0:S(1)} all-gather(%x), channel_id=5, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  ROOT %c = f32[8,4]{1,0} convolution(%x, %w), backend_config={"estimated_cycles":"7"}
}

%condition (p: (f32[8,4], s32[])) -> pred[] {
  %bound = s32[]{:T(128)} constant(6)
  %i = s32[] get-tuple-element(%p), index=1
  ROOT %lt = pred[]{:T(512)} compare(%i, %bound), direction=LT
}

%all-reduce-scatter.1 (x: f32[16]) -> f32[8] {
  ROOT %r = f32[16]{0} all-reduce(%x), channel_id=7, replica_groups=mesh['a'=2,'b'=4] {'a'}, to_apply=%add
}

ENTRY %main (x: f32[8,4]) -> f32[8,4] {
  %loop = (f32[8,4]{1,0}, s32[]) while(%init), condition=%condition, body=%body
  %rs = f32[8]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1, backend_config={"estimated_cycles":"11"}
  %s = (f32[16]{0}, f32[16]{0}, u32[], u32[]) collective-permute-start(%x), channel_id=9, source_target_pairs={{0,1}}
  ROOT %ar = (f32[16]{0}, f32[4]{0}) all-reduce(%x, %y), channel_id=8, replica_groups=[1,8]<=[8], to_apply=%add
}
"""


def test_each_kind_of_collective_is_counted_once_with_the_bytes_that_it_sends():
    found = hlo.collectives(TEXT)
    assert found["all-gather"] == hlo.Collective(12, 6 * round(3 / 4 * (8 * 4 * 2 + 8 * 4 * 4)))
    assert found["reduce-scatter"] == hlo.Collective(1, 16 * 4 // 2)
    assert found["collective-permute"] == hlo.Collective(1, 16 * 4)
    assert found["all-reduce"] == hlo.Collective(1, round(2 * 7 / 8 * 20 * 4))
    assert hlo.estimated_cycles(TEXT) == 6 * 100 + 11


def test_a_known_number_of_turns_goes_before_the_condition():
    known = TEXT.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"2"}}')
    assert hlo.collectives(known)["all-gather"].count == 4


def test_a_loop_that_counts_by_twos_turns_half_as_often():
    twos = TEXT.replace("%one = s32[] constant(1)", "%one = s32[] constant(2)")
    assert hlo.collectives(twos)["all-gather"].count == 6


def test_a_loop_of_unknown_length_and_a_foreign_text_are_refused():
    with pytest.raises(hlo.HloError, match="how often this loop turns is not told: %loop"):
        hlo.collectives(TEXT.replace("constant(6)", "parameter(1)"))
    with pytest.raises(hlo.HloError, match="no ENTRY computation"):
        hlo.collectives("nothing")


# ------------------------------------------------------------------------------------------------ the search, the words


@given(fixed=st.integers(0, 500), each=st.integers(1, 50), bend=st.integers(0, 3), limit=st.integers(1, 2000))
def test_the_largest_batch_is_found_where_memory_grows_nearly_along_a_line(fixed, each, bend, limit):
    calls = []

    def total(n):
        calls.append(n)
        return fixed + each * n + bend * (n // 5)

    found = largest(total, limit, 40)
    assert found == max([n for n in range(1, 2100) if fixed + each * n + bend * (n // 5) <= limit], default=0)
    assert len(calls) == len(set(calls)) <= 40
    if found and not bend:
        assert len(calls) <= 5


def test_the_bytes_a_refusing_compiler_wanted_are_read():
    message = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 23.54G of 15.75G hbm. Exceeded by 7.79G"
    assert wanted_bytes(message, 5) == round(23.54 * 2**30)
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (4.05T) exceeds"
    )
    assert wanted_bytes(message, 5) == round(4.05 * 2**40) + 5
    assert wanted_bytes("INTERNAL: something else", 5) is None


def test_pods_are_read_and_wrong_ones_refused():
    assert read_pod("v5e:16x16") == ("v5e", "16x16", 256)
    assert read_pod("h100:8") == ("h100", "1x1x8", 8)
    assert read_pod("v4:2x2x1") == ("v4", "2x2x1", 8)  # two devices a chip
    with pytest.raises(PlanError, match=r"pod 'v5x:4x4'; did you mean 'v5[ep]'.*v5e:16x16"):
        read_pod("v5x:4x4")
    for wrong in ("v5e", "v5e:4-4", "v5e:0x4"):
        with pytest.raises(PlanError, match="pod"):
            read_pod(wrong)


@pytest.mark.parametrize("name", PRESETS)
def test_every_published_configuration_makes_its_model(name):
    model = model_from_config(preset(name), scan=True)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *model.dummy_inputs())
    millions = {"llama-3-8b": 8030, "llama-3-70b": 70554, "llama-2-7b": 6738, "gpt2": 124, "gpt2-xl": 1558}
    millions |= {"bert-base": 109, "bert-large": 335, "vit-b-16": 87, "vit-l-16": 304}
    assert trees.count(shapes) / 1e6 == pytest.approx(millions[name], abs=1)


def test_an_own_config_is_read_and_an_unknown_name_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PRESETS["gpt2"]))
    assert preset(tmp_path) == preset(tmp_path / "config.json") == PRESETS["gpt2"]
    with pytest.raises(ModelFolderError, match=r"no model 'llama-3-8' \(near: llama-3-8b\).*config.json"):
        preset("llama-3-8")


def test_batches_and_methods_follow_the_model():
    config = PlanConfig(model="vit-b-16", rows=4)
    model, _ = model_for(config)
    assert batch_for(config, model).image.shape == (4, 224, 224, 3)
    assert method_for(config, model).name == "chain"
    config = PlanConfig(model="gpt2", rows=4, length=32, options=("rank=3",))
    model, _ = model_for(config)
    assert batch_for(config, model).input_ids.shape == (4, 32)
    assert method_for(config, model).config["rank"] == 3


def test_a_model_that_no_step_is_known_for_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PRESETS["bert-base"] | {"architectures": ["BertModel"]}))
    with pytest.raises(PlanError, match="is a Encoder: plans are made for decoders"):
        model_for(PlanConfig(model=str(tmp_path)))


def test_the_command_says_in_one_line_what_is_wrong(capsys, monkeypatch):
    monkeypatch.setattr("jaxpeft.train.plan.prepare", lambda: None)  # it is for a process of its own
    for arguments, message in (
        (["--pod", "v5x:4x4"], "PlanError: pod 'v5x:4x4'"),
        (["--model", "llama-3-8"], "ModelFolderError: no model 'llama-3-8'"),
    ):
        assert cli.main(["plan", *arguments]) == 1
        assert message in capsys.readouterr().err


def test_a_plan_is_shown_as_one_column_a_batch():
    gathered = {"all-gather": hlo.Collective(3, 2_000_000)}
    sizes = dict(base=10**9, delta=1, optimiser=2, batch=3, arguments=4, temporaries=5, limit=16 * 10**9)
    p = Plan(
        PlanConfig(),
        {"data": 1},
        **sizes,
        total=6,
        fits=True,
        collectives=gathered,
        cycles=3_000_000,
        seconds=0.002,
        compile_seconds=1.0,
    )
    refused = dataclasses.replace(p, config=PlanConfig(rows=32), fits=False, collectives={}, cycles=0)
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(plan_table([p, refused]))
    text = console.export_text()
    for words in (
        "16 x 2048",
        "32 x 2048",
        "1.0 GB",
        "all-gather 3 x, 2.0 MB",
        "3.0 million cycles, 0.002 s",
        "yes",
        "no",
    ):
        assert words in text
