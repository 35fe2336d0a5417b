"""Models that people use, by the configurations that their authors published: nothing of them is made but shapes."""

import json
import math

import jax
import jax.numpy as jnp
import pytest
from published import PUBLISHED

from ppo_jax import hub
from ppo_jax.hub.families import FAMILIES
from ppo_jax.models import ActorCritic
from ppo_jax.sharding import make_mesh, param_shardings


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_and_shardings(name, tmp_path):
    """As many parameters as published, to the unit; each is placed, and every matrix is cut over eight devices."""
    published = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(published.config))
    config = hub.load_config(tmp_path)
    tokens = jnp.zeros((1, 1), jnp.int32)
    params = jax.eval_shape(ActorCritic(config).init, jax.random.key(0), tokens, tokens == 0)["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params["decoder"])) == published.parameters
    shardings = param_shardings(make_mesh(1, 4, 2), params)
    for leaf, sharding in zip(jax.tree.leaves(params["decoder"]), jax.tree.leaves(shardings["decoder"]), strict=True):
        if leaf.ndim >= 2 and leaf.shape[-1] != config.num_experts:  # routers are small
            shard = sharding.shard_shape(leaf.shape)
            assert math.prod(shard) * 8 == leaf.size, (leaf.shape, sharding.spec)


def test_a_member_of_every_family():
    assert {published.config["model_type"] for published in PUBLISHED.values()} == FAMILIES.keys() - {"gpt2"}
