"""Settings that cannot be are refused by name; what fuzzing found is here."""

import pytest

from hotweights.worker_client.config import BadSetting, load_config


@pytest.mark.parametrize("text", ["many", "-1", "1.5", "²", "٣", "9" * 5000, "0", "1001"])
def test_a_number_that_is_none_or_out_of_bounds_is_refused_by_name(text: str) -> None:
    with pytest.raises(BadSetting, match=r"HOTWEIGHTS_MAX_IMAGES=.*takes a whole number from 1 to 1000"):
        load_config({"HOTWEIGHTS_MAX_IMAGES": text})


@pytest.mark.parametrize("text", ["soon", "-1", "1e3", "inf", "nan", "٣", "9" * 400])
def test_a_time_that_is_none_or_never_ends_is_refused_by_name(text: str) -> None:
    with pytest.raises(BadSetting, match=r"HOTWEIGHTS_AGENT_IDLE_S=.*takes seconds"):
        load_config({"HOTWEIGHTS_AGENT_IDLE_S": text})


def test_numbers_and_times_are_read() -> None:
    config = load_config({"HOTWEIGHTS_MAX_IMAGES": " 7 ", "HOTWEIGHTS_AGENT_IDLE_S": "0.25"})
    assert (config.max_images, config.agent_idle_s) == (7, 0.25)


def test_a_device_budget_is_bytes_or_left_to_what_is_free() -> None:
    assert load_config({}).device_budget is None
    assert load_config({"HOTWEIGHTS_DEVICE_BUDGET": " 0 "}).device_budget == 0
    config = load_config({"HOTWEIGHTS_DEVICE_BUDGET": "2147483648"})
    assert load_config(config.as_environ()).device_budget == 2 << 30
    with pytest.raises(BadSetting, match="HOTWEIGHTS_DEVICE_BUDGET"):
        load_config({"HOTWEIGHTS_DEVICE_BUDGET": "2G"})


@pytest.mark.parametrize(
    ("text", "bytes_s"), [("", None), ("200MB", 200e6), (" 1.5 GB/s ", 1.5e9), ("1000KB", 1e6), ("2000000B", 2e6)]
)
def test_a_limit_of_bandwidth_is_in_bytes_a_second(text: str, bytes_s: float | None) -> None:
    config = load_config({"HOTWEIGHTS_BANDWIDTH_MAX": text})
    assert config.bandwidth_max == bytes_s
    assert load_config(config.as_environ()).bandwidth_max == bytes_s


@pytest.mark.parametrize("text", ["fast", "0MB", "999KB", "200", "200Mbit", "-1GB", "1e9B", "9" * 5000 + "B"])
def test_a_limit_of_bandwidth_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(BadSetting, match="takes bytes a second, at least 1MB, for example 200MB"):
        load_config({"HOTWEIGHTS_BANDWIDTH_MAX": text})


def test_settings_of_ucx_are_passed_on_by_its_own_names_and_to_children() -> None:
    config = load_config({"HOTWEIGHTS_UCX_TLS": "rc,sm", "HOTWEIGHTS_UCX_NET_DEVICES": " mlx5_0:1 "})
    assert config.ucx == {"TLS": "rc,sm", "NET_DEVICES": "mlx5_0:1"}
    assert load_config(config.as_environ()).ucx == config.ucx
    assert load_config({}).ucx == {}


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("HOTWEIGHTS_TRANSPORT", "rdma", "auto, tcp, ucx or mpi"),
        ("HOTWEIGHTS_CONNECTIONS", "9", "from 1 to 8"),
        ("HOTWEIGHTS_NICE", "20", "from 0 to 19"),
        ("HOTWEIGHTS_LEND_GPUS", "0,1", "takes all, or UUIDs as nvidia-smi -L writes them"),
        ("HOTWEIGHTS_LEND_GPUS", "all,GPU-00000000-0000-0000-0000-000000000000", "takes all, or UUIDs"),
    ],
)
def test_what_an_agent_cannot_take_is_refused_with_what_it_takes(name: str, value: str, wanted: str) -> None:
    with pytest.raises(BadSetting, match=wanted):
        load_config({name: value})
