import json

import pytest
from pydantic import ValidationError

from trainer.config import TrainConfig


def test_defaults_of_the_seed_system():
    config = TrainConfig()
    assert (config.expansion, config.k, config.auxk, config.auxk_coef) == (16, 32, 256, 1 / 32)
    assert (config.adam_betas, config.adam_eps, config.dead_after_tokens) == (
        (0.9, 0.999),
        6.25e-10,
        10_000_000,
    )
    assert config.epochs == 1
    assert config.rows is None


def test_resolve_fills_in_numbers_and_survives_json():
    config = TrainConfig(rows=100, auxk=None, layers=(1, 3)).resolve(512)
    assert config.n_latents == 8192
    assert config.auxk == 0
    assert config.lr == pytest.approx(2e-4 * 2**0.5)
    assert TrainConfig.model_validate_json(config.model_dump_json()) == config
    assert config.resolve(512) == config


def test_lr_given_is_kept():
    assert TrainConfig(lr=3e-4, n_latents=64).resolve(8).lr == 3e-4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rows": 5, "epochs": 1}, "rows=5 and epochs=1 both"),
        ({"n_latents": 8, "k": 9}, "k=9"),
        ({"layers": (3, 1)}, "ascending"),
        ({"layers": ["1"]}, "valid integer"),
        ({"latents": 8}, "Extra inputs"),
        ({"k": "32"}, "valid integer"),
        ({"lr": 0.0}, "greater than 0"),
        ({"decay_frac": 1.5}, "less than or equal to 1"),
        ({"loss_space": "z"}, "raw"),
    ],
)
def test_refusals_name_the_field(fields, message):
    with pytest.raises(ValidationError, match=message):
        TrainConfig(**fields)


def test_too_few_latents_for_k_is_found_once_the_width_is_known():
    with pytest.raises(ValueError, match="k=32"):
        TrainConfig(expansion=1).resolve(8)


def test_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        TrainConfig().k = 3
    assert json.loads(TrainConfig().model_dump_json())["k"] == 32
