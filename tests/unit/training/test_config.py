"""Settings: shipped files load, wrong ones are refused by key."""

import pytest

from training.config import CONFIGS, FitConfig, PretrainConfig, load_config
from training.errors import ConfigError


@pytest.mark.parametrize("name", ["demo.yaml", "rd-resnet18.yaml"])
def test_shipped_fit_configs_load(name):
    load_config(FitConfig, CONFIGS / name)


def test_shipped_pretrain_config_loads():
    assert load_config(PretrainConfig, CONFIGS / "pretrain.yaml").picture_size % 16 == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("widht: 256", "widht.*known keys.*width"),
        ("width: wide", "width"),
        ("calibration: {ng_sigma: -1}", r"calibration\.ng_sigma"),
        ("image_size: 100", "image_size"),
        ("- 1", "keys and values"),
        ("a: [", "not YAML"),
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
