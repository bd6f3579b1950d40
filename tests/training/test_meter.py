"""Rates, waiting and memory of an interval, and the peak that work is held against."""

import re
import time
from pathlib import Path

import pytest
import torch

from training import meter
from training.meter import READINGS, Meter, Peak, PeakMemory, peak_flops

CPU = torch.device("cpu")


def test_meter_reads_the_interval_and_not_the_whole():
    clock = iter([10.0, 12.0])  # a fake clock: 10 s in which nothing was lost, then 2 s, half of them waited
    counter = Meter(CPU, 4, Peak(1e9, "made up"))
    first = counter.read(4000, next(clock), 0.0, flops=2e10)
    second = counter.read(5000, next(clock), 1.0, flops=2.4e10)
    assert set(first) == set(READINGS)
    assert (first["bytes_per_second"], first["bytes_per_second_per_device"], first["data_wait"]) == (400, 100, 0)
    assert first["mfu"] == pytest.approx(2e10 / (10 * 4 * 1e9))
    assert (second["bytes_per_second"], second["bytes_per_second_per_device"], second["data_wait"]) == (500, 125, 0.5)
    assert second["mfu"] == pytest.approx(0.4e10 / (2 * 4 * 1e9))


def test_meter_starts_from_a_checkpoints_totals():
    counter = Meter(CPU, 1, Peak(1e9, ""), num_bytes=1000, seconds=10.0, waited=2.0, flops=1e10)
    reading = counter.read(1500, 15.0, 3.0, flops=1.1e10)
    assert reading["bytes_per_second"] == 100 and reading["data_wait"] == pytest.approx(0.2)
    assert reading["mfu"] == pytest.approx(0.2)


def test_meter_without_flops_peak_or_time():
    assert "mfu" not in Meter(CPU, 1, None).read(1, 1.0, 0.0, flops=1.0)
    counter = Meter(CPU, 1, Peak(1e9, ""))
    assert "mfu" not in counter.read(1, 1.0, 0.0)
    assert set(counter.read(1, 1.0, 0.0, flops=1.0)) == {"peak_memory_bytes"}
    assert counter.read(2, 2.0, 9.0)["data_wait"] == 1.0  # a wait that began before the interval


def test_peak_memory_is_of_the_interval():
    memory = PeakMemory(CPU)
    if memory.source != "resident memory":
        pytest.skip("the system forbids resetting the high-water mark")
    quiet = memory.read()
    block = torch.ones(64 << 20, dtype=torch.uint8)
    del block
    loud = memory.read()
    assert loud >= quiet + (48 << 20)
    assert memory.read() <= loud - (48 << 20)


def test_peak_memory_falls_back_to_the_whole_life(tmp_path, monkeypatch):
    monkeypatch.setattr(meter, "_PROC", tmp_path / "none")
    memory = PeakMemory(CPU)
    assert memory.source == "resident memory since the process began"
    assert memory.read() == memory.read() > 10 << 20


def test_peak_memory_on_cuda_is_the_allocators_and_reset_at_each_reading(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: calls.append("read") or 7)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: calls.append("reset"))
    memory = PeakMemory(torch.device("cuda", 0))
    assert memory.read() == 7
    assert calls == ["reset", "read", "reset"]
    assert memory.source == "allocated by torch on the device"


# ---------------------------------------------------------------------------------------------------------- the peak

PUBLISHED = {
    "NVIDIA A100-SXM4-80GB": 312, "A100-PCIE-40GB": 312, "NVIDIA A100 80GB PCIe": 312, "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H100 PCIe": 756, "NVIDIA H100 NVL": 835, "NVIDIA H200": 989, "NVIDIA H200 NVL": 835,
    "NVIDIA GH200 480GB": 989, "NVIDIA GH200 144G HBM3e": 989, "NVIDIA B200": 2250, "NVIDIA GB200": 2500,
    "NVIDIA L4": 121, "NVIDIA L40S": 362, "NVIDIA A30": 165, "NVIDIA H20": 148,
}  # fmt: skip


@pytest.mark.parametrize(("name", "tflops"), PUBLISHED.items())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_known_gpus_have_their_published_peak(monkeypatch, name, tflops, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    peak = peak_flops(torch.device("cuda", 0), dtype)
    assert peak.flops == tflops * 1e12
    assert str(peak) == f"{tflops} TFLOP/s, published for {name}, {str(dtype)[6:]} dense"


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", torch.bfloat16),  # a slice
        ("NVIDIA A100-SXM-64GB", torch.bfloat16),  # a chip of its own
        ("NVIDIA L40", torch.bfloat16),
        ("NVIDIA H100 80GB HBM3", torch.float32),  # depends on TF32
    ],
)
def test_other_gpus_and_types_are_measured(monkeypatch, name, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(meter, "_measured", lambda device, dtype: Peak(1.0, f"measured {device} {dtype}"))
    assert peak_flops(torch.device("cuda", 1), dtype).source == f"measured cuda:1 {dtype}"


@pytest.fixture
def unmeasured():
    """No device has been measured yet, nor is any left measured by a fake."""
    meter._measured.cache_clear()
    yield
    meter._measured.cache_clear()


def test_measured_peak_is_the_best_product_and_is_taken_once(monkeypatch, unmeasured):
    took = iter([9.0, 0.004, 9.0, 0.02, 0.01, 0.03, 99.0])  # of each width the first counts for nothing
    monkeypatch.setattr(meter, "_product_seconds", lambda square: next(took))
    state = torch.get_rng_state()
    peaks = [peak_flops(CPU, torch.float32) for _ in range(2)]
    assert peaks[0].flops == pytest.approx(2 * 512**3 / 0.01)
    assert peaks[1] is peaks[0] and next(took) == 99.0
    assert str(peaks[0]) == "0.02684 TFLOP/s, measured: float32 matrix product, 512 wide"
    assert torch.equal(torch.get_rng_state(), state)  # training's draws are the same on every rank


@pytest.mark.parametrize(("seconds", "width"), [(1e-5, 4096), (0.02, 256)])
def test_measured_products_are_as_wide_as_the_device_is_fast(monkeypatch, unmeasured, seconds, width):
    monkeypatch.setattr(meter, "_product_seconds", lambda square: seconds)
    peak = peak_flops(CPU, torch.float32)
    assert peak.flops == pytest.approx(2 * width**3 / seconds)
    assert peak.source == f"measured: float32 matrix product, {width} wide"


def test_a_product_is_timed_from_its_start_to_its_end(monkeypatch, unmeasured):
    multiplied = []

    def slow(left, right):
        multiplied.append((left.shape, left.dtype, right.shape, right.dtype))
        time.sleep(0.02)

    monkeypatch.setattr(torch, "mm", slow)
    peak = peak_flops(CPU, torch.bfloat16)
    assert 0 < peak.flops <= 2 * 256**3 / 0.02
    assert set(multiplied) == {((256, 256), torch.bfloat16, (256, 256), torch.bfloat16)}


def test_recipe_overrides_the_peak(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    peak = peak_flops(torch.device("cuda", 0), torch.bfloat16, tflops=500.0)
    assert (peak.flops, str(peak)) == (5e14, "500 TFLOP/s, as log.peak_tflops says")


def test_page_lists_the_published_peaks():
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    table = page.split("| TFLOP/s | devices |")[1].split("\n\n")[0]
    rates = {int(number) for row in table.splitlines()[1:] for number in re.findall(r"\d+", row.split("|")[1])}
    assert rates == {tflops for _, tflops in meter._PUBLISHED}
