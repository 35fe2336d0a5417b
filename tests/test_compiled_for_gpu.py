"""What XLA makes of an iteration for an H200, read off its program. Needs no GPU, but `pip install "jax[cuda12]"`."""

import dataclasses
import importlib.util
import math
import re
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from small import PPO, make_bench, random_params, token_set_score

from ppo_jax.models import ModelConfig

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None, reason='compiles for a GPU: pip install "jax[cuda12]"'
)

# What XLA's compiler asks of a GPU. Figures: NVIDIA's H200 datasheet, and its CUDA programming guide for compute
# capability 9.0.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_block_limit: 65536 registers_per_core_limit: 65536 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 device_memory_size: 141000000000
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H200"
"""
LAYERS, HEADS, HEAD_DIM, VOCABULARY = 2, 4, 16, 1031
MODEL = ModelConfig(
    vocab_size=VOCABULARY, num_layers=LAYERS, num_heads=HEADS, num_kv_heads=HEADS, width=HEADS * HEAD_DIM,
    mlp_width=96, max_positions=128, dtype="bfloat16",
)  # fmt: skip
CONFIG = dataclasses.replace(PPO, batch_size=32, prompt_length=18, response_length=40)
CACHE = (CONFIG.batch_size, HEADS, CONFIG.prompt_length + CONFIG.response_length, HEAD_DIM)


@pytest.fixture(scope="module")
def program() -> Iterator[str]:
    """The program of an iteration, as text."""
    gpus = list(topologies.get_topology_desc(platform="cuda", target_config=H200, topology="1x1x1").devices)
    rng = np.random.default_rng(0)
    params = random_params(rng, MODEL)
    fast = jax.config.read("jax_disable_most_optimizations")
    with pytest.MonkeyPatch.context() as elsewhere:
        elsewhere.setattr(jax, "default_backend", lambda: "gpu")
        elsewhere.setattr(jax, "devices", lambda: gpus)
        elsewhere.setattr(jax, "device_count", lambda: len(gpus))
        jax.config.update("jax_disable_most_optimizations", False)
        bench = make_bench(params, MODEL, CONFIG, score=token_set_score)
        given = jax.eval_shape(lambda: (bench.state(), bench.reference(), bench.prompts(rng)))
        lowered = bench.step.iterate.trace(*given, (), None).lower(lowering_platforms=("cuda",))
        yield lowered.compile().as_text()
    jax.config.update("jax_disable_most_optimizations", fast)


def instructions(program: str, computations: str = "") -> Iterator[tuple[str, tuple[int, ...], str]]:
    """(name, shape, operation) of all that stands in the computations whose names begin like this."""
    inside = False
    for line in program.splitlines():
        if line and not line.startswith(" "):
            inside = line.startswith(f"%{computations}")
        parts = re.match(r"\s+(?:ROOT )?%?(\S+) = \w+\[([\d,]*)\]\S* ([\w-]+)\(", line)
        if inside and parts:
            yield parts[1], tuple(int(x) for x in parts[2].split(",") if x), parts[3]


def test_attention_is_cudnn_s(program):
    calls = re.findall(r'custom_call_target="__cudnn\$fmha(\w+)"', program)
    assert calls.count("ScaleBiasSoftmaxBackward") == LAYERS
    # Of the prompts, of the reference, of what acted (in bfloat16 it is asked once more), of the loss, and of the loss
    # again for its gradient.
    assert calls.count("ScaleBiasSoftmax") == 5 * LAYERS


def test_logits_are_never_held(program):
    largest = max(math.prod(shape) for _, shape, _ in instructions(program) if VOCABULARY in shape)
    each = CONFIG.batch_size // CONFIG.num_minibatches
    assert largest < each * CONFIG.response_length * VOCABULARY


def test_a_decode_step_writes_into_the_cache_where_it_lies(program):
    """Within the loops' bodies no operation makes an array as large as the keys of a layer, but what updates them."""
    whole = [(name, how) for name, shape, how in instructions(program, "region") if shape == CACHE]
    made = [name for name, how in whole if how not in ("parameter", "get-tuple-element")]
    assert len(made) == 2 * LAYERS
    assert all(name.startswith("loop_dynamic_update_slice_fusion") for name in made)
