"""`config.json` to `ModelConfig` and back. What a key would change and we cannot compute is an error, never ignored.

Every key is one of four: it sets a field (`Family.keys`, `Family.codecs`); it must have a value that we compute
(`Family.only`, `ONLY`); it is known to change no logit (`Family.irrelevant`, `IRRELEVANT`); or it is unknown. An
unknown key that is null, false, zero or empty is an option that is switched off; any other is refused by name.
"""

import dataclasses
import json
import pathlib
import reprlib
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from ppo_jax.errors import InputError
from ppo_jax.hub.errors import HubError
from ppo_jax.hub.families import FAMILIES
from ppo_jax.hub.family import Family, Model
from ppo_jax.hub.keys import ACTIVATIONS, read_key, words
from ppo_jax.models import ModelConfig, RewardModel

ONLY: Mapping[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "is_causal": (True,),
}
"""Keys of every family, with the values that we can compute."""

QUANTISED = ("quantization_config", "quantization", "compression_config")
"""Keys that say that the weights are not simply numbers."""

MOST_LAYERS = 10_000
"""Beyond this a file lies, and lists that have an item for each layer are not made."""

IRRELEVANT = words(
    # what the file is, and for whom
    "model_type architectures transformers_version torch_dtype dtype name_or_path _name_or_path _model_name_or_path "
    "_commit_hash internal_version "
    "_attn_implementation _attn_implementation_autoset _from_model_config transformers.js_config unsloth_version "
    "unsloth_fixed tokenizer_class",
    # how it is run and what is returned
    "use_cache output_hidden_states output_attentions return_dict torchscript use_bfloat16 is_decoder "
    "gradient_checkpointing chunk_size_feed_forward cache_implementation",
    # tokens and generation
    "bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id decoder_start_token_id task_specific_params "
    "prefix max_length max_new_tokens min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty "
    "temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size num_return_sequences "
    "encoder_no_repeat_ngram_size bad_words_ids output_scores return_dict_in_generate forced_bos_token_id "
    "forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens",
    # classification heads: see `check_one_label`; a causal language model has none
    "id2label label2id num_labels _num_labels problem_type finetuning_task",
)
"""Keys of every family that change no logit."""

ONE_LABEL: Mapping[str, Any] = {
    "id2label": {"0": "LABEL_0"},
    "label2id": {"LABEL_0": 0},
    "problem_type": "regression",
}
"""What makes a classification model one that gives a number. `problem_type` keeps the pipelines of transformers from
squashing it.
"""


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        HubError: the file is missing, unreadable, or holds anything else.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a number")

    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except FileNotFoundError:
        raise HubError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise HubError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(value, dict):
        raise HubError(f"{path}: got {reprlib.repr(value)}, expected a JSON object")
    return value


