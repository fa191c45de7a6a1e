"""Settings: shipped files load, wrong ones are refused by key."""

import pytest

from training.config import CONFIGS, FitConfig, NetworkConfig, PretrainConfig, changed, load_config
from training.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "method"), [("demo", "logicrd"), ("logicrd", "logicrd"), ("rd", "rd"), ("dskd", "dskd")]
)
def test_shipped_fit_configs_load(name, method):
    """Each names its method, and what describes its network can be told apart from how it is trained."""
    config = load_config(FitConfig, CONFIGS / f"{name}.yaml")
    assert config.method == method
    assert config.network().model_dump() == {
        key: value for key, value in config.model_dump().items() if key in NetworkConfig.model_fields
    }


def test_rd_config_is_the_official_recipe():
    """hq-deng/RD4AD: 16 pictures of 256 x 256 a step, a constant rate of 0.005, seed 111, the map alone as score."""
    config = load_config(FitConfig, CONFIGS / "rd.yaml")
    values = (config.batch_size, config.image_size, config.learning_rate, config.schedule, config.seed, config.width)
    assert values == (16, 256, 5e-3, "constant", 111, 512)
    assert not config.mahalanobis


def test_shipped_pretrain_config_loads():
    assert load_config(PretrainConfig, CONFIGS / "pretrain.yaml").picture_size % 16 == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("widht: 256", "widht.*known keys.*width"),
        ("width: wide", "width"),
        ("calibration: {ng_sigma: -1}", r"calibration\.ng_sigma"),
        ("image_size: 100", "image_size"),
        ("method: rd2", "method"),
        ("gse: maybe", "gse"),
        ("- 1", "keys and values"),
        ("a: [", "not YAML"),
        ("gse: true\ngse: false\n", "key 'gse' stands twice"),
        ("calibration: {ng_sigma: .inf}\n", "key 'calibration.ng_sigma'"),
        ("max_minutes: .inf\n", "key 'max_minutes'"),
        ("learning_rate: 1.0e+30\n", "key 'learning_rate'"),
        ("seed: 99999999999999999999\n", "key 'seed'"),
        ("calibration: {ng_sigma: 1.0, review_sigma: 5.0}\n", "review_sigma lies above ng_sigma"),
    ],
)
def test_wrong_settings_name_file_and_key(tmp_path, text, message):
    path = tmp_path / "fit.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"(?s)fit\.yaml.*{message}"):
        load_config(FitConfig, path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml.*cannot be read"):
        load_config(FitConfig, tmp_path / "none.yaml")


def test_changes_are_checked_like_a_file():
    assert changed(FitConfig(), {"max_steps": 3, "seed": None}, "fit").max_steps == 3
    with pytest.raises(ConfigError, match="fit: key 'image_size'"):
        changed(FitConfig(), {"image_size": 100}, "fit")
