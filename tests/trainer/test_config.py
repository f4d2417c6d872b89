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
        ({"n_latents": 100, "k": 32, "multi_topk": True}, "k=32 with multi_topk is 128 active latents"),
        (
            {"multi_topk": True, "activation": "batchtopk"},
            "multi_topk needs activation='topk', not 'batchtopk'",
        ),
        ({"multi_topk": True, "matryoshka": (0.5, 0.5)}, "two ways to add losses"),
        ({"matryoshka": (0.5, 0.6)}, "must sum to 1"),
        ({"matryoshka": (1.0,)}, "at least 2 items"),
        ({"activation": "relu", "auxk": 3}, "auxk=3 needs activation topk or batchtopk"),
        ({"activation": "relu", "k_anneal_steps": 3}, "relu has no k"),
        ({"l1_coef": 0.1}, "l1_coef=0.1 needs activation='relu'"),
        ({"skip": True}, "skip needs form='transcoder'"),
        ({"k_anneal_from": 3}, "k_anneal_from=3 is less than k=32"),
        ({"form": "clt"}, "stacked"),
        ({"ema_decay": 1.0}, "less than 1"),
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


def test_several_problems_are_said_at_once():
    with pytest.raises(ValidationError) as caught:
        TrainConfig(skip=True, k_anneal_from=3)
    (problem,) = caught.value.errors()
    assert "skip needs form='transcoder'" in problem["msg"]
    assert "k_anneal_from=3 is less than k=32" in problem["msg"]


@pytest.mark.parametrize(
    ("form", "expected"),
    [("stacked", "row"), ("feature", "row"), ("crosscoder", "layer"), ("transcoder", "row")],
)
def test_each_form_has_its_standardisation(form, expected):
    assert TrainConfig(form=form).resolve(8 * 16).standardise == expected
    assert TrainConfig(form=form, standardise="layer").resolve(128).standardise == "layer"


def test_resolved_relu_has_no_auxiliary_latents_and_a_penalty():
    config = TrainConfig(activation="relu").resolve(64)
    assert (config.auxk, config.l1_coef) == (0, 5 / 64)
    assert TrainConfig.model_validate_json(config.model_dump_json()) == config
    assert config.resolve(64) == config