def read_family(raw: Mapping[str, Any], where: object) -> Family:
    """The family that `model_type` names.

    Raises:
        HubError: an unknown one, with the list of those that are known.
    """
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise HubError(f"{where}: model_type {reprlib.repr(model_type)} is not supported, only {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def read_config(raw: Mapping[str, Any], where: object, dtype: str, param_dtype: str) -> ModelConfig:
    """The model that a parsed `config.json` describes.

    Args:
        raw: the parsed file.
        where: its path, for messages.
        dtype: of the computation.
        param_dtype: of the parameters.

    Raises:
        HubError: a key that is missing, has a wrong type, or would change what is computed.
    """
    family = read_family(raw, where)
    for name in QUANTISED:
        if raw.get(name):
            raise HubError(f"{where}: {name}: quantised weights are not supported, expected the model before it was so")
    known = {key.name for key in family.keys.values()}.union(*(codec.keys for codec in family.codecs))
    check_keys(raw, {**ONLY, **family.only}, IRRELEVANT | family.irrelevant | known, where)
    fields = {field: read_key(raw, key, where) for field, key in family.keys.items()}
    if fields["mlp_width"] is None:
        fields["mlp_width"] = 4 * fields["width"]
    fields = {field: value for field, value in fields.items() if value is not None}
    if fields["num_layers"] > MOST_LAYERS:
        raise HubError(f"{where}: got {fields['num_layers']} layers, expected at most {MOST_LAYERS}")
    try:
        for codec in family.codecs:
            fields |= codec.read(raw, fields, where)
        named = {"family": raw["model_type"], "dtype": dtype, "param_dtype": param_dtype}
        return ModelConfig(**fields, **family.implied, **named)
    except HubError:
        raise
    except InputError as error:
        raise HubError(f"{where}: {error}") from error


def check_one_label(raw: Mapping[str, Any], where: object) -> None:
    """Refuses a classification model that is said to have more labels than one; nothing said is nothing against it.

    Raises:
        HubError: another number of labels, or what is no number of labels.
    """
    names = raw.get("id2label")
    counts = {"num_labels": raw.get("num_labels"), "id2label": len(names) if isinstance(names, dict) else names}
    for name, count in counts.items():
        if count not in (None, 1):
            raise HubError(f"{where}: {name}: got {reprlib.repr(count)} labels, expected one: a reward")


def write_config(model: Model, param_dtype: str, token_ids: Mapping[str, Any]) -> dict[str, Any]:
    """`config.json` of a model, with the keys of transformers 4, which 5 and the other readers understand as well.

    Args:
        model: the module.
        param_dtype: of the tensors in the file.
        token_ids: `bos_token_id` and its like.

    Raises:
        HubError: no family can express it.
    """
    model_type = family_that_holds(model.config)
    family = FAMILIES[model_type]
    head = {"architectures": [family.architectures[type(model)]], "model_type": model_type, "torch_dtype": param_dtype}
    labels = ONE_LABEL if isinstance(model, RewardModel) else {}
    return {**head, **_write_fields(family, model.config), **labels, **token_ids}


def family_that_holds(config: ModelConfig) -> str:
    """The `model_type` whose files can express this model: that of the configuration, or else the first one.

    Raises:
        HubError: there is none, or not the one that the configuration names.
    """
    names = [config.family] if config.family else list(FAMILIES)
    if config.family and config.family not in FAMILIES:
        raise HubError(f"family {config.family!r} is not supported, only {', '.join(FAMILIES)}")
    for model_type in names:
        if _holds(model_type, config):
            return model_type
    fields = ((field, getattr(config, field.name)) for field in dataclasses.fields(config))
    described = ", ".join(f"{field.name}={value!r}" for field, value in fields if value != field.default)
    raise HubError(f"no family of {', '.join(names)} has files for a model of {described}")


def _holds(model_type: str, config: ModelConfig) -> bool:
    """Whether what is written of a model, read again, is that model; how it is trained is not written."""
    if config.width % config.num_heads:
        return False  # their classes refuse it, even where head_dim is given
    raw = {"model_type": model_type, **_write_fields(FAMILIES[model_type], config)}
    try:
        read = read_config(raw, "config", config.dtype, config.param_dtype)
    except HubError:
        return False
    return read == dataclasses.replace(config, family=model_type, lora_scale=1.0, remat=read.remat)


def _write_fields(family: Family, config: ModelConfig) -> dict[str, Any]:
    written = {key.name: getattr(config, field) for field, key in family.keys.items()}
    for key in family.keys.values():
        if key.kind is str:
            written[key.name] = ACTIVATIONS[written[key.name]][0]
    for codec in family.codecs:
        written |= codec.write(config)
    return written


def check_keys(
    raw: Mapping[str, Any], only: Mapping[str, Sequence[Any]], known: AbstractSet[str], where: object
) -> None:
    """Refuses what would change the computation and what nobody understands.

    Args:
        raw: a parsed configuration file.
        only: keys with the values that we can compute; null is one of them.
        known: keys that may say anything here.
        where: path of the file, for messages.

    Raises:
        HubError: another value of `only`, or any other key that is not null, false, zero or empty.
    """
    for name, allowed in only.items():
        value = raw.get(name)
        if value is not None and value not in allowed:
            raise HubError(f"{where}: {name}: got {reprlib.repr(value)}, only {allowed[0]} is supported")
    unknown = [name for name, value in raw.items() if value and name not in known | only.keys()]
    if unknown:
        named = ", ".join(reprlib.repr(name) for name in unknown[:5])
        raise HubError(f"{where}: not understood: {named}; it may change what the model computes (if not, remove it)")
